import fcntl, json, os, signal, socket, subprocess, sys
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
import psutil, pytest
from peft_study.tasks.data import glue_folder

signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's background jobs ignore it, and hand that on

REPO = Path(__file__).parents[1]
QUICK = "--checkpoint minilm --data demo --max-train-examples 64 --max-eval-examples 32 --n-epochs 1".split()
ENVIRONMENT = dict(os.environ)
BY_LIBRARIES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
                "PYTORCH_NVML_BASED_CUDA_CHECK"}   # in the tests' own process
PROGRAM = [sys.executable, "-c", "from peft_study.cli import main; main()"]


def flags(**given):
    "`--name value` for each setting, as the command line has it."
    return [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]


# A process that has imported what commands need, and forks for each. Most of the time of the tests is imports else.
FORKS = """
import importlib, json, os, sys, traceback
answers = os.fdopen(os.dup(1), "w")   # what others print is none
os.dup2(2, 1)
for name in sys.argv[1:]: importlib.import_module(name)
from multiprocessing import forkserver, util
def fork_server(program, args, passed):
    "Start multiprocessing's fork server as a fork, with what is imported here, and anything else as it is."
    if "forkserver" not in args[-1]: return spawn(program, args, passed)
    if pid := os.fork(): return pid
    kept = {0, 1, 2, *passed}
    try:
        for fd in range(3, 1024):
            if fd not in kept: os.closerange(fd, fd + 1)
        exec(args[-1], {})
    finally: os._exit(0)
shared = "peft_study.run.kernels" in sys.modules   # the server: its kernels have imported what runs need
if shared: sys.modules["peft_study.run.kernels"].warm_up()
else: spawn, util.spawnv_passfds = util.spawnv_passfds, fork_server
for line in sys.stdin:
    args, cwd, changes, out, err = json.loads(line)
    if not (pid := os.fork()):
        code = 1
        if shared: forkserver._forkserver._inherited_fds = []   # as in a fork of the server: uses it, starts none
        try:
            os.chdir(cwd)
            for number, file in enumerate((os.devnull, out, err)):
                os.dup2(os.open(file, os.O_RDWR | os.O_CREAT, 0o600), number)
            for name, value in changes.items():
                if value is None: del os.environ[name]
                else: os.environ[name] = value
            sys.path[1:1] = filter(None, (changes.get("PYTHONPATH") or "").split(":"))
            sys.argv[1:] = args
            from peft_study.cli import main
            main()
            code = 0
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)
"""
ALL = """matplotlib.pyplot pandas torch transformers peft_study.report.tables peft_study.share.exchange
         peft_study.study.sweep peft_study.run.kernels peft_study.cli"""
PART = """matplotlib.figure pandas papermill scipy.stats sklearn.metrics torch torch._dynamo torch.distributed.tensor
          torch.utils.tensorboard"""   # none of which asks for the variables of the Hub's library


def forking(modules):
    "A function that runs a command in a fork of a process with these modules: exit code."
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    child = subprocess.Popen([sys.executable, "-c", FORKS, *modules.split()], env=ENVIRONMENT, **pipes)
    def run(*request):
        print(json.dumps(request), file=child.stdin, flush=True)
        return int(child.stdout.readline())
    yield run
    child.stdin.close()
    child.wait()


@pytest.fixture(scope="session")
def forks(): yield from forking(ALL)


@pytest.fixture(scope="session")
def forks_in_part(): yield from forking(PART)


@pytest.fixture
def command(request, tmp_path_factory, tmp_path):
    """Run `peft-study …` in the repository, with results in a folder of the test's own: code, stdout, stderr. Its
    environment is that in which the tests began, whatever a test or a library has set here, or `env`."""
    said = tmp_path_factory.mktemp("said")
    def run(*args, outputs=tmp_path/"outputs", cwd=REPO, takes_outputs=True, env=ENVIRONMENT, **kw):
        args = list(map(str, [*args, *(["--outputs", outputs] if takes_outputs else [])]))
        names = {name for name in env.keys() | ENVIRONMENT.keys() if env.get(name) != ENVIRONMENT.get(name)}
        names -= BY_LIBRARIES
        later = all(name in ("PYTHONPATH", "NO_PROXY", "RAY_ADDRESS") or name.startswith("HF_") for name in names)
        if kw or not later:   # what Python or a library looks at as it starts
            done = subprocess.run([*PROGRAM, *args], capture_output=True, text=True, cwd=cwd, env=env, **kw)
            return done.returncode, done.stdout, done.stderr
        files = [said/f"{len(list(said.iterdir()))}.{kind}" for kind in ("out", "err")]
        forks = request.getfixturevalue("forks" if names <= {"PYTHONPATH"} else "forks_in_part")
        code = forks(args, str(cwd), {name: env.get(name) for name in names}, *map(str, files))
        return code, *(file.read_text() for file in files)
    return run


def pytest_configure(config): config.addinivalue_line("markers", "slow: by `make test-all` alone")


# By CPU time. Two processes take one file after the other, and end together if the long ones come first.
LONGEST = "crash report cluster studies matrix pack compare commands protocol processes hub gpu own places".split()

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


@contextmanager
def made_once(factory, name:str):
    "A folder that the processes of a session share, and whether it has to be made: by the first; the others wait."
    here = factory.getbasetemp()
    here = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    folder, made = here/name, here/f"{name}.made"
    folder.mkdir(exist_ok=True)
    with open(here/f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not made.exists()
        made.touch()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A folder with a very small BERT of random weights, for tests that are about processes and files."
    with made_once(tmp_path_factory, "tiny") as (folder, first):
        if first: make_tiny(folder)
    return folder


def make_tiny(folder):
    import torch
    from peft_study.tasks.data import load_tokenizer
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(folder)
    load_tokenizer("minilm").save_pretrained(folder)


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
    with made_once(tmp_path_factory, "study") as (folder, first):
        if first: (folder/"settings.ini").write_text(EIGHT.format(checkpoint=tiny))
    def start(name, *more, env={}, start=()):
        command = [*start, *PROGRAM, "study", "eight", *flags(outputs=name, checkpoint_minutes=0), *more]
        return subprocess.Popen(command, cwd=folder, env=os.environ | dict(OMP_NUM_THREADS="1") | env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    start.folder = folder
    return start


@pytest.fixture(scope="session")
def undisturbed(study, tmp_path_factory):
    with made_once(tmp_path_factory, "undisturbed") as (_, first):
        if first:
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
