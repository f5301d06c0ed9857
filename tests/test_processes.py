"Two processes on a CPU give what one gives."
import os, subprocess, sys
import pytest
from conftest import REPO, flags
from peft_study.config import RunConfig
from peft_study.data import minilm_folder
from peft_study.runs import read_metrics, read_result, start_run


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
        command = [*launcher, "-m", "peft_study.train", str(folder), str(os.getpid()), "1", "10"]
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
    code, out, err = command("run", *given, *short, timeout=300)
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    result = read_result(folder)
    assert result["provenance"]["processes"] == 2 and result["steps"] == 4
