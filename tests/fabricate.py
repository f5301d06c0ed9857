"Run folders as training leaves them, with results that are made up: for tests of what is said about runs."
import json
from types import SimpleNamespace
import numpy as np
from peft_study.run.config import RunConfig
from peft_study.tasks.glue import TRAIN_ROWS, get_task, score
from peft_study.methods.core import expected_parameters
from peft_study.run.runs import start_run

EXAMPLES = 300
SHAPES = {"minilm": (384, 6, 22_713_216), "bert-base-uncased": (768, 12, 109_482_240)}   # width, layers, parameters


def predictions(task, accuracy, seed, n=EXAMPLES):
    "Answers of that accuracy, or correlation, and the labels, which are the same for all seeds."
    mine = np.random.default_rng([seed, round(1e6 * accuracy)])
    shared = np.random.default_rng(get_task(task).title.encode()[0])
    if get_task(task).regression:
        y = shared.uniform(0, 5, n).round(3)
        return (accuracy * y + (1 - accuracy) * mine.uniform(0, 5, n)).round(3), y
    y = shared.integers(0, len(get_task(task).labels), n)
    return np.where(mine.random(n) < accuracy, y, (y + 1) % len(get_task(task).labels)), y


def parameters(config) -> dict:
    "By formula, on the encoders of `SHAPES`."
    hidden, layers, body = SHAPES.get(config.checkpoint, SHAPES["bert-base-uncased"])
    n_outputs = get_task(config.task_name).n_outputs
    encoder = SimpleNamespace(model_type="bert", hidden_size=hidden, num_hidden_layers=layers,
                              intermediate_size=4 * hidden, num_labels=n_outputs)
    total = body + n_outputs * (hidden + 1)
    trainable = expected_parameters(config.method, encoder, config.train_pooler) or total
    return dict(trainable=trainable, total=total, share=trainable / total)


def write_predictions(folder, task, p, y):
    def word(value): return f"{value:.3f}" if task.regression else task.words[value]
    lines = [f"{i}\t{word(a)}\t{word(b)}" for i, (a, b) in enumerate(zip(p, y))]
    (folder/"predictions").mkdir(exist_ok=True)
    (folder/"predictions/dev.tsv").write_text("\n".join(["index\tprediction\tlabel", *lines]) + "\n")


def write_log(folder, config, reached):
    "Ten losses an epoch that fall, and a dev score that rises to the one that is reached."
    steps = [dict(step=i, epoch=i / 10, loss=1 / (1 + i / 10)) for i in range(1, 10 * config.n_epochs + 1)]
    dev = [dict(step=10 * e, epoch=e, dev_score=reached * (1 - .1 / e)) for e in range(1, config.n_epochs + 1)]
    (folder/"metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in steps + dev))


def run_folder(outputs, accuracy, tune=None, error=None, **settings):
    "A finished run with these settings, or one that failed with `error`; `tune` is its score on the tuning split."
    config = RunConfig(**dict(study="made_up", task_name="rte") | settings)
    folder = start_run(config, outputs)
    if error:
        (folder/"error.txt").write_text(error + "\n")
        return folder
    task = get_task(config.task_name)
    p, y = predictions(config.task_name, accuracy, config.seed)
    found = score(task, p, y) | dict(epoch=3)
    write_predictions(folder, task, p, y)
    write_log(folder, config, found["score"])
    (folder/"notebook.ipynb").write_text("{}")
    scores, examples = dict(dev=dict(last=found, best=found)), dict(train=TRAIN_ROWS[task.name], dev=EXAMPLES)
    if tune is not None:
        on_tune = {k: tune for k in (*task.metrics, "score")} | dict(epoch=3)
        better = found | dict(score=found["score"] + .01)
        scores = dict(tune=dict(last=on_tune, best=on_tune), dev=dict(last=found, best=better, chosen=found))
        examples |= dict(tune=TRAIN_ROWS[task.name] // 10, train=TRAIN_ROWS[task.name] - TRAIN_ROWS[task.name] // 10)
    count = parameters(config)
    cost = dict(train_seconds=9., examples_per_second=90., tokens_per_second=900., padding_share=.1,
                peak_memory_bytes=10**9, adapter_bytes=4 * count["trainable"])
    made = dict(finished="2026-01-01T00:00:00+00:00", commit="0123abcd4567", code="ab",
                data_fingerprint=f"{config.task_name}-{config.data}")
    result = dict(run_id=config.run_id, examples=examples, size=config.method.size, config=config.flat(),
                  score=found["score"], **scores, parameters=count, steps=30, cost=cost, provenance=made)
    (folder/"result.json").write_text(json.dumps(result))
    return folder


def final_seeds(outputs, seeds, study="made_up"):
    (outputs/study/"study.json").write_text(json.dumps(dict(name=study, seeds=[0], final_seeds=seeds)))
