"What a user brings: a task, a method, a metric, an optimiser, in settings.ini or a module, from `run` to the report."
import csv, json
from importlib import import_module
import pytest
from peft_study.run.config import RunConfig
from peft_study.run.stack import stack_key

SETTINGS = """
[task.boolq]
columns = question,passage
labels = False,True
data = boolq
hub = super_glue,boolq

[task.reviews]
columns = text
label = stars
labels = bad,fair,good
metrics = accuracy,macro_f1,mine_too:RECALL
data = reviews
test_labelled = true

[mine]
task_name = boolq reviews
checkpoint = {tiny}
max_length = 32
n_epochs = 1
tune_share = 0.25
[mine.lora]
[mine.mine_too:Shift]
optimizer = torch.optim:SGD
"""
MODULE = """
import torch
from peft_study.tasks.glue import Metric
from peft_study.methods.core import Method

class Shift(Method):
    "A shift of what each layer's feed-forward network adds."
    start, trained, formula, default_lr = "exact", "a shift", "LH", 1e-2
    def inject(self, model, sites):
        for path in sites["ffn_end"]:
            site = model.get_submodule(path)
            site.shift = torch.nn.Parameter(torch.zeros(model.config.hidden_size))
            site.register_forward_hook(lambda site, inputs, h: h + site.shift)
        return model
    def n_parameters(self, s): return s.L * s.H

def recall(p, y): return ((p == y) & (y == 1)).sum(-1) / (y == 1).sum(-1).clip(1)
RECALL = Metric(recall, recall)
def error(p, y): return (p != y).mean(-1)
ERROR = Metric(error, error)
"""
METRICS = ("accuracy", "macro_f1", "mine_too:RECALL")
WORDS = dict(bad="dull", fair="long", good="fine")


def write_csv(file, header, rows):
    with open(file, "w", newline="") as f: csv.writer(f).writerows([header, *rows])


@pytest.fixture
def own(tmp_path, tiny):
    "A folder with settings.ini and the data of two tasks: BoolQ's layout as TSV, and three classes as CSV."
    (tmp_path/"settings.ini").write_text(SETTINGS.format(tiny=tiny))
    (tmp_path/"mine_too.py").write_text(MODULE)
    for name in ("boolq", "reviews"): (tmp_path/name).mkdir()
    for split, n in dict(train=48, dev=16).items():
        rows = [f"is thing {i} wet\tThing {i} is {'wet' if i % 2 else 'dry'}.\t{bool(i % 2)}\n" for i in range(n)]
        (tmp_path/f"boolq/{split}.tsv").write_text("question\tpassage\tlabel\n" + "".join(rows))
    (tmp_path/"boolq/test.tsv").write_text("question\tpassage\nis it wet\tIt is dry.\n")
    for split, n in dict(train=48, dev=15, test=9).items():
        reviews = [(f'The film "{i}",\nin a word, is {w}.', c) for i in range(n // 3) for c, w in WORDS.items()]
        write_csv(tmp_path/f"reviews/{split}.csv", ("text", "stars"), reviews)
    return tmp_path


def one_line(err): return len(err.strip().splitlines()) == 1 and "Traceback" not in err


def test_from_run_to_report(command, own):
    "Two tasks as a study with a tuning split; its table, its report, a run scored again and read from elsewhere."
    code, out, err = command("study", "mine", cwd=own)
    assert code == 0 and "4/4" in err, err
    assert "boolq" in out and "reviews" in out and "MNLI" not in out
    runs = sorted((own/"outputs/mine/runs").iterdir())
    assert [f.name.split("-")[0] for f in runs] == ["boolq"] * 2 + ["reviews"] * 2
    result = json.loads((runs[3]/"result.json").read_text())
    assert result["examples"] == dict(train=36, tune=12, dev=15, test=9)
    assert set(result["dev"]["last"]) == {*METRICS, "score", "epoch"}
    assert set(result["test"]) == {*METRICS, "score"}
    assert (runs[0]/"predictions/test.tsv").read_text().splitlines()[1] in ("0\tFalse", "0\tTrue")
    assert {line.split("\t")[1] for line in (runs[3]/"predictions/dev.tsv").read_text().splitlines()[1:]} == set(WORDS)

    code, out, err = command("evaluate", runs[3], "--split", "test", cwd=own, takes_outputs=False)
    assert code == 0 and f"macro_f1   {result['test']['macro_f1']:.6f}" in out, err
    code, out, err = command("predict", "mine", cwd=own)
    assert code == 2 and "has no run of a GLUE task" in err and one_line(err), err
    code, out, err = command("report", "mine", "--to", "html", cwd=own)
    assert code == 0, err
    html = (own/"outputs/mine/report/report.html").read_text()
    for words in ("reviews", "accuracy/macro F1/RECALL", "Shift", "torch.optim:SGD"): assert words in html
    assert "no GLUE score" not in html and "fine-tuning on GLUE" not in html

    code, out, err = command("list")   # where no settings.ini knows the tasks
    assert code == 0 and out.count("done") == 4, out + err
    (own/"settings.ini").write_text(SETTINGS.replace("bad,fair,good", "good,fair,bad"))
    code, out, err = command("evaluate", runs[3], cwd=own, takes_outputs=False)
    changed = "task 'reviews' is declared otherwise now: labels was"
    assert code == 2 and changed in err and one_line(err), err
    code, out, err = command("list", cwd=own)
    assert code == 0 and out.count(changed) == 2, out


def test_changed_code(command, own):
    "A method's file changes: its runs are made anew, the former ones are left out and no longer scored."
    one_task = ["study", "mine", "--tasks", "boolq"]
    code, out, err = command(*one_task, cwd=own)
    assert code == 0 and "2/2" in err, err
    former, = (own/"outputs/mine/runs").glob("boolq-Shift-*")
    (own/"mine_too.py").write_text(MODULE.replace("h + site.shift", "h + 2 * site.shift"))
    code, out, err = command("evaluate", former, cwd=own, takes_outputs=False)
    assert code == 2 and "method 'mine_too:Shift': its code has changed since boolq-Shift" in err and one_line(err), err
    code, out, err = command(*one_task, cwd=own)
    assert code == 0 and "1 of 2 runs are finished already" in err, err
    assert "1 runs are of an earlier choice, or code" in err + out
    results = list(csv.DictReader(open(own/"outputs/mine/results.csv")))
    assert {row["stage"] for row in results if row["run_id"] == former.name} == {"superseded"} and len(results) == 3


BAD = [
    (dict(old="columns = text", new="columns = txt"), "train.csv: no column 'txt' in its header (text, stars)"),
    (dict(old="columns = text\n", new="colums = text\n"), "settings.ini [task.reviews]: unknown setting 'colums'"),
    (dict(old="labels = bad,fair,good", new="labels = bad,good"), "unknown label 'fair', expected one of bad, good"),
    (dict(old="bad,fair,good", new="bad,fair,good,superb"), "no training example has the label 'superb'"),
    (dict(old="accuracy,macro_f1", new="accuracy,bleu"), "unknown metric 'bleu': use one of matthews, accuracy, f1"),
    (dict(old="mine_too:RECALL", new="mine_too:recall"), "metric 'mine_too:recall' is no peft_study.tasks.glue.Metric"),
    (dict(old="mine_too:RECALL", new="mine_too:ERROR"), "must be 1 where all predictions are right, and is 0"),
    (dict(old="mine_too:RECALL", new="no_such:X"), "metric 'no_such:X': ModuleNotFoundError"),
    (dict(old="accuracy,macro_f1", new="f1"), "metric 'f1' is for two classes, and this task has 3 classes"),
    (dict(old="data = reviews", new="data = elsewhere"), "data 'elsewhere': no such folder"),
    (dict(flags=["--data", "hub"]), "task 'reviews' names no dataset there"),
    (dict(flags=["--data", "demo"]), "the synthetic demo data has no task 'reviews'"),
    (dict(flags=["--task", "revews"]), "unknown task_name 'revews': use one of cola"),
    (dict(flags=["--task", "no_such:TASK"]), "task_name 'no_such:TASK': ModuleNotFoundError"),
    (dict(flags=["--task", "json:dumps"]), "task_name 'json:dumps' is no peft_study.tasks.glue.Task"),
    (dict(old="[task.boolq]", new="[task.rte]"), "[task.rte]: GLUE has a rte; take another"),
    (dict(gone="reviews/dev.csv"), "dev.tsv, .csv or .parquet is missing; reviews needs its train and dev files"),
    (dict(flags=["--optimizer", "sgd"]), "optimizer must be adamw or package.module:function, got 'sgd'"),
    (dict(flags=["--optimizer", "no_such:sgd"]), "optimizer 'no_such:sgd': ModuleNotFoundError"),
    (dict(flags=["--optimizer", "builtins:len"]), "optimizer 'builtins:len' makes no torch.optim.Optimizer, but int"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input(command, own, tiny, change, message):
    settings = (own/"settings.ini").read_text()
    if "old" in change: (own/"settings.ini").write_text(settings.replace(change["old"], change["new"]))
    if "gone" in change: (own/change["gone"]).unlink()
    flags = ["--task", "reviews", "--checkpoint", tiny, "--method", "head", *change.get("flags", [])]
    code, out, err = command("run", *flags, cwd=own)
    assert code == 2 and message in err and one_line(err), err
    assert not (own/"outputs").exists()


def test_module_and_optimizer(command, own, tiny):
    "A task and an optimiser in a file of the user's own; a broken row of a CSV is left out where that is allowed."
    (own/"mine.py").write_text(
        "from peft_study.tasks.glue import Task\n"
        "REVIEWS = Task('reviews', ('text',), ('bad', 'fair', 'good'), label='stars', data='reviews')\n")
    (own/"heavy_ball.py").write_text(
        "import torch\ndef sgd(groups): return torch.optim.SGD(groups, momentum=.9)\n")
    with open(own/"reviews/train.csv", "a") as f: f.write("one column\n")
    flags = ["--task", "mine:REVIEWS", "--checkpoint", tiny, "--method", "head", "--epochs", "1", "--lr", "0.5",
             "--optimizer", "heavy_ball:sgd", "--max-length", "32"]
    code, out, err = command("run", *flags, cwd=own)
    assert code == 2 and "1 columns, expected 2 (1 such rows; skip_bad_rows = N" in err and one_line(err), err
    code, out, err = command("run", *flags, "--skip-bad-rows", "1", cwd=own)
    assert code == 0 and "mine:REVIEWS dev" in out, err
    folder, = (own/"outputs/adhoc/runs").iterdir()
    config = json.loads((folder/"config.json").read_text())
    assert folder.name.startswith("REVIEWS-head-all-s0-") and config["optimizer"] == "heavy_ball:sgd"
    assert json.loads((folder/"result.json").read_text())["examples"]["skipped"] == 1
    code, out, err = command("run", *flags[:-4], "--max-length", "32", "--skip-bad-rows", "1", cwd=own)
    assert code == 0 and len(list((own/"outputs/adhoc/runs").iterdir())) == 2   # AdamW is another run
    (own/"heavy_ball.py").unlink()
    code, out, err = command("evaluate", folder, cwd=own, takes_outputs=False)
    assert code == 0, err   # which trains nothing


def test_identity(own, tiny, monkeypatch):
    "A run of one's own task is what its declaration and its data are, not where they lie."
    from peft_study.run.config import RunConfig
    monkeypatch.chdir(own)
    def run_id(**more): return RunConfig(**dict(task_name="reviews", method="lora", checkpoint=str(tiny)) | more).run_id
    first, settings = run_id(), (own/"settings.ini").read_text()
    assert first.startswith("reviews-lora-r8-s0-")
    (own/"reviews").rename(own/"moved")
    assert run_id(data="moved") == first == run_id(data=str(own/"moved"))
    changes = [("bad,fair,good", "good,fair,bad"), ("accuracy,macro_f1", "macro_f1"),
               ("columns = text", "columns = stars")]
    for old, new in changes:
        (own/"settings.ini").write_text(settings.replace(old, new))
        assert run_id(data="moved") != first, old
    (own/"settings.ini").write_text(settings)
    with open(own/"moved/train.csv", "a") as f: f.write("More,good\n")
    assert run_id(data="moved") != first
    boolq = RunConfig(task_name="boolq", method="lora")
    assert RunConfig(task_name="boolq", method="lora", data="hub").run_id != boolq.run_id


def test_metrics():
    "Each entry of the table: its form for many sets is its form for one."
    from peft_study.tasks.glue import METRICS, check_metric
    for name, metric in METRICS.items():
        for seed in range(5): assert check_metric(metric, seed=seed) < 1e-9, name


def test_former_names_of_modules():
    "Code of one's own that names modules as they were goes on, with the same classes; other names are unknown."
    import peft_study
    for former, now in peft_study._MOVED.items(): assert import_module(former) is import_module(now), former
    from peft_study.glue import Task
    from peft_study.tasks import glue
    assert Task is glue.Task
    with pytest.raises(ModuleNotFoundError): import_module("peft_study.never")


def test_a_subclass_does_not_stack(tmp_path, monkeypatch):
    "It may compute otherwise than the method that it is made from: its runs stand alone until it says that they stack."
    (tmp_path/"sub_lora.py").write_text("from peft_study.methods.lora import LoRA\nclass Sub(LoRA): pass\n"
                                        "class Says(LoRA): stacks = LoRA.stacks\n")
    monkeypatch.syspath_prepend(tmp_path)
    def key(method): return stack_key(RunConfig(task_name="cola", data="demo", checkpoint="minilm", method=method))
    assert key("sub_lora:Sub") is None and key("sub_lora:Says") and key("lora")
