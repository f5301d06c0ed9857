"Run folders as training leaves them, with results that are made up: for tests of what is said about runs."
import json
import numpy as np
from peft_study.config import RunConfig
from peft_study.glue import TASKS, score
from peft_study.runs import start_run

EXAMPLES = 300


def predictions(task, accuracy, seed, n=EXAMPLES):
    "Answers of that accuracy, or correlation, and the labels, which are the same for all seeds."
    mine, shared = np.random.default_rng([seed, round(1e6 * accuracy)]), np.random.default_rng(TASKS[task].title.encode()[0])
    if TASKS[task].regression:
        y = shared.uniform(0, 5, n).round(3)
        return (accuracy * y + (1 - accuracy) * mine.uniform(0, 5, n)).round(3), y
    y = shared.integers(0, len(TASKS[task].labels), n)
    return np.where(mine.random(n) < accuracy, y, (y + 1) % len(TASKS[task].labels)), y


def run_folder(outputs, accuracy, tune=None, error=None, **settings):
    "A finished run with these settings, or one that failed with `error`; `tune` is its score on the tuning split."
    config = RunConfig(**dict(study="made_up", task_name="rte") | settings)
    folder = start_run(config, outputs)
    if error:
        (folder/"error.txt").write_text(error + "\n")
        return folder
    task = TASKS[config.task_name]
    p, y = predictions(config.task_name, accuracy, config.seed)
    found = score(task, p, y) | dict(epoch=3)
    def word(v): return f"{v:.3f}" if task.regression else task.words[v]
    (folder/"predictions").mkdir(exist_ok=True)
    lines = ["index\tprediction\tlabel", *(f"{i}\t{word(a)}\t{word(b)}" for i, (a, b) in enumerate(zip(p, y)))]
    (folder/"predictions/dev.tsv").write_text("\n".join(lines) + "\n")
    (folder/"metrics.jsonl").write_text("".join(json.dumps(dict(step=i, epoch=i / 10, loss=1 / i)) + "\n" for i in range(1, 31)))
    (folder/"notebook.ipynb").write_text("{}")
    scores = dict(dev=dict(last=found, best=found))
    if tune is not None:
        on_tune = {k: tune for k in (*task.metrics, "score")} | dict(epoch=3)
        scores = dict(tune=dict(last=on_tune, best=on_tune), dev=dict(last=found, best=found | dict(score=found["score"] + .01), chosen=found))
    sizes = dict(full=10**6, lora=1000 * config.flat().get("rank", 1))
    trainable = sizes.get(config.method.name, 500)
    cost = dict(train_seconds=9., examples_per_second=90., tokens_per_second=900., padding_share=.1, peak_memory_bytes=10**9, adapter_bytes=10**6)
    result = dict(run_id=config.run_id, size=config.method.size, config=config.flat(), score=found["score"], **scores,
                  parameters=dict(trainable=trainable, total=10**6, share=trainable / 1e6), steps=30, cost=cost,
                  provenance=dict(finished="2026-01-01T00:00:00+00:00", code="ab", data_fingerprint=f"{config.task_name}-{config.data}"))
    (folder/"result.json").write_text(json.dumps(result))
    return folder


def final_seeds(outputs, seeds, study="made_up"):
    (outputs/study/"study.json").write_text(json.dumps(dict(name=study, seeds=[0], final_seeds=seeds)))
