"Where files lie: what is tracked, what is written, and from where it is found."
import subprocess
from conftest import REPO


def git(*args): return subprocess.run(["git", *args], cwd=REPO, capture_output=True, text=True).stdout.split()


def test_what_is_tracked_is_not_where_commands_write():
    assert git("ls-files", "outputs") == []
    assert git("check-ignore", "outputs/demo/results.csv", "outputs/bench/bench.json", ".quarto/x", "outputs/demo/report/report.quarto_ipynb")[3:]
    assert {"/.quarto/", "**/*.quarto_ipynb"} <= set((REPO/".gitignore").read_text().splitlines())   # else Quarto appends them
