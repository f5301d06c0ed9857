"A study packed, run without a network, killed on the way, and taken in again."
import json, os, shutil, signal, subprocess, sys, tarfile, time
from importlib.metadata import distributions
from pathlib import Path
import pytest
from conftest import PROGRAM, REPO, descendants, flags, kill_tree
from peft_study.run.config import read_study
from peft_study.run.runs import read_config, read_result

PYTHON = f"3.{sys.version_info.minor}"
LOOPBACK = """
import fcntl, os, socket, struct, sys
request = struct.pack("16sh14x", b"lo", 0x41)   # up and running
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, request)
os.execvp(sys.argv[1], sys.argv[1:])
"""
ALONE = ["unshare", "-rn", sys.executable, "-c", LOOPBACK]   # a network of this machine alone, as kernels need one
STUDY = """
[short]
task_name = sst2
data = {folder}/glue
checkpoint = {tiny}
n_epochs = 3
batch_size = 8
[short.lora]
rank = 1 2
[short.head]
"""


@pytest.fixture(scope="module")
def alone():
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("no network namespace can be made here")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny):
    "A folder with a study of three runs, its rows, and what `pip freeze` says of this Python, papermill left out."
    folder = tmp_path_factory.mktemp("home")
    (folder/"glue/SST-2").mkdir(parents=True)
    labelled, unlabelled = ("sentence\tlabel", "film {0} is {1}\t{2}"), ("index\tsentence", "{0}\tfilm {0} is {1}")
    for split, n, (header, row) in (("train", 400, labelled), ("dev", 40, labelled), ("test", 20, unlabelled)):
        rows = [row.format(i, ("bad", "good")[i % 2], i % 2) for i in range(n)]
        (folder/f"glue/SST-2/{split}.tsv").write_text("\n".join([header, *rows]) + "\n")
    (folder/"settings.ini").write_text(STUDY.format(folder=folder, tiny=tiny))
    versions = {d.name: d.version for d in distributions()}
    for name in ("all", "most"):
        lines = (f"{n}=={v}\n" for n, v in versions.items() if name == "all" or n.lower() != "papermill")
        (folder/f"{name}.txt").write_text("".join(lines))
    return folder


def peft_study(folder, *args, before=()):
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=str(REPO))
    done = subprocess.run([*before, *PROGRAM, *map(str, args)], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def start(pack, *args):
    "Start `run.sh` where there is no network, with nothing of this repository at hand."
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(PYTHON=sys.executable, OMP_NUM_THREADS="1")
    return subprocess.Popen([*ALONE, "sh", pack/"run.sh", *args, "--", *flags(checkpoint_minutes=0)], env=env,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(child, there):
    end = time.monotonic() + 300
    while not there():
        assert child.poll() is None and time.monotonic() < end, child.communicate()[0]
        time.sleep(.05)


def findings(outputs):
    "Losses, scores and predictions of each run; its times apart."
    timing, found = ("examples_per_second", "seconds_left"), {}
    for folder in sorted((outputs/"short/runs").iterdir()):
        lines = map(json.loads, (folder/"metrics.jsonl").read_text().splitlines())
        metrics = [{k: v for k, v in line.items() if k not in timing} for line in lines]
        result = json.loads((folder/"result.json").read_text())
        answers = {f.name: f.read_bytes() for f in (folder/"predictions").iterdir()}
        found[folder.name] = metrics, result["dev"], result["parameters"], answers
    return found


def test_there_and_back(home, alone, tmp_path):
    code, out, err = peft_study(home, "pack", "short", "--have", "most.txt", "--python", PYTHON, "--split", "200K")
    if "no package index" in err: pytest.skip("pip reaches no package index")
    assert code == 0, out + err
    parts = sorted(home.glob("short.tar.gz.part-*"))
    assert len(parts) > 1 and "1 packages: papermill" in out and "short/run.sh" in out, out
    joined = subprocess.run(f"cat {home}/short.tar.gz.part-* | tar xz", shell=True, cwd=tmp_path)
    assert joined.returncode == 0
    pack, results = tmp_path/"short", tmp_path/"short/outputs/short/runs"
    child = start(pack)   # killed as it installs or begins
    wait_for(child, (pack/"outputs").is_dir)
    kill_tree(child)
    child = start(pack)   # told to end, with a run finished and another on its way
    wait_for(child, lambda: list(results.glob("*/result.json")))
    script, = (p for p in descendants(child.pid) if p.pid == child.pid)
    script.send_signal(signal.SIGTERM)
    assert child.wait(120) == 130
    with tarfile.open(pack/"records.tar.xz") as tar: assert any("result.json" in n for n in tar.getnames())
    child = start(pack)
    out, _ = child.communicate(timeout=400)
    assert child.returncode == 0 and "of 3 runs are finished already" in out, out
    assert (pack/"installed/papermill").is_dir()

    code, out, err = peft_study(home, "adopt", pack/"records.tar.xz")
    assert code == 0 and "short: 3 runs taken in, 0 were here" in out, out + err
    def names(config): return config["data"], config["checkpoint"]
    declared = {c.run_id: names(c.flat()) for c in read_study("short", home/"settings.ini").configs}
    for name, wanted in declared.items():   # of home, not of the pack
        folder = home/"outputs/short/runs"/name
        assert names(read_config(folder).flat()) == names(read_result(folder)["config"]) == wanted
    code, out, err = peft_study(home, "study", "short", "--outputs", "own", "--checkpoint-minutes", 0)
    assert code == 0 and findings(home/"outputs") == findings(home/"own"), err
    assert {c.run_id for c in read_study("short", home/"settings.ini").configs} == set(findings(home/"own"))


def test_half_are_other_runs(home, tmp_path):
    "Weights in fp16 name other runs, and each says so; the commit is that of the repository."
    code, out, err = peft_study(home, "pack", "short", "--to", tmp_path/"half.tar.gz", "--have", "all.txt",
                                "--python", PYTHON, "--half")
    assert code == 0, out + err
    with tarfile.open(tmp_path/"half.tar.gz") as tar: tar.extractall(tmp_path)
    program = """
from peft_study.run.config import read_study
from peft_study.run.runs import commit, provenance
study = read_study("short", overrides=dict(data="data", checkpoint="checkpoints/{}-fp16"))
origin = provenance(study.configs[0])
print(origin["weights"], origin["commit"], *(c.run_id for c in study.configs))
"""
    from peft_study.run.runs import commit
    own = read_study("short", home/"settings.ini").configs
    program = program.format(Path(own[0].checkpoint).name)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(PYTHONPATH=str(tmp_path/"short"))
    done = subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path/"short", env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    weights, its_commit, *names = done.stdout.split()
    assert (weights, its_commit) == ("fp16", str(commit()))
    assert len(names) == 3 and not {c.run_id for c in own} & set(names)


WRONG = {"unknown study 'none'": ["none"],
         "split must be a size": ["short", "--split", "6,0M"],
         "platform must be": ["short", "--platform", "win_amd64"],
         "no such file": ["short", "--have", "none.txt"],
         "cannot be written": ["short", "--have", "all.txt", "--to", "no/folder.tar.gz"]}

@pytest.mark.parametrize("message", WRONG)
def test_bad_input(home, message):
    before = sorted(home.iterdir())
    code, out, err = peft_study(home, "pack", *WRONG[message], "--python", PYTHON)
    assert code == 2 and message.lower() in err.lower() and err.count("\n") == 1, err
    assert sorted(home.iterdir()) == before


def test_no_network_at_home(home, alone):
    before = sorted(home.iterdir())
    code, out, err = peft_study(home, "pack", "short", "--have", "most.txt", "--python", PYTHON, before=ALONE)
    assert code == 2 and "pip cannot fetch wheels" in err and err.count("\n") == 1, err
    assert sorted(home.iterdir()) == before


def test_a_platform_without_wheels(home):
    (home/"few.txt").write_text((home/"all.txt").read_text().replace("psutil==", "other=="))
    code, out, err = peft_study(home, "pack", "short", "--have", "few.txt", "--platform", "linux_pdp11")
    if "no package index" in err: pytest.skip("pip reaches no package index")
    assert code == 2 and "psutil" in err and err.count("\n") == 1, err
    assert not list(home.glob(".pack-*"))


def test_records_that_are_none(home):
    (home/"bad.tar.xz").write_bytes(b"x" * 100)
    code, out, err = peft_study(home, "adopt", "bad.tar.xz", "--outputs", "nothing")
    assert code == 2 and "no whole archive" in err and err.count("\n") == 1, err
    assert not list((home/"nothing").iterdir())
