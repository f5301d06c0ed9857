"Studies that are killed, crowded, or run out of disk or memory: every run once, nothing finished lost, the same bits."
import json, os, random, resource, signal, sys, time
import psutil, pytest
from conftest import descendants, findings, flags, kill_tree
from peft_study.run.runs import lock_folder
from peft_study.study.sweep import noticing_interrupts


def results(folder): return {f.parent.name: f.stat().st_mtime_ns for f in folder.glob("eight/runs/*/result.json")}


def progress(folder):
    if not folder.exists(): return 0
    return sum(len(f.read_bytes()) for f in folder.glob("eight/runs/*/metrics.jsonl"))


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_again_and_again(study, undisturbed, kills):
    "Every third kill at any moment of the start, the others up to a second and a half after the first sign of work."
    rng, folder, seen = random.Random(0), study.folder/f"killed{kills}", {}
    for kill in range(kills):
        before, child = progress(folder), study(folder.name, "--jobs", "2")
        end = time.time() + (rng.uniform(0, 8) if kill % 3 == 0 else 120)
        while time.time() < end and progress(folder) == before: time.sleep(.02)
        if kill % 3: time.sleep(rng.uniform(0, 1.5))
        assert child.poll() is None, "the study ended before it was killed so often"
        kill_tree(child)
        now = results(folder)
        assert all(now[name] == t for name, t in seen.items()), "a finished run was done again"
        seen = now
    child = study(folder.name, "--jobs", "2")
    out, _ = child.communicate()
    assert child.returncode == 0, out
    assert findings(folder) == undisturbed
    found = [json.loads(f.read_text()) for f in folder.glob("eight/runs/*/result.json")]
    resumed = sum(bool(result["provenance"]["resumed"]) for result in found)
    print(f"after {kills} kills {len(seen)} of 8 runs were finished; {resumed} went on from a checkpoint")
    assert resumed >= 2
    assert not list(folder.glob("eight/runs/*/checkpoint")) and not list(folder.glob("eight/runs/*/.*.tmp"))


def kill_a_trainer(folder) -> bool:
    "Kill the first kernel that has trained and is not finished; whether there was one."
    for lock in folder.glob("eight/runs/*/.train.lock"):
        pid = lock.read_text().split(" ")[0]
        trains = (lock.parent/"metrics.jsonl").exists() and not (lock.parent/"result.json").exists()
        if not trains or not pid: continue
        try: psutil.Process(int(pid)).kill()
        except psutil.NoSuchProcess: continue
        return True
    return False


def test_kernels_killed_and_sweeps_crowding(study, undisturbed):
    "Two sweeps on one folder, one kernel killed alone: every run ends once, and as it should."
    folder = study.folder/"crowded"
    children = [study("crowded") for _ in range(2)]
    killed = False
    while any(c.poll() is None for c in children):
        if not killed: killed = kill_a_trainer(folder)
        time.sleep(.05)
    outs = [c.communicate()[0] for c in children]
    assert killed and [c.returncode for c in children] == [0, 0], outs
    assert findings(folder) == undisturbed
    trained = [line.split()[1] for out in outs for line in out.splitlines() if "score" in line and "/8" in line]
    assert sorted(trained) == sorted(undisturbed)


def test_kernels_die_with_their_sweep(study):
    child = study("gone")
    while not list(study.folder.glob("gone/eight/runs/*/metrics.jsonl")):
        time.sleep(.1)
        assert child.poll() is None
    processes = descendants(child.pid)
    assert len(processes) >= 4   # the sweep, the fork server, the run, its kernel
    child.kill()
    child.communicate()
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_no_interrupt_is_lost(monkeypatch):
    "A Ctrl-C that falls into a destructor, where Python drops exceptions."
    class Destroyed:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(.01)
    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    with noticing_interrupts() as check:
        check()
        Destroyed()
        with pytest.raises(KeyboardInterrupt): check()
    assert [type(d.exc_value) for d in dropped] == [KeyboardInterrupt]


def test_interrupted(study):
    "Ctrl-C: one line, code 130, no process left; what is finished is in results.csv."
    child = study("interrupted")
    while not results(study.folder/"interrupted"):
        time.sleep(.05)
        assert child.poll() is None
    processes = descendants(child.pid)
    os.killpg(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and out.strip().splitlines()[-1].startswith("peft-study: interrupted"), out
    gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert "done" in (study.folder/"interrupted/eight/results.csv").read_text()


def run_of(tiny, **more):
    short = dict(max_train_examples=96, max_eval_examples=20, epochs=2)
    return ["run", *flags(**dict(task="cola", method="lora", checkpoint=tiny, data="demo") | short | more)]


def the_run(outputs): return next((outputs/"adhoc/runs").iterdir())


def test_in_use(command, tiny, tmp_path):
    "A run that another process trains is waited for, and then its process is named."
    assert command(*run_of(tiny))[0] == 0
    folder = the_run(tmp_path/"outputs")
    (folder/"result.json").unlink()
    with lock_folder(folder, "notebook"):
        code, out, err = command(*run_of(tiny))
    assert code == 2 and f"{folder.name} is being run by process {os.getpid()} on" in err
    assert len(err.strip().splitlines()) == 1


def test_damaged_files(command, tiny, tmp_path):
    """A corrupted result, a truncated checkpoint, a lock and half-written files that a crash left: the run is done
    again, with the same bytes."""
    assert command(*run_of(tiny))[0] == 0
    folder = the_run(tmp_path/"outputs")
    weights = (folder/"adapter/adapter_model.safetensors").read_bytes()
    (folder/"result.json").write_text('{"score": 0.8, "de')
    (folder/"checkpoint").mkdir()
    (folder/"checkpoint/state.pt").write_bytes(b"PK" * 100)
    (folder/".train.lock").write_text("999999 on elsewhere")
    (folder/".result.json.77.tmp").write_text("{")
    assert "unfinished" in command("list")[1]
    code, out, err = command(*run_of(tiny))
    assert code == 0 and (folder/"adapter/adapter_model.safetensors").read_bytes() == weights
    assert "state.pt is damaged: the run begins again" in (folder/"notebook.ipynb").read_text()
    assert not (folder/"checkpoint").exists() and not (folder/".result.json.77.tmp").exists()


def test_disk_full(command, tiny, tmp_path):
    """No file may grow beyond 100 kB, as on a full disk: a message that says so, no result; with room, the run ends
    as it should."""
    def limit(): resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    full = run_of(tiny, method="full")
    code, out, err = command(*full, preexec_fn=limit)
    folder = the_run(tmp_path/"outputs")
    assert code == 1 and "File too large" in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert not (folder/"result.json").exists() and not list(folder.glob("**/*.tmp"))
    assert command(*full)[0] == 0 and (folder/"result.json").exists()


HUNGRY = """
import torch
from peft_study.methods.lora import LoRA
class Hungry(LoRA):
    "Runs out of memory on batches of more than 10."
    def inject(self, model, sites):
        def eat(module, args, kwargs):
            too_many = module.training and kwargs["input_ids"].shape[0] > 10
            if too_many: raise torch.OutOfMemoryError("out of memory, said the test")
        model.register_forward_pre_hook(eat, with_kwargs=True)
        return super().inject(model, sites)
"""


def test_out_of_memory(command, tiny, tmp_path):
    (tmp_path/"hungry.py").write_text(HUNGRY)
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    code, out, err = command(*run_of(tiny, method="hungry:Hungry"), env=env)
    assert code == 0, err
    folder = the_run(tmp_path/"outputs")
    assert json.loads((folder/"result.json").read_text())["cost"]["batch_parts"] == 4
    assert "again from the start, with each batch in 4 micro-batches" in (folder/"notebook.ipynb").read_text()
