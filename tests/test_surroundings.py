"What stands around a run and is none of its business: locales, git hooks, other tools' settings, other users' files."
import ast, os, shutil, signal, subprocess, sys, tempfile, time
from pathlib import Path
from unittest.mock import patch
import psutil, pytest, torch
from conftest import PROGRAM, REPO, flags
from peft_study.run import runs, train
from peft_study.study import sweep
from peft_study.run.config import RunConfig
from peft_study.run.runs import commit, lock_folder

SHORT = flags(max_train_examples=32, max_eval_examples=8, epochs=1, max_length=16)


def test_a_hook_of_another_repository(tmp_path):
    if not commit(): pytest.skip("no git repository")
    other = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*other, "init", "-q"], check=True)
    subprocess.run([*other, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    wanted = commit()
    with patch.dict(os.environ, GIT_DIR=f"{tmp_path}/.git", GIT_WORK_TREE=str(tmp_path), GIT_INDEX_FILE="x"):
        assert commit() == wanted


# --- locales


def without_encoding(file):
    "The lines of a module in which text is read or written in the encoding of the locale."
    for call in (n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        of_a_path = isinstance(call.func, ast.Attribute) and name in ("read_text", "write_text")
        opened = isinstance(call.func, ast.Name) and name == "open"
        binary = any(isinstance(a, ast.Constant) and a.value in ("rb", "wb", "ab") for a in call.args)
        told = any(k.arg == "encoding" for k in call.keywords)
        told |= name == "read_text" and bool(call.args) or name == "write_text" and len(call.args) > 1
        if (of_a_path or opened) and not binary and not told: yield f"{file.name}:{call.lineno}"


def test_files_are_utf8():
    files = [f for f in (REPO/"peft_study").rglob("*.py")]
    assert len(files) > 30 and not [line for file in files for line in without_encoding(file)]


def test_locale_c(command, tiny, tmp_path):
    "Paths, labels and what is printed are not ASCII, and Python was told to take the locale's encoding."
    data = tmp_path/"données"
    data.mkdir()
    rows = "text,label\n" + "bien,positif\nmal,négatif\n" * 8
    for split in ("train", "dev"): (data/f"{split}.csv").write_text(rows, encoding="utf-8")
    task = f"[task.own]\ncolumns = text\nlabels = négatif,positif\ndata = {data}\n"
    (tmp_path/"settings.ini").write_text(task, encoding="utf-8")
    env = os.environ | dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONPATH=str(REPO))
    code, out, err = command("run", *flags(task="own", method="head", checkpoint=tiny), *SHORT, cwd=tmp_path, env=env)
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    assert "négatif" in (folder/"predictions/dev.tsv").read_text(encoding="utf-8")
    code, out, err = command("run", *flags(task="keine Prüfung", method="head"), cwd=tmp_path, env=env)
    assert code == 2 and "keine Pr" in err and "Traceback" not in err


# --- settings of others


FOREIGN = dict(nbdev="[DEFAULT]\nlib_name = x\n", decouple="SECRET=abc\nDEBUG=1\n", sections="[settings]\nDEBUG=1\n",
               latin="[DEFAULT]\nauthor = Andr\xe9\n")


@pytest.mark.parametrize("text", FOREIGN.values(), ids=FOREIGN)
def test_settings_of_another_tool(command, tmp_path, text):
    (tmp_path/"settings.ini").write_text(text, encoding="latin-1")
    code, out, err = command("study", "demo", "--tasks", "cola", "--dry-run", cwd=tmp_path)
    assert code == 0 and "lora" in out and err.count("settings.ini of this folder") == 1, err
    code, out, err = command("run", *flags(task="no_such", method="head"), cwd=tmp_path)
    assert code == 2 and "unknown task_name 'no_such'" in err, err


def test_declared_studies_stand_behind_ones_own(command, tmp_path):
    mine = "[mine]\ntask_name = cola\ndata = demo\ncheckpoint = minilm\nlr = 1e-3{}\n[mine.lora]\n"
    (tmp_path/"settings.ini").write_text(mine.format(""), encoding="utf-8")
    for name in ("mine", "demo"):
        code, out, err = command("study", name, "--dry-run", cwd=tmp_path)
        assert code == 0 and "passed over" not in err, err
    code, out, err = command("study", "none_such", "--dry-run", cwd=tmp_path)
    assert code == 2 and "settings.ini has mine, " in err and ", demo, " in err, err
    (tmp_path/"settings.ini").write_text(mine.format("  # as in the paper"), encoding="utf-8")
    code, out, err = command("study", "mine", "--dry-run", cwd=tmp_path)
    assert code == 2 and "[mine.lora]: lr has a comment behind its value" in err, err


# --- other users


@pytest.fixture
def shared():
    "A folder that everybody may write to, and how to run a program there as somebody without a name and a home."
    if os.getuid() or not shutil.which("setpriv"): pytest.skip("needs root, and setpriv")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]   # Python may lie in a home
        nobody = ["setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups", *may_read]
        env = os.environ | dict(HOME="/", PYTHONPATH=str(REPO), PYTHONDONTWRITEBYTECODE="1", MPLCONFIGDIR=folder)
        def run(*args):
            command = [*nobody, *PROGRAM, *map(str, args)]
            done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            assert "Traceback" not in done.stderr, done.stderr
            return done.returncode, done.stderr
        yield Path(folder), run


STUDY = """[s]
task_name = cola
data = demo
checkpoint = {}
max_train_examples = 32
max_eval_examples = 16
n_epochs = 1
max_length = 16
[s.head]
"""


def test_a_colleagues_folder(shared, tiny):
    "What he may read is locked as it is; what he may not is told in a line."
    folder, run = shared
    shutil.copytree(tiny, folder/"tiny")
    (folder/"settings.ini").write_text(STUDY.format(folder/"tiny"), encoding="utf-8")
    (folder/"o/s").mkdir(parents=True)
    os.chmod(folder/"o/s", 0o777)
    (folder/"o/s/.study.lock").write_text("7 on elsewhere", encoding="utf-8")
    code, err = run("study", "s", "--outputs", "o")
    assert code == 0 and (folder/"o/s/results.csv").is_file(), err
    with lock_folder(folder/"o/s", "study", wait=0): pass   # the other's process has let it go
    (folder/"o2/s").mkdir(parents=True)
    code, err = run("study", "s", "--outputs", "o2")
    assert code == 2 and "cannot be written (Permission denied)" in err and len(err.strip().splitlines()) == 1, err
    os.chmod(folder/"o/s", 0o755)
    code, err = run("study", "s", "--outputs", "o")
    assert code == 2 and "Permission denied" in err, err


# --- the machine's name, and its processors


def test_two_processes_on_a_machine_whose_name_leads_nowhere(tiny, tmp_path):
    (tmp_path/"sitecustomize.py").write_text(
        "import socket\nsocket.getfqdn = lambda *a: 'no-such-machine.invalid'\nsocket.gethostname = socket.getfqdn\n")
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}:{REPO}")
    code = ("import sys; from peft_study.run.config import RunConfig; from peft_study.run.train import train; "
            "train([RunConfig(task_name='cola', method='head', data='demo', checkpoint=sys.argv[1], n_epochs=1, "
            "max_train_examples=16, max_eval_examples=8)], sys.argv[2], processes=2)")
    done = subprocess.run([sys.executable, "-c", code, tiny, tmp_path/"o"], env=env, cwd=REPO, timeout=150)
    assert done.returncode == 0


def test_processors_of_a_container_and_of_slurm(monkeypatch):
    monkeypatch.setattr(runs, "_own_cores", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for quota, slurm, cores in [(float("inf"), {}, 64), (1.5, {}, 1), (.5, {}, 1), (8., {}, 8),
                                (8., dict(SLURM_CPUS_ON_NODE="6"), 6),
                                (8., dict(SLURM_CPUS_ON_NODE="6", SLURM_CPUS_PER_TASK="3"), 3)]:
        monkeypatch.setattr(runs, "container_quota", lambda: quota)
        with patch.dict(os.environ, slurm):
            assert runs.cores() == cores
            assert runs.threads_each() == ({} if cores == 64 else dict(OMP_NUM_THREADS=str(cores)))
            assert runs.threads_each(2) == dict(OMP_NUM_THREADS=str(max(1, cores // 2)))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runs.threads_each(2) == {} and runs.threads(2) == 5


@pytest.mark.parametrize("said", ["SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"])
def test_training_keeps_to_the_threads_it_was_given(monkeypatch, tmp_path, said):
    "Whoever started the process, and on a machine where it could take more."
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(said, "1")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train.new_accelerator(RunConfig(task_name="cola", method="head"), tmp_path)
        assert torch.get_num_threads() == 1
    finally: torch.set_num_threads(before)


# --- what a run leaves


def test_a_kernel_that_dies_behind_the_result(tmp_path, monkeypatch):
    from nbclient.exceptions import DeadKernelError
    config = RunConfig(task_name="cola", method="head", data="demo", checkpoint="minilm")
    def die(config, folder, *args):
        runs.write_json(folder/"result.json", dict(score=.5))
        raise DeadKernelError("Kernel died")
    monkeypatch.setattr(sweep, "_execute", die)
    folder = sweep.run_notebook(config, tmp_path)
    assert runs.status(folder) == "done" and not (folder/"error.txt").exists()


def test_a_result_of_before_a_setting_existed(tmp_path):
    from peft_study.results.table import load_runs
    config = RunConfig(task_name="cola", method="head", data="demo", checkpoint="minilm", study="old")
    folder = runs.start_run(config, tmp_path)
    older = {k: v for k, v in config.flat().items() if k not in ("keep", "precision", "tune_share")}
    runs.write_json(folder/"result.json", dict(run_id=config.run_id, size="all", score=.5, config=older))
    table = load_runs("old", tmp_path)
    assert table.kept.tolist() == ["last"] and table.precision.tolist() == ["fp32"]
    assert runs.read_result(folder)["config"]["tune_share"] == 0


# --- Ctrl-C


def interrupted(waits, *given, **env):
    "How `run` ends by Ctrl-C while it waits for something: exit code, what it says, seconds."
    command = [*PROGRAM, "run", *given, *SHORT]
    child = subprocess.Popen(command, cwd=REPO, env=os.environ | env, stderr=subprocess.PIPE, text=True,
                             start_new_session=True)
    while not waits(child) and child.poll() is None: time.sleep(.1)
    time.sleep(1)
    began = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)   # as a terminal does
    child.wait(60)
    seconds = time.monotonic() - began
    return child.returncode, child.communicate()[1].strip(), seconds


def test_ctrl_c_while_the_hub_is_asked(dumb, tmp_path):
    def waits(child): return psutil.Process(child.pid).net_connections()
    given = flags(task="cola", method="head", checkpoint="someone/model", data="demo", outputs=tmp_path)
    code, line, seconds = interrupted(waits, *given, HF_ENDPOINT=f"http://{dumb}", HF_HOME=str(tmp_path), NO_PROXY="*",
                                      HF_HUB_OFFLINE="0", HF_HUB_ETAG_TIMEOUT="60")
    assert code == 130 and line == "peft-study: interrupted; the same command goes on from here" and seconds < 10, line


def test_ctrl_c_while_a_lock_is_waited_for(tiny, tmp_path):
    given = dict(task_name="cola", method="head", checkpoint=str(tiny), data="demo")
    short = dict(max_train_examples=32, max_eval_examples=8, n_epochs=1, max_length=16)
    folder = runs.run_folder(RunConfig(**given, **short), tmp_path)
    folder.mkdir(parents=True)
    with lock_folder(folder, "notebook"):
        def waits(child): return (folder/"config.json").exists()
        code, line, seconds = interrupted(waits, *flags(**given, outputs=tmp_path))
    assert code == 130 and line == "peft-study: interrupted; the same command goes on from here" and seconds < 10, line
