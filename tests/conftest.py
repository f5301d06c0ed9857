import json, os, signal, socket, subprocess, sys
from pathlib import Path
from threading import Thread
import psutil, pytest
from peft_study.tasks.data import glue_folder

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it, and hand that on

REPO = Path(__file__).parents[1]
QUICK = "--checkpoint minilm --data demo --max-train-examples 64 --max-eval-examples 32 --n-epochs 1".split()
ENVIRONMENT = dict(os.environ)
PROGRAM = [sys.executable, "-c", "from peft_study.cli import main; main()"]


def flags(**given):
    "`--name value` for each setting, as the command line has it."
    return [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]


# A process that has imported what commands need, and forks for each; its forks share its fork server, whose kernels
# have imported what runs need. Most of the time of the tests is imports else.
FORKS = """
import json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")   # what the server prints is none
os.dup2(2, 1)
import matplotlib.pyplot, pandas, torch, transformers
import peft_study.report.paper, peft_study.share.exchange, peft_study.study.sweep
from multiprocessing.forkserver import _forkserver
from peft_study.cli import main
from peft_study.run.kernels import warm_up
warm_up()
for line in sys.stdin:
    args, cwd, path, out, err = json.loads(line)
    if not (pid := os.fork()):
        code = 1
        _forkserver._inherited_fds = []   # as in a fork of the server, which uses it and starts none
        try:
            os.chdir(cwd)
            for number, file in enumerate((os.devnull, out, err)):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
            if path:
                os.environ["PYTHONPATH"] = path
                sys.path[1:1] = path.split(":")
            sys.argv[1:] = args
            main()
            code = 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def forks():
    "A function that runs a command in a fork: exit code."
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", FORKS], env=ENVIRONMENT, **pipes)
    def run(args, cwd, path, out, err):
        print(json.dumps([args, str(cwd), path, str(out), str(err)]), file=child.stdin, flush=True)
        return int(child.stdout.readline())
    yield run
    child.stdin.close()
    child.wait()


@pytest.fixture
def command(tmp_path_factory, tmp_path, forks):
    """Run `peft-study …` in the repository, with results in a folder of the test's own: code, stdout, stderr. `path` is
    a PYTHONPATH. Its environment is that in which the tests began, whatever a test or a library has set here; with
    `env`, a time limit or the like it is a process of its own."""
    said = tmp_path_factory.mktemp("said")
    def run(*args, outputs=tmp_path/"outputs", cwd=REPO, takes_outputs=True, path=None, **kw):
        args = list(map(str, [*args, *(["--outputs", outputs] if takes_outputs else [])]))
        if kw:
            done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, cwd=cwd, **kw)
            return done.returncode, done.stdout, done.stderr
        files = [said/f"{len(list(said.iterdir()))}.{kind}" for kind in ("out", "err")]
        code = forks(args, cwd, path and str(path), *files)
        return code, *(file.read_text() for file in files)
    return run


def pytest_configure(config): config.addinivalue_line("markers", "slow: by `make test-all` alone")


# By CPU time. Two processes take one file after the other, and end together if the long ones come first.
LONGEST = "crash cluster report".split()

def pytest_collection_modifyitems(items):
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def rows_on_the_hub(monkeypatch):
    "Runs that are made up have no data to read: what they would use of the Hub's is known by the task's name."
    from peft_study.run import config
    real = config.use_fingerprint
    def known(task, use): return f"{task.name} on the Hub" if use.data == "hub" else real(task, use)
    monkeypatch.setattr(config, "use_fingerprint", known)


@pytest.fixture
def glue():
    folder = glue_folder()
    if not folder: pytest.skip("no GLUE data: set GLUE_DATA to a folder in the official layout")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a very small BERT of random weights, for tests that are about processes and files."
    import torch
    from peft_study.tasks.data import load_tokenizer
    from transformers import BertConfig, BertForMaskedLM
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)
    return folder


EIGHT = """
[eight]
task_name = cola
data = demo
checkpoint = {checkpoint}
max_train_examples = 640
max_eval_examples = 40
n_epochs = 5
seed = 0 1
[eight.lora]
rank = 1 2
[eight.adapter]
bottleneck_size = 2
[eight.full]
top_k = 1
"""


@pytest.fixture(scope="session")
def study(tmp_path_factory, tiny):
    "A function that starts `peft-study study eight`, eight short runs, in its `folder`, results in NAME."
    folder = tmp_path_factory.mktemp("study")
    (folder/"settings.ini").write_text(EIGHT.format(checkpoint=tiny))
    def start(name, *more, env={}, start=()):
        command = [*start, *PROGRAM, "study", "eight", *flags(outputs=name, checkpoint_minutes=0), *more]
        return subprocess.Popen(command, cwd=folder, env=os.environ | dict(OMP_NUM_THREADS="1") | env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    start.folder = folder
    return start


@pytest.fixture(scope="session")
def undisturbed(study):
    child = study("quiet", "--jobs", "2")
    out, _ = child.communicate()
    assert child.returncode == 0 and "8/8" in out, out
    return findings(study.folder/"quiet")


def findings(outputs):
    "What a run must find again: losses, scores and bytes, by run."
    timing, found = ("examples_per_second", "seconds_left"), {}
    for folder in sorted((outputs/"eight/runs").iterdir()):
        lines = map(json.loads, (folder/"metrics.jsonl").read_text().splitlines())
        metrics = [{k: v for k, v in line.items() if k not in timing} for line in lines]
        scores = json.loads((folder/"result.json").read_text())["dev"]
        files = [(folder/name).read_bytes() for name in ("adapter/adapter_model.safetensors", "predictions/test.tsv")]
        found[folder.name] = (metrics, scores, *files)
    return found


def descendants(pid):
    "All processes below `pid`, and itself, kernels and their sessions included."
    try: return [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]
    except psutil.NoSuchProcess: return []


def kill_tree(child):
    "`child` and all processes below it are killed; some of them may end by themselves meanwhile."
    for process in descendants(child.pid):
        try: process.kill()
        except psutil.NoSuchProcess: continue
    child.communicate()


@pytest.fixture
def dumb():
    "The address of something that takes connections, and never says a word."
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        def accept():
            while True:
                try: held.append(server.accept())
                except OSError: return
        Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
