"Methods that are no module in the encoder: their runs are runs, and they cost nothing where they are not used."
import json, subprocess, sys, time
from importlib import util
from pathlib import Path
import numpy as np, pytest
from conftest import PROGRAM, kill_tree
from peft_study.methods.core import ESTIMATORS, OFFICIAL, find_method, method_names
from peft_study.methods.estimators import best_strength
from peft_study.run.config import RunConfig, check_budgets, read_study
from peft_study.run.predict import evaluate, load_fitted, predict_split
from peft_study.run.runs import read_result
from peft_study.run.train import load_examples, train
from peft_study.tasks.data import read_split
from peft_study.tasks.glue import BadInput, get_task, score

INI = """
[words]
task_name = sst2 mrpc
data = demo
checkpoint = {checkpoint}
max_train_examples = 60
max_eval_examples = 40
tune_share = 0.2
n_epochs = 2
seed = 0
final_seeds = 1 2
[words.tfidf]
[words.embeddings]
[words.setfit]
[words.head]
lr = 3e-3 9e-3
"""

def config_of(tiny, method, **more):
    common = dict(task_name="sst2", data="demo", checkpoint=str(tiny), max_train_examples=60, max_eval_examples=40,
                  tune_share=.2)
    return RunConfig(method=method, **common | more)

@pytest.fixture
def in_folder(tmp_path, tiny, monkeypatch):
    (tmp_path/"settings.ini").write_text(INI.format(checkpoint=tiny))
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_is_a_run(name, tiny, tmp_path):
    "Its record has what every record has; its score is that of its file, and of the model that it has saved."
    config = config_of(tiny, name)
    folder, = train([config], tmp_path)
    r = read_result(folder)
    assert {"run_id", "score", "tune", "dev", "parameters", "cost", "provenance", "config", "examples"} <= r.keys()
    assert r["examples"]["train"] == 48 and r["examples"]["tune"] == 12
    assert r["score"] == r["dev"]["last"]["score"] == evaluate(folder)["score"]
    lines = (folder/"predictions/dev.tsv").read_text().splitlines()[1:]
    assert np.mean([y == said for _, y, said in map(str.split, lines)]) == pytest.approx(r["dev"]["last"]["accuracy"])
    assert (folder/"predictions/test.tsv").is_file()
    assert r["cost"]["train_seconds"] > 0 and r["cost"]["adapter_bytes"] > 0
    assert set(config.method.libraries) <= r["provenance"]["versions"].keys()
    assert r["parameters"]["trainable"] == load_fitted(folder).n_trained

def test_no_setting_of_a_loop_makes_another_run(tiny):
    plain = config_of(tiny, "tfidf")
    assert config_of(tiny, "tfidf", n_epochs=9, lr=1., batch_size=4, pooling="mean", max_steps=7).run_id == plain.run_id
    assert config_of(tiny, "tfidf", seed=1).run_id != plain.run_id
    assert plain.lr is None and RunConfig(**plain.flat()) == plain

def test_a_study_has_them_beside_the_others(in_folder, command):
    "One configuration is no unequal budget; pairs are left out with a line; the report names what is not tuned."
    check_budgets(study := read_study("words"))
    assert study.left_out == ("setfit is left out on mrpc: SetFit takes single texts, and these are pairs",)
    code, out, err = command("study", "words", "--methods", "tfidf,embeddings,head", cwd=in_folder)
    assert code == 0, err
    rows = (in_folder/"outputs/words/results.csv").read_text()
    assert rows.count("-tfidf-") == 6 and rows.count("-embeddings-") == 6 and rows.count("-head-") == 8
    from peft_study.report.tables import View, setup_table, study_table
    view = View("words", in_folder/"outputs")
    assert "2; 1 where nothing is tuned: " in study_table(view)
    of_words, = [line for line in setup_table(view).splitlines() if line.startswith("| TF-IDF")]
    assert of_words.count("—") == 3   # rates, epochs, batch
    code, out, err = command("study", "words", "--methods", "setfit", "--task-name", "mrpc", cwd=in_folder)
    assert code == 2 and "nothing is left to run: setfit is left out on mrpc" in err

def test_setfit_that_is_not_installed(in_folder, tiny, monkeypatch):
    "A study goes on without it, and says what to install; a run of it alone is refused."
    from peft_study.methods import estimators
    from peft_study.study.sweep import installed
    monkeypatch.setattr(estimators, "find_spec", lambda name: None if name == "setfit" else util.find_spec(name))
    study, lines = installed(read_study("words"))
    assert {c.method.name for c in study.configs} == {"tfidf", "embeddings", "head"}
    assert lines == ["setfit is left out: the library SetFit is not installed: pip install 'peft_study[reference]'"]
    with pytest.raises(BadInput, match=r"not installed: pip install 'peft_study\[reference\]'"):
        train([config_of(tiny, "setfit")], in_folder/"outputs")

def test_setfit_killed_in_the_middle(in_folder):
    "The study goes on, and finds what it would have found."
    start = [*PROGRAM, "study", "words", "--methods", "setfit", "--task-name", "sst2"]
    def found(name): return {f.parent.name: json.loads(f.read_text())["dev"]
                             for f in (in_folder/name/"words/runs").glob("*/result.json")}
    child = subprocess.Popen([*start, "--outputs", "killed"], cwd=in_folder, start_new_session=True)
    while not list((in_folder/"killed").glob("words/runs/*/log.txt")): time.sleep(.1)
    time.sleep(4)   # it is loading, or training
    kill_tree(child)
    assert len(found("killed")) < 3
    for name in ("killed", "quiet"): subprocess.run([*start, "--outputs", name], cwd=in_folder, check=True)
    assert found("killed") == found("quiet") and len(found("quiet")) == 3

def test_numbers_as_labels(glue, tmp_path):
    "STS-B: ridge regression on the embeddings of pairs, against numpy's solution of the same equations."
    config = RunConfig(task_name="stsb", data=str(glue), checkpoint="minilm", method="embeddings",
                       max_train_examples=200, max_eval_examples=100)
    rows, method = load_examples(config), find_method("embeddings")()
    fitted = method.fit(rows["train"], config, C=10.)
    x, y = fitted.features(rows["train"]).astype(float), np.array([e.label for e in rows["train"]], float)
    mean_x, mean_y = x.mean(0), y.mean()
    a = (x - mean_x).T @ (x - mean_x) + np.eye(x.shape[1]) / 10
    w = np.linalg.solve(a, (x - mean_x).T @ (y - mean_y))
    held = fitted.features(rows["dev"]).astype(float)
    np.testing.assert_allclose(fitted.logits(rows["dev"])[:, 0], (held - mean_x) @ w + mean_y, atol=1e-3)
    assert score(get_task("stsb"), fitted.logits(rows["dev"])[:, 0], [e.label for e in rows["dev"]])["score"] > .7

def test_C_is_chosen_by_the_tasks_metric(monkeypatch):
    "Matthews correlation where the task has it: a C that predicts the frequent class alone reads 0 by that."
    rng = np.random.default_rng(0)
    y = (rng.random(200) < .15).astype(int)
    x = rng.normal(size=(200, 5)) + y[:, None]
    assert best_strength(x / 30, y, get_task("cola")) > .1

def test_what_was_held_out_does_not_choose(tiny):
    "The tuning split and dev may have any labels."
    config = config_of(tiny, "tfidf")
    rows = load_examples(config)
    assert config.method.fit(rows["train"], config).model.C == best_strength(
        config.method.features("", 0).fit(rows["train"])(rows["train"]), [e.label for e in rows["train"]],
        get_task("sst2"), config.seed)

def test_nothing_is_loaded_where_it_is_not_needed(tiny, tmp_path):
    "A LoRA run has neither scikit-learn nor SetFit in its process; one on words has no SetFit."
    program = """import sys
from peft_study.run.config import RunConfig
from peft_study.run.train import train
train([RunConfig(task_name="sst2", data="demo", checkpoint=sys.argv[1], method=sys.argv[3], max_train_examples=16,
                 max_eval_examples=8, n_epochs=1)], sys.argv[2])
print([name for name in ("sklearn", "setfit", "sentence_transformers") if name in sys.modules])"""
    def loaded(method):
        done = subprocess.run([sys.executable, "-c", program, tiny, tmp_path, method], capture_output=True, text=True)
        return done.stdout.splitlines()[-1]
    assert loaded("lora") == "[]"
    assert loaded("tfidf") == "['sklearn']"

def test_predictions_for_a_test_file_that_comes_later(glue, tmp_path, tiny):
    data = tmp_path/"glue"/"RTE"
    data.mkdir(parents=True)
    for name in ("train.tsv", "dev.tsv"): (data/name).write_bytes((Path(glue)/"RTE"/name).read_bytes())
    config = RunConfig(task_name="rte", data=str(data.parent), checkpoint=str(tiny), method="tfidf",
                       max_train_examples=50)
    folder, = train([config], tmp_path)
    assert not (folder/"predictions/test.tsv").exists()
    (data/"test.tsv").write_bytes((Path(glue)/"RTE"/"test.tsv").read_bytes())
    assert train([config], tmp_path) == [folder]
    rows, logits = predict_split(folder, "test")
    assert len(rows) == len(read_split(get_task("rte"), "test", config.data)) == len(logits)
    assert (folder/"predictions/test.tsv").is_file()

def test_export_says_why_not(tiny, tmp_path, command):
    folder, = train([config_of(tiny, "tfidf")], tmp_path)
    code, _, err = command("export", folder, "--to", tmp_path/"out", takes_outputs=False)
    assert code == 2 and "is no module in the encoder" in err and len(err.splitlines()) == 1

def test_colours():
    "Each method has a colour of its own in figures, but for 🤗 PEFT's, which have a shade of ours."
    own = [find_method(name).colour for name in (*method_names(), *ESTIMATORS) if name not in OFFICIAL]
    assert None not in own and len(set(own)) == len(own)
