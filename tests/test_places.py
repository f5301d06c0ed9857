"Where files lie: what is tracked, what is written, from where it is found, and what may stand around it."
import json, os, shutil, subprocess, sys
from contextlib import chdir
from importlib.metadata import distributions
from pathlib import Path
from zipfile import ZipFile
import nbformat, pytest
from packaging.specifiers import SpecifierSet
from conftest import REPO
from peft_study.run.config import read_study
from peft_study.files import default_outputs

PROGRAM = Path(sys.executable).parent/"peft-study"   # `python -c` would look for libraries in the working folder
SHORT = "--max-train-examples 16 --max-eval-examples 8 --epochs 1 --max-length 16".split()


def git(*args): return subprocess.run(["git", *args], cwd=REPO, capture_output=True, text=True).stdout.split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package as a wheel brings it, without the repository."
    files = git("ls-files", "--cached", "--others", "--exclude-standard") or pytest.skip("no git repository")
    folder = tmp_path_factory.mktemp("wheel")
    for file in (f for f in files if (REPO/f).is_file()):
        (folder/"source"/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPO/file, folder/"source"/file)
    quietly = ["--quiet", "--no-deps", "--no-build-isolation"]
    build = [sys.executable, "-m", "pip", "wheel", *quietly, "--wheel-dir", folder, folder/"source"]
    subprocess.run(build, check=True)
    shutil.rmtree(folder/"source")
    wheel, = folder.glob("*.whl")
    ZipFile(wheel).extractall(folder/"installed")
    def run(*args, cwd, **env):
        env = os.environ | dict(PYTHONPATH=str(folder/"installed"), OMP_NUM_THREADS="1") | env
        done = subprocess.run([PROGRAM, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    return run


def test_what_is_tracked_is_not_where_commands_write():
    if not git("ls-files", "README.md"): pytest.skip("no git repository")
    written = ["outputs/demo/results.csv", "outputs/bench/bench.json", ".quarto/x",
               "outputs/demo/report/report.quarto_ipynb"]
    assert git("ls-files", "outputs") == [] and git("check-ignore", *written) == written
    of_quarto = {"/.quarto/", "**/*.quarto_ipynb"}   # which Quarto would append
    assert of_quarto <= set((REPO/".gitignore").read_text().splitlines())


TEMPLATES = [*(f"nbs/experiments/{name}.ipynb" for name in ("finetune", "fit", "explore")), "reports/report.ipynb"]

@pytest.mark.parametrize("name", TEMPLATES)
def test_notebooks_use_the_repositorys_outputs(name, tmp_path):
    cells = nbformat.read(REPO/name, 4).cells
    given, = (c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    finds = "outputs or default_outputs()", "View(study, outputs)"   # View looks there as well
    assert 'outputs = "" ' in given and any(way in c.source for c in cells for way in finds)
    for folder in (tmp_path, REPO, REPO/"nbs/experiments"):
        with chdir(folder): assert default_outputs() == REPO/"outputs"


def test_installed(installed, tmp_path):
    "In an empty folder the declared studies are at hand."
    assert "lora" in installed("study", "demo", "--dry-run", cwd=tmp_path)


def test_whatever_stands_around(installed, tiny, tmp_path):
    """Installed from a wheel, a study and its report: spaces, quotes, braces and brackets in paths; settings with a
    byte order mark; files named as libraries in the working folder; a kernel `python3` of another Python; folders that
    are no runs."""
    here, glue, outputs = tmp_path/"Jane's {work} [1]", tmp_path/"My Drive"/"glue 100%", "{seed} of [/b] $a$ $b$"
    here.mkdir()
    (glue/"SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        (glue/"SST-2"/f"{split}.tsv").write_text("sentence\tlabel\n" + "good film\t1\nbad film\t0\n" * 8)
    settings = f"[odd]\ntask_name = sst2\ndata = '{glue}'\ncheckpoint = {tiny}\n[odd.head]\n"
    (here/"settings.ini").write_text(settings, encoding="utf-8-sig")
    for name in ("random", "tokenize", "statistics", "datasets", "accelerate"):
        (here/f"{name}.py").write_text("raise SystemExit('not the library')")
    (tmp_path/"jupyter/kernels/python3").mkdir(parents=True)
    kernel = dict(argv=["/bin/false"], display_name="another Python", language="python")
    (tmp_path/"jupyter/kernels/python3/kernel.json").write_text(json.dumps(kernel))
    for name in (".ipynb_checkpoints", "@eaDir", "sst2-head-all-s0-01234567 (copy)"):
        (here/outputs/"odd/runs"/name).mkdir(parents=True)
    env = dict(JUPYTER_PATH=str(tmp_path/"jupyter"))
    out = installed("study", "odd", *SHORT, "--outputs", outputs, cwd=here, **env)
    assert len(list((here/outputs).glob("odd/runs/*/notebook.ipynb"))) == 1 and f"{outputs}/odd/results.csv" in out
    assert "(copy)" not in installed("list", "--outputs", outputs, cwd=here, **env)
    installed("report", "odd", "--to", "html", "--outputs", outputs, cwd=here, **env)
    assert "What was run" in (here/outputs/"odd/report/report.html").read_text()


def test_a_flag_may_have_spaces(tmp_path):
    folder = tmp_path/"My Drive"
    folder.mkdir()
    def data(text):
        study = read_study("demo", REPO/"settings.ini", dict(data=text, seed="0 1"))
        return sorted({config.data for config in study.configs})
    assert data(str(folder)) == [str(folder)] and data("demo hub") == ["demo", "hub"]
    assert data(f'demo "{folder}/not there"') == [f"{folder}/not there", "demo"]


def test_oldest_python():
    "Every library that set-up installs takes the first Python 3.11, as README says."
    pinned = {line.partition("==")[0] for line in (REPO/"constraints.txt").read_text().splitlines()}
    asked = {d.name: d.metadata["Requires-Python"] or "" for d in distributions() if d.name in pinned}
    assert len(asked) > 100 and not {name: v for name, v in asked.items() if "3.11.0" not in SpecifierSet(v)}


def test_long_temporary_folder(tmp_path):
    "A socket's path has room for 107 bytes; where TMPDIR is longer, processes begin without the fork server."
    code = "from peft_study.run.kernels import begin; import os, sys; begin(os.mkdir, sys.argv[1]).join()"
    long = tmp_path/("x" * 60)/("y" * 60)
    long.mkdir(parents=True)
    env = os.environ | dict(TMPDIR=str(long), PYTHONPATH=str(REPO))
    subprocess.run([sys.executable, "-c", code, tmp_path/"made"], env=env, check=True)
    assert (tmp_path/"made").is_dir()


def test_ones_own_method_in_the_working_folder(tmp_path):
    "It is found there, behind all libraries; what goes wrong in it is told in a line."
    code = "from peft_study.methods.core import find_method; import sys; print(find_method(sys.argv[1]).__name__)"
    (tmp_path/"mine.py").write_text("from peft_study.methods.lora import LoRA\nclass Mine(LoRA): pass\n")
    (tmp_path/"broken.py").write_text("raise SystemExit('no')")
    def find(name):
        command, env = [sys.executable, "-P", "-c", code, name], os.environ | dict(PYTHONPATH=str(REPO))
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert find("mine:Mine").stdout == "Mine\n"
    assert "BadInput: method 'broken:Mine': SystemExit: no" in find("broken:Mine").stderr


def test_an_unfinished_run_elsewhere(tmp_path):
    "A run without a result belongs to the same data from every folder, though its path is relative."
    from peft_study.run.config import RunConfig
    from peft_study.results.table import load_runs
    from peft_study.run.runs import start_run
    (tmp_path/"here/data/RTE").mkdir(parents=True)
    for split in ("train", "dev"):
        rows = "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt pours.\tentailment\n"
        (tmp_path/f"here/data/RTE/{split}.tsv").write_text(rows)
    (tmp_path/"elsewhere").mkdir()
    with chdir(tmp_path/"here"):
        start_run(RunConfig(task_name="rte", method="lora", data="data", study="s"), tmp_path/"outputs")
        here = load_runs("s", tmp_path/"outputs")
    with chdir(tmp_path/"elsewhere"): there = load_runs("s", tmp_path/"outputs")
    columns = ["data", "data_id", "configuration"]
    assert here[columns].values.tolist() == there[columns].values.tolist()
    assert there.data.tolist() == ["data"]
