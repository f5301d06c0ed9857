"Processes that lose their GPU in the middle: their runs begin again in new ones."
import os
from unittest.mock import patch
from peft_study.run import stack
from peft_study.run.config import RunConfig, Study
from peft_study.run.runs import is_done, read_result
from peft_study.study import sweep

REAL, FULL = sweep._unit, "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmStridedBatchedEx`"

def unit(parent, env, folders, *args):
    "As of a sweep, on a GPU whose memory holds so many runs of a stack."
    with open(env["STARTS"], "a") as f: print(len(folders), file=f)
    most, start = int(env["HOLDS"]), stack.start_stack
    def full(*args, **kw): raise RuntimeError(FULL)
    def fits(configs, *args, **kw): return (start if len(configs) <= most else full)(configs, *args, **kw)
    lone = sweep.run_notebook if most else lambda config, *a, **k: sweep._try(config, sweep.run_folder(config, args[0]))
    with (patch.object(stack, "start_stack", fits), patch.object(sweep, "run_notebook", lone),
          patch.object(sweep, "_execute", sweep._execute if most else lost)): REAL(parent, env, folders, *args)

def lost(*args):
    from papermill import PapermillExecutionError
    raise PapermillExecutionError(0, 0, "", "AcceleratorError", "CUDA error: out of memory", [])

def run(tmp_path, tiny, ranks, holds):
    common = dict(task_name="cola", method="lora", checkpoint=str(tiny), data="demo", n_epochs=1, max_train_examples=32,
                  max_eval_examples=16, study="full")
    study = Study("full", tuple(RunConfig(rank=r, **common) for r in ranks))
    starts = tmp_path/"starts"
    with (patch.dict(os.environ, HOLDS=str(holds), STARTS=str(starts)), patch.object(sweep, "PAUSE", 0),
          patch.object(sweep, "_unit", unit)):
        done, failed = sweep.run_study(study, tmp_path, sweep.Local(tmp_path, stack=8))
    return done, failed, starts.read_text().split()

def test_a_stack_begins_again_in_halves(tmp_path, tiny):
    done, failed, starts = run(tmp_path, tiny, (1, 2, 3, 4), holds=2)
    assert not failed and all(map(is_done, done)) and starts == ["4", "2", "2"]
    assert [read_result(f)["provenance"]["stacked"] for f in done] == [2] * 4

def test_a_run_that_fails_so_again_and_again(tmp_path, tiny):
    _, (config,), starts = run(tmp_path, tiny, (1,), holds=0)
    error = (sweep.run_folder(config, tmp_path)/"error.txt").read_text()
    assert error.startswith("AcceleratorError: CUDA error: out of memory") and starts == ["1"] * sweep.ALONE
