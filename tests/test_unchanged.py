"""What a change of the code's form leaves as it is: run ids, trainable parameters, and the losses of short runs.
Runs with nothing but defaults are in test_identity."""
import pytest, torch
from test_identity import id_but_for_data
from peft_study.run.config import RunConfig
from peft_study.encoders import ROLES, tiny_config
from peft_study.methods.core import apply_method, count
from peft_study.run.runs import read_metrics
from peft_study.run.train import train
from transformers import AutoModelForSequenceClassification

# Run id → trainable parameters on a tiny BERT of three classes, and the settings.
RUNS = {
    "cola-full-k1-s0-c86eb74e": (2547, dict(method="full", top_k=1)),
    "cola-adapter-m4-s0-a7283d00": (347, dict(method="adapter", bottleneck_size=4, placement="pfeiffer")),
    "cola-adapter-m4-s0-2fc55899": (347, dict(method="adapter", bottleneck_size=4, placement="parallel",
                                              nonlinearity="relu", init="framework")),
    "cola-lora-r2-s0-9718461b": (947, dict(method="lora", rank=2, alpha=4, targets=ROLES)),
    "cola-lora-r2-s0-e5b5e891": (371, dict(method="lora", rank=2, dora=True, lora_plus=4)),
    "cola-lora-r4-s0-13cacdf6": (563, dict(method="lora", rank=4, rslora=True, lora_dropout=.1)),
    "cola-prefix-n3-s0-4cb10943": (243, dict(method="prefix", prefix_length=3)),
    "cola-prefix-n3-s0-41838aa6": (487, dict(method="prefix", prefix_length=3, reparam=4)),
    "cola-prompt-n3-s0-0cb51f70": (99, dict(method="prompt", prompt_length=3, read="first")),
    "cola-ia3-all-s3-9b67dc35": (179, dict(method="ia3", lr=1e-2, seed=3)),
    "cola-bitfit-all-s0-811d12d1": (355, dict(method="bitfit", train_pooler=True, tune_share=.1, keep="best")),
    "cola-hf_lora-r2-s0-5b26b4d3": (307, dict(method="hf_lora", rank=2, precision="bf16")),
    "cola-layernorm-all-s0-d59ed55d": (211, dict(method="layernorm", n_epochs=5, batch_size=16, betas=(.9, .98))),
    "cola-head-all-s0-326322ee": (51, dict(method="head", checkpoint="minilm", max_train_examples=100))}


@pytest.mark.parametrize("run_id", RUNS)
def test_run_id_and_parameters(run_id):
    parameters, settings = RUNS[run_id]
    config = RunConfig(task_name="cola", data="demo", **settings)
    assert id_but_for_data(config) == run_id
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    assert count(apply_method(model, config.method))["trainable"] == parameters


# Losses of six steps in fp32 with one thread. On another processor the last bits differ, by some 1e-6;
# another order of examples, dropout mask or initial value changes a loss by 1e-2.
LOSSES = {
    "lora": (dict(task_name="sst2", method="lora", rank=4, lora_dropout=.1),
             [.70031780, .69488877, .71800745, .70115447, .72166878, .64081770]),
    "adapter": (dict(task_name="sst2", method="adapter", bottleneck_size=8),
                [.69802886, .70084095, .71068913, .67472975, .71275055, .64235401]),
    "reparametrised prefix": (dict(task_name="rte", method="prefix", reparam=8),
                              [.69072866, 1.4218025, .92927223, .77328181, .75550856, .88260198]),
    "cached layers": (dict(task_name="cola", method="full", top_k=2, cache_frozen=True, max_steps=9),
                      [.69634300, .68546879, .69455636, .68164015, .68980730, .67170262])}
SMALL = dict(checkpoint="minilm", data="demo", train_pooler=True, max_train_examples=40, max_eval_examples=16,
             batch_size=8, n_epochs=2, max_steps=6)


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, tmp_path, one_thread):
    settings, expected = LOSSES[name]
    folder, = train([RunConfig(**SMALL | settings)], tmp_path)
    losses = [line["loss"] for line in read_metrics(folder) if "loss" in line]
    assert losses[:6] == pytest.approx(expected, rel=1e-4)
