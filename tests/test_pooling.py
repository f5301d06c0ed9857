"""Runs that classify from the mean of the tokens: by command, interrupted, stacked, with cached layers; and what leaves
of them: a folder that sentence-transformers loads, and that does what its card says."""
import json, re
from types import SimpleNamespace
from unittest.mock import patch
import pytest, torch
from conftest import QUICK, flags
from peft_study.run.config import RunConfig
from peft_study.tasks.data import load_tokenizer, minilm_folder
from peft_study.encoders import FAMILIES, tiny_config
from peft_study.share.exchange import save_embedder
from peft_study.methods.core import apply_method, find_method, method_names, save_adapter, trainable
from peft_study.run.model import mean_pooled_
from peft_study.run.predict import load_run
from peft_study.run.runs import is_done, read_metrics, read_result
from peft_study.run.stack import stack_key, train_stack
from peft_study.run.train import evaluate_epoch, train

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
        if state.progress["epoch"] == 2: raise KeyboardInterrupt
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


TEXTS = ["A man eats.", "Nobody is at home, and the door is shut.", "word " * 300]


def logits_of(model, *columns):
    how = dict(padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad(): return model.eval()(**load_tokenizer("minilm")(*columns, **how)).logits


def changed(model):
    "With trained values that are not those of the start."
    torch.manual_seed(1)
    for p in trainable(model).values(): torch.nn.init.normal_(p, std=.1)
    return model


@pytest.fixture(scope="module", params=["sst2", "rte"])
def run_folder(request, tmp_path_factory):
    "A finished run of LoRA, on texts and on pairs."
    settings = MEAN | dict(task_name=request.param, n_epochs=1, lr=5e-3)
    config = RunConfig(**settings, checkpoint="minilm", method="lora")
    folder, = train([config], tmp_path_factory.mktemp("outputs"))
    return folder


@pytest.mark.parametrize("form", [[], ["--peft"]], ids=["merged", "peft"])
def test_card(command, run_folder, tmp_path, form):
    "Each block of code in the card gives the run's own logits."
    code, out, err = command("export", run_folder, "--to", tmp_path/"out", *form, takes_outputs=False)
    assert code == 0 and "load it with sentence_transformers.SentenceTransformer" in out, err
    model, config = load_run(run_folder)
    card = (tmp_path/"out/README.md").read_text()
    blocks = re.findall("```python\n(.*?)\n```", card, re.DOTALL)
    columns = TEXTS[:1] if config.task_name == "sst2" else TEXTS[:2]
    expected = logits_of(model, *columns)
    assert len(blocks) == 2 and "untrained" in card and str(tmp_path) not in card
    for block in blocks:
        for text in columns: block = block.replace('"…"', json.dumps(text), 1)
        block = block.replace("FOLDER", str(tmp_path/"out"))
        found = {}
        exec(block.replace("sentence-transformers/all-MiniLM-L6-v2", minilm_folder()), found)
        torch.testing.assert_close(torch.as_tensor(found["logits"]), expected, rtol=1e-5, atol=1e-5)


def test_exported_encoder(command, run_folder, tmp_path):
    "It is a checkpoint again, of an encoder that was trained for means."
    command("export", run_folder, "--to", tmp_path/"out", takes_outputs=False)
    code, out, said = command("run", *QUICK, *TASK, *flags(checkpoint=tmp_path/"out", pooling="mean"))
    assert code == 0 and not said, said
    assert command("run", *QUICK, *TASK, *flags(checkpoint=tmp_path/"out"))[2].count("pooling = mean") == 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_family(kind, tmp_path):
    "sentence-transformers gives the logits of each family's classifier of means, of texts and of pairs."
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForSequenceClassification
    tokenizer, config = load_tokenizer("minilm"), tiny_config(kind)
    config.vocab_size, config.max_position_embeddings, config.type_vocab_size = len(tokenizer), 160, 2
    torch.manual_seed(0)
    model = mean_pooled_(AutoModelForSequenceClassification.from_config(config)).eval()
    pairs = list(zip(TEXTS, reversed(TEXTS)))
    expected = logits_of(model, TEXTS), logits_of(model, TEXTS, TEXTS[::-1])
    save_embedder(model, SimpleNamespace(max_length=128), tmp_path)
    tokenizer.save_pretrained(tmp_path)
    embedder = SentenceTransformer(str(tmp_path))
    for texts, logits in zip((TEXTS, pairs), expected):
        torch.testing.assert_close(torch.as_tensor(embedder.encode(texts)), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", method_names())
def test_adapter_folder(tmp_path, name):
    "It does not claim to be one of a classifier of 🤗 peft's, on which it would have other logits."
    from transformers import AutoModelForSequenceClassification
    method = find_method(name)(**dict(adapter=dict(bottleneck_size=4), prompt=dict(read="first")).get(name, {}))
    model = mean_pooled_(AutoModelForSequenceClassification.from_config(tiny_config("bert")))
    save_adapter(changed(apply_method(model, method)), method, tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_model.safetensors", "run.json"}
    assert json.loads((tmp_path/"run.json").read_text())["pooling"] == "mean"
