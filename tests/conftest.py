import subprocess, sys
from pathlib import Path
import pytest
from peft_study.data import glue_folder

REPO = Path(__file__).parents[1]
QUICK = "--checkpoint minilm --data demo --max-train-examples 64 --max-eval-examples 32 --n-epochs 1".split()


@pytest.fixture
def command(tmp_path):
    "Run `peft-study …` in the repository, with results in a folder of the test's own: code, stdout, stderr."
    def run(*args, outputs=tmp_path/"outputs", cwd=REPO, takes_outputs=True, **kw):
        args = [sys.executable, "-c", "from peft_study.cli import main; main()", *map(str, args)]
        done = subprocess.run(args + (["--outputs", str(outputs)] if takes_outputs else []), capture_output=True, text=True, cwd=cwd, **kw)
        return done.returncode, done.stdout, done.stderr
    return run


@pytest.fixture
def glue():
    folder = glue_folder()
    if not folder: pytest.skip("no GLUE data: set GLUE_DATA to a folder in the official layout")
    return folder
