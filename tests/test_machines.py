"GPUs, drivers, file systems and schedulers that are not at hand: stand-ins that behave as theirs do."
import errno, fcntl, json, math, os, subprocess, sys
from contextlib import ExitStack
from unittest.mock import patch
import numpy as np, pytest, torch
from conftest import REPO, flags
from peft_study.run import runs, train
from peft_study.study import sweep
from peft_study.tasks.glue import BadInput, METRICS, get_task, score
from peft_study.run.runs import cores, lock_folder, lock_owner, provenance
from peft_study.run.speed import speed_up

# --- scores


@pytest.mark.parametrize("value", [2.5, 2.703, .1, 3.3, 1e-30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_has_no_correlation(value, dtype):
    labels = np.random.default_rng(0).uniform(0, 5, 1500)
    neighbour = np.nextafter(np.float32(value), np.float32(9))
    rounded = np.where(np.arange(1500) % 64 < 9, np.float32(value), neighbour)
    for p in (np.full(1500, value, dtype), rounded):
        assert score(get_task("stsb"), p, labels) == dict(pearson=0., spearman=0., score=0.)
        for metric in ("pearson", "spearman"):
            along = METRICS[metric].along(np.stack([p, labels]), labels[None])
            assert along.tolist() == [0., pytest.approx(1)]
    matthews, ones, halves = METRICS["matthews"], np.ones(9, int), np.arange(9) % 2
    assert matthews(ones, halves) == matthews.along(ones, halves) == 0


def test_not_a_number_has_no_score():
    for bad in (math.nan, math.inf):
        with pytest.raises(FloatingPointError, match="STS-B: 1 of 3 predictions are not finite"):
            score(get_task("stsb"), [1., bad, 2.], [1., 2., 3.])


NAN = """
import torch
from pydantic import Field
from peft_study.methods.lora import LoRA
class Fragile(LoRA):
    "Its outputs are no numbers any more as soon as it is evaluated."
    def inject(self, model, sites):
        def spoil(module, args, out): out.logits = out.logits * (float("nan") if not module.training else 1)
        model.register_forward_hook(spoil)
        return super().inject(model, sites)
"""


def test_outputs_that_are_no_numbers_fail_the_run(command, tiny, tmp_path):
    "Also where another process finds it."
    (tmp_path/"fragile.py").write_text(NAN)
    short = flags(max_train_examples=32, max_eval_examples=8, epochs=1, processes=2)
    given = flags(task="cola", method="fragile:Fragile", checkpoint=tiny, data="demo")
    env = os.environ | dict(PYTHONPATH=f"{tmp_path}:{REPO}")
    code, out, err = command("run", *given, *short, env=env)
    assert code == 1 and "the model's outputs are not finite for 8 of 8 examples" in err, err
    assert "Traceback" not in err, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    assert not (folder/"result.json").exists() and sweep.diverged(folder)


# --- a processor without bf16


@pytest.mark.parametrize("hardware", [True, False])
def test_products_of_bf16(tiny, hardware):
    "Where bf16 has no hardware, and there alone, linear layers multiply rounded numbers in fp32."
    from peft_study.run.config import RunConfig
    from peft_study.run.model import build_model
    model = build_model(RunConfig(task_name="cola", method="lora", checkpoint=str(tiny)))
    with patch("peft_study.run.speed.bf16_hardware", lambda: hardware): speed_up(model, "bf16", torch.device("cpu"))
    layer = model.bert.encoder.layer[0].intermediate.dense
    with patch("torch.nn.functional.linear", wraps=torch.nn.functional.linear) as product, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16): out = layer(torch.randn(4, 32))
    assert product.call_args.args[0].dtype == torch.float32 and out.dtype == torch.bfloat16
    assert (product.call_args.args[1].dtype == torch.float32) == (not hardware)   # frozen weights are stored in bf16


# --- what other jobs have left in the environment


LEFT_OVER = dict(
    WORLD_SIZE="2", RANK="1", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="10.255.255.1", MASTER_PORT="29500",
    TORCHELASTIC_RUN_ID="x", ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4", ACCELERATE_MIXED_PRECISION="fp8",
    ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_FSDP="true", ACCELERATE_DYNAMO_BACKEND="INDUCTOR",
    ACCELERATE_USE_CPU="true", ACCELERATE_TORCH_DEVICE="meta", ACCELERATE_USE_MEGATRON_LM="true",
    ACCELERATE_USE_PARALLELISM_CONFIG="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true", PET_NNODES="2",
    PET_NPROC_PER_NODE="8", PMI_SIZE="4", OMPI_COMM_WORLD_SIZE="4", FORK_LAUNCHED="1")

TRAIN = """
import sys
from peft_study.run.config import RunConfig
from peft_study.run.train import train
short = dict(max_train_examples=64, max_eval_examples=8, n_epochs=1)
config = RunConfig(task_name="cola", method="lora", data="demo", checkpoint=sys.argv[1], **short)
train([config], sys.argv[2], processes=int(sys.argv[3]))
"""


def test_leftovers_change_nothing(tiny, tmp_path):
    "Runs in one process have the same bytes; a run in two has its own two, and neither waits for others."
    found = []
    for name, more, processes in (("clean", {}, 1), ("left", LEFT_OVER, 1), ("two", LEFT_OVER, 2)):
        command = [sys.executable, "-c", TRAIN, str(tiny), str(tmp_path/name), str(processes)]
        done = subprocess.run(command, env=os.environ | more, capture_output=True, text=True, cwd=REPO, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = (tmp_path/name/"adhoc/runs").iterdir()
        assert json.loads((folder/"result.json").read_text())["provenance"]["processes"] == processes
        found.append((folder/"adapter/adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]


# --- locks


def test_lock_on_nfs(tmp_path):
    """NFSv4 makes byte-range locks of flock: one's own needs a file open for writing, a shared one a file open for
    reading."""
    real = fcntl.flock
    def flock(f, operation):
        mode = fcntl.fcntl(f, fcntl.F_GETFL) & os.O_ACCMODE
        needs_other = {fcntl.LOCK_EX: os.O_RDONLY, fcntl.LOCK_SH: os.O_WRONLY}
        if any(operation & lock and mode == other for lock, other in needs_other.items()):
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real(f, operation)
    with patch("fcntl.flock", flock):
        assert lock_owner(tmp_path) is None
        with lock_folder(tmp_path): assert lock_owner(tmp_path).startswith(f"{os.getpid()} on ")
        assert lock_owner(tmp_path) is None
        with lock_folder(tmp_path):
            (tmp_path/".train.lock").write_text("")   # a moment before it is told who holds it
            assert lock_owner(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_system_without_locks(tmp_path, number):
    (tmp_path/".train.lock").touch()
    with patch("fcntl.flock", side_effect=OSError(number, os.strerror(number))):
        for f in (lambda: lock_folder(tmp_path).__enter__(), lambda: lock_owner(tmp_path)):
            with pytest.raises(BadInput, match=f"has no locks .{os.strerror(number)}.*--outputs"): f()


# --- memory


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), MemoryError(),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
    RuntimeError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"), "[rank1]: torch.AcceleratorError: CUDA error: out of memory",
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(float))], ids=str)
def test_words_for_out_of_memory(error): assert train.is_out_of_memory(error)


def test_other_words():
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    for error in (illegal, OSError(errno.ENOSPC, "No space left on device"), ValueError("parts")):
        assert not train.is_out_of_memory(error)


@pytest.mark.parametrize("free, ours, tried", [(5, 70, [1, 2]), (5, 10, [1, 1])], ids=["mine", "a-neighbour's"])
def test_a_neighbours_memory(tmp_path, free, ours, tried):
    "80 GB of memory: where this process has all that is taken, batches are halved; else the same is tried once more."
    calls = []
    def attempt(parts):
        calls.append(parts)
        if len(calls) == 1: raise torch.OutOfMemoryError("CUDA out of memory")
    with ExitStack() as stack:
        gpu = dict(is_available=True, is_initialized=True, empty_cache=None)
        gpu |= dict(mem_get_info=(free, 80), memory_reserved=ours)
        for name, value in gpu.items():
            stack.enter_context(patch(f"torch.cuda.{name}", lambda *a, value=value: value))
        train.with_less_memory(attempt, tmp_path, 32, pause=0)
    assert calls == tried


# --- GPUs


def test_more_processes_than_gpus():
    for gpus, processes in ((0, 4), (4, 4)):
        with patch("torch.cuda.device_count", lambda: gpus): train.check_processes(processes)
    too_many = pytest.raises(BadInput, match="processes must be at most the number of GPUs, 2, got 4")
    with patch("torch.cuda.device_count", lambda: 2), too_many: train.train([], processes=4)


@pytest.mark.parametrize("gpus", [0, 2])
def test_torchrun_starts_the_processes(tmp_path, gpus):
    "On GPUs as on a processor, with what accelerate needs to know and nothing that was left over."
    started = {}
    class Child:
        returncode = 1
        def __init__(self, command, env, **kw): started.update(command=command, env=env)
        def poll(self): return 1
        def terminate(self): pass
    with (patch("subprocess.Popen", Child), patch("torch.cuda.device_count", lambda: gpus),
          patch.dict(os.environ, LEFT_OVER), pytest.raises(RuntimeError, match="training in 2 processes failed")):
        train.launch(tmp_path, 2, print)
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--local-addr", "127.0.0.1"]
    assert started["command"][2:8] == launcher
    assert LEFT_OVER.keys() & started["env"].keys() == (set() if gpus else {"ACCELERATE_USE_CPU"})


def test_buffers_are_not_broadcast(tmp_path):
    stopped = patch("accelerate.Accelerator", side_effect=KeyboardInterrupt)
    with stopped as accelerator, pytest.raises(KeyboardInterrupt):
        train.run(train.RunConfig(task_name="cola", method="lora"), tmp_path, print)
    (ddp,) = accelerator.call_args.kwargs["kwargs_handlers"]
    assert ddp.to_kwargs() == dict(broadcast_buffers=False)


@pytest.fixture
def cuda_switches():
    matmul, sdp = torch.backends.cuda.matmul.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cuda.enable_cudnn_sdp(sdp)


def test_precision_is_what_it_says(cuda_switches):
    torch.backends.cuda.enable_cudnn_sdp(True)
    for precision in ("tf32", "fp32", "bf16"):
        speed_up(torch.nn.Linear(2, 2), precision, torch.device("cuda"))
        assert torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_tf32_needs_its_hardware(command, tiny, tmp_path):
    given = flags(task="cola", method="lora", data="demo", checkpoint=tiny, precision="tf32")
    code, out, err = command("run", *given)
    assert code == 2 and "precision 'tf32' needs an NVIDIA GPU" in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path/"outputs").exists()
    config = {p: train.RunConfig(task_name="cola", method="lora", precision=p) for p in ("fp32", "tf32")}
    assert config["fp32"].run_id != config["tf32"].run_id


WHOLE = "GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)\nGPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4c7b1f54)\n"
PARTS = ("GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6)\n"
         "  MIG 3g.20gb     Device  0: (UUID: MIG-7089d0f3)\n"
         "  MIG 3g.20gb     Device  1: (UUID: MIG-56c30729)\n"
         "GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-4c7b1f54)\n")


@pytest.fixture
def nvidia(monkeypatch):
    "A machine with these GPUs, and a torch that can use them."
    def machine(listed, cuda="12.8", init=lambda: None, visible=None):
        sweep.gpu_trouble.cache_clear()
        monkeypatch.setattr(sweep, "nvidia_smi", lambda *args: listed)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "init", init)
        if visible is None: monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else: monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    yield machine
    sweep.gpu_trouble.cache_clear()


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040)."

def old_driver(): raise RuntimeError(f"{TOO_OLD}\nPlease update")


@pytest.mark.parametrize("machine, devices, trouble", [
    (dict(listed=WHOLE), ["GPU-5d5ba0d6", "GPU-4c7b1f54"], None),
    (dict(listed=PARTS), ["MIG-7089d0f3", "MIG-56c30729", "GPU-4c7b1f54"], None),
    (dict(listed=WHOLE, visible="1"), ["1"], None),
    (dict(listed=WHOLE, visible="", cuda=None), ["cpu"], None),
    (dict(listed="", cuda=None), ["cpu"], None),
    (dict(listed="", visible="0,1"), ["cpu"], None),
    (dict(listed=WHOLE, cuda=None), ["cpu"], "is built without CUDA"),
    (dict(listed=WHOLE, visible="0,1", cuda=None), ["cpu"], "is built without CUDA"),
    (dict(listed=WHOLE, init=old_driver), ["cpu"], f"which torch cannot use: {TOO_OLD}")],
    ids=["whole", "mig", "chosen", "none-wanted", "none", "left-over", "cpu-build", "cpu-build-chosen", "old-driver"])
def test_devices(nvidia, machine, devices, trouble):
    nvidia(**machine)
    assert sweep.devices() == devices
    assert trouble in sweep.gpu_trouble() if trouble else sweep.gpu_trouble() is None


def test_doctor_survives_an_old_driver(nvidia, monkeypatch, capsys):
    from peft_study import cli
    nvidia(WHOLE, init=old_driver)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: old_driver())
    monkeypatch.setattr(runs, "nvidia_smi", lambda *args: "470.57.02\n470.57.02\n")
    cli.doctor()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    rows = dict(line for line in lines if len(line) == 2)
    assert rows["cuda"] == "12.8" and rows["driver"] == "470.57.02" and "build" in rows and "cudnn" in rows
    assert rows["GPUs"] == f"cannot be used: {TOO_OLD}"


def test_cpu_build_on_a_gpu_machine_warns(nvidia, capsys):
    from peft_study import cli
    for cuda in (None, "12.8"):
        nvidia(WHOLE, cuda=cuda)
        cli.warn_of_gpus()
    without_cuda = f"torch {torch.__version__} is built without CUDA"
    assert capsys.readouterr().err.startswith(f"peft-study: warning: this machine has GPUs, but {without_cuda}")
    assert not capsys.readouterr().err


def test_provenance_of_a_gpu(monkeypatch):
    monkeypatch.setattr(runs, "nvidia_smi", lambda *args: "560.35.03\n")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "NVIDIA H100")
    config = train.RunConfig(task_name="cola", method="head", data="demo")
    found = provenance(config, "cuda")["versions"]
    assert (found["cuda"], found["cudnn"], found["driver"]) == ("12.8", 91002, "560.35.03")
    assert not {"cuda", "cudnn", "driver"} & provenance(config)["versions"].keys()


def test_cores_of_this_process():
    assert cores() == len(os.sched_getaffinity(0))
    with (patch("os.sched_getaffinity", lambda pid: {3, 5}), patch("os.cpu_count", lambda: 64),
          patch.dict(os.environ, CUDA_VISIBLE_DEVICES="")):
        assert cores() == 2
        with patch.dict(os.environ):
            os.environ.pop("OMP_NUM_THREADS", None)
            assert sweep.Local(jobs=2).env["OMP_NUM_THREADS"] == "1"
