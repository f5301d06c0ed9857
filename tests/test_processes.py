"Two processes on a CPU give what one gives."
import os, re, subprocess, sys, time
import psutil, pytest
from conftest import PROGRAM, REPO, descendants, flags
from peft_study.run.config import RunConfig
from peft_study.tasks.data import minilm_folder
from peft_study.run.runs import read_metrics, read_result, start_run
from peft_study.run.train import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    "A small BERT with random weights, MiniLM's tokeniser, and no dropout."
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                        hidden_dropout_prob=0., attention_probs_dropout_prob=0.)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)
    return folder


METHODS = [dict(method="lora"), dict(method="adapter", bottleneck_size=8), dict(method="full")]

@pytest.mark.parametrize("method", METHODS, ids=lambda m: m["method"])
def test_losses_and_learning_rates(checkpoint, tmp_path, method):
    # 75 examples in batches of 16: the last batch of an epoch has 11, so that two processes get unequal slices
    config = RunConfig(task_name="rte", **method, lr=5e-3, checkpoint=str(checkpoint), data="demo", n_epochs=4,
                       batch_size=16, max_train_examples=75, max_eval_examples=51, max_steps=20)
    env = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    found = {}
    for processes in (1, 2):
        folder = start_run(config, tmp_path/str(processes))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launcher, "-m", "peft_study.run.train", str(folder), str(os.getpid()), "1", "10"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=REPO, timeout=300)
        assert done.returncode == 0, done.stderr
        found[processes] = [m for m in read_metrics(folder) if "loss" in m], read_result(folder)
    (one, result1), (two, result2) = found[1], found[2]
    assert len(one) == len(two) == 20 and result2["provenance"]["processes"] == 2
    assert [m["lr"] for m in one] == [m["lr"] for m in two]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, two)) < 1e-4
    assert max(abs(a["grad_norm"] - b["grad_norm"]) for a, b in zip(one, two)) < 1e-3
    assert len({m["loss"] for m in one}) == 20 and result1["dev"]["last"] == pytest.approx(result2["dev"]["last"])


def test_run_in_two_processes(command, checkpoint, tmp_path):
    short = flags(max_train_examples=64, max_eval_examples=33, epochs=2)
    given = flags(task="cola", method="lora", data="demo", checkpoint=checkpoint, processes=2)
    code, out, err = command("run", *given, *short)
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    result = read_result(folder)
    assert result["provenance"]["processes"] == 2 and result["steps"] == 4


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
MODULE = ["-m", "peft_study.run.train"]


def launched(*command):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=REPO, timeout=300)


def test_launchers_of_ones_own(checkpoint, tmp_path):
    "What the notebook on training tells: a run that has been begun is completed in two processes, or in one."
    config = RunConfig(task_name="cola", method="lora", checkpoint=str(checkpoint), data="demo", n_epochs=1,
                       max_train_examples=64, max_eval_examples=9)
    two, one, none = (start_run(config, tmp_path/name) for name in ("two", "one", "none"))
    done = launched(*TORCHRUN, "--nproc_per_node", 2, *MODULE, two)
    assert done.returncode == 0, done.stderr[-3000:]
    done = launched(*ACCELERATE, "--num_processes", 1, "--mixed_precision", "bf16", *MODULE, one)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [[m["loss"] for m in read_metrics(folder) if "loss" in m] for folder in (two, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4) and len(losses[0]) == 2
    assert [read_result(folder)["provenance"]["processes"] for folder in (two, one)] == [2, 1]
    for command, says in (([sys.executable, *MODULE, two], f"{two.name} is finished already"),
                          ([*ACCELERATE, "--num_processes", 2, *MODULE, none], "use torchrun --nproc_per_node N"),
                          ([sys.executable, *MODULE], "'' is no run folder")):
        done = launched(*command)
        assert done.returncode and len(re.findall("^peft_study.run.train: .*", done.stderr, re.M)) == 1, done.stderr
        assert says in done.stderr
    assert read_result(none) is None


def test_the_command_under_a_launcher(tmp_path):
    began = time.monotonic()
    done = launched(*TORCHRUN, "--nproc_per_node", 2, "--no-python", *PROGRAM, "run", "--outputs", tmp_path/"outputs")
    assert done.returncode and done.stderr.count("peft-study: ") == 1 and time.monotonic() - began < 60, done.stderr
    assert "peft-study starts the processes of a run itself" in done.stderr and "--processes N" in done.stderr
    assert not (tmp_path/"outputs").exists()


def test_one_of_two_processes_is_killed(command, checkpoint, tmp_path):
    "Who was killed, by what, and that the same command goes on, as it does."
    short = flags(max_train_examples=640, max_eval_examples=9, epochs=6, checkpoint_minutes=0)
    given = ["run", *flags(task="cola", method="lora", data="demo", checkpoint=checkpoint, processes=2), *short,
             "--outputs", str(tmp_path/"outputs")]
    child = subprocess.Popen([*PROGRAM, *given], cwd=REPO, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("outputs/*/runs/*/checkpoint/state.pt")) and child.poll() is None: time.sleep(.05)
    (second,) = filter(is_second, descendants(child.pid))
    second.kill()
    _, err = child.communicate(timeout=200)
    line = err.strip().splitlines()[-1]
    assert child.returncode == 1 and f"process 1 (pid {second.pid}) was killed by SIGKILL" in line, err
    assert "the same command goes on" in line and "launch.log" in line
    code, out, err = command(*given[:-2])
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    assert read_result(folder)["provenance"]["resumed"] == 1
    check_tensorboard(folder)


def test_tensorboard(checkpoint, tmp_path):
    "Of a run that stops within an epoch."
    short = dict(n_epochs=2, max_steps=3, max_train_examples=64, max_eval_examples=9)
    config = RunConfig(task_name="cola", method="lora", checkpoint=str(checkpoint), data="demo", **short)
    check_tensorboard(*train([config], tmp_path))


def check_tensorboard(folder):
    "One entry in the list of runs; of each curve one point a step, as in the log; and the settings."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert [f.is_file() for f in (folder/"tensorboard").iterdir()].count(False) == 0
    events = EventAccumulator(str(folder/"tensorboard")).Reload()
    for tag in events.Tags()["scalars"]:
        logged = [m["step"] for m in read_metrics(folder) if tag in m and (tag != "epoch" or "loss" in m)]
        assert [e.step for e in events.Scalars(tag)] == logged, tag
    assert "epoch" in events.Tags()["scalars"] and "_hparams_/session_start_info" in events.summary_metadata


def is_second(process):
    try: return process.environ().get("RANK") == "1"
    except psutil.Error: return False
