"Runs that classify from the mean of the tokens: by command, interrupted, stacked, with cached layers."
import json
from unittest.mock import patch
import pytest
from conftest import QUICK, flags
from peft_study.config import RunConfig
from peft_study.runs import is_done, read_metrics, read_result
from peft_study.stack import stack_key, train_stack
from peft_study.train import evaluate_epoch, train

MEAN = dict(task_name="cola", data="demo", pooling="mean", max_train_examples=48, max_eval_examples=16, batch_size=8,
            n_epochs=3)
TASK = "--task cola --method lora".split()


def losses(folder): return [line["loss"] for line in read_metrics(folder) if "loss" in line]


def test_command(command, tmp_path):
    "One line of advice without it, none with it; `evaluate` finds the scores again."
    code, out, advised = command("run", *QUICK, *TASK)
    assert code == 0 and advised.count("pooling = mean") == 1, advised
    code, out, said = command("run", *QUICK, *TASK, *flags(pooling="mean"))
    assert code == 0 and "pooling = mean" not in said, said
    folder = tmp_path/"outputs/adhoc/runs"/out.split()[0]
    result = json.loads((folder/"result.json").read_text())
    assert result["parameters"] == pytest.approx(dict(trainable=74_498, total=22_639_874, share=74_498 / 22_639_874))
    code, out, _ = command("evaluate", folder, takes_outputs=False)
    assert f"{result['score']:.6f}" in out


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bad_input(command, method):
    code, out, said = command("run", *QUICK, *flags(task="cola", method=method, pooling="mean"), "--train-pooler")
    assert (code, said) == (2, "peft-study: train_pooler needs pooling 'model': a mean of tokens has no pooler\n")


@pytest.mark.parametrize("method", ["lora", "full", "prefix", "prompt"])
def test_interrupted(tiny, tmp_path, method):
    "A run that goes on has the losses and the scores of one that was left alone."
    config = RunConfig(**MEAN, checkpoint=str(tiny), method=method)
    def fails_later(config, state, *more):
        evaluate_epoch(config, state, *more)
        if state.at["epoch"] == 2: raise KeyboardInterrupt
    with patch.dict(train.__globals__, evaluate_epoch=fails_later), pytest.raises(KeyboardInterrupt):
        train([config], tmp_path/"twice")
    (again,), (whole,) = train([config], tmp_path/"twice"), train([config], tmp_path/"once")
    assert read_result(again)["provenance"]["resumed"] == 1
    assert losses(again) == losses(whole) and read_result(again)["dev"] == read_result(whole)["dev"]


@pytest.mark.parametrize("method", ["lora", "full", "ia3", "prompt"])
def test_stacked(tiny, tmp_path, method):
    configs = [RunConfig(**MEAN, checkpoint=str(tiny), method=method, lr=lr) for lr in (1e-3, 2e-3)]
    assert len({stack_key(config) for config in configs}) == 1
    together, alone = train_stack(configs, tmp_path/"together"), train(configs, tmp_path/"alone")
    for a, b in zip(together, alone):
        assert read_result(a)["provenance"]["stacked"] == 2 and "stacked" not in read_result(b)["provenance"]
        assert losses(a) == pytest.approx(losses(b), abs=1e-5)


def test_cached_layers(tmp_path, tiny):
    "Without dropout, the kept output of the lower layers, which is bf16, gives the losses of the whole model."
    from transformers import AutoConfig
    still = AutoConfig.from_pretrained(tiny)
    still.hidden_dropout_prob = still.attention_probs_dropout_prob = 0.
    still.save_pretrained(tmp_path/"still")
    for file in tiny.iterdir():
        if file.name != "config.json": (tmp_path/"still"/file.name).symlink_to(file)
    config = RunConfig(**MEAN, checkpoint=str(tmp_path/"still"), method="full", top_k=1, lr=1e-3)
    cached = RunConfig(**config.flat() | dict(cache_frozen=True))
    folders = train([config, cached], tmp_path/"outputs")
    assert all(map(is_done, folders))
    assert losses(folders[0]) == pytest.approx(losses(folders[1]), rel=1e-2)
