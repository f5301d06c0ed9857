"Declared studies as their users meet them: bad input, dry runs, a submission of real data, the notebook to explore."
import json, os, zipfile
import pandas as pd
import pytest
from conftest import QUICK, REPO, flags
from peft_study.run.config import read_study, unequal_budgets
from peft_study.tasks.glue import SUBMISSION_ROWS, TASKS, splits
from peft_study.study.records import published_runs

GOOD = "[mine]\ntask_name = rte\ndata = demo\n[mine.lora]\nrank = 4\n"


@pytest.mark.parametrize("settings, given, message", [
    (GOOD, ["study", "yours"], "unknown study 'yours': settings.ini has mine"),
    (GOOD.replace("rte", "rte mrcp"), ["study", "mine"], "settings.ini [mine.lora]: unknown task_name 'mrcp'"),
    (GOOD.replace("lora", "lorra"), ["study", "mine"], "[mine.lorra]: unknown method 'lorra'"),
    (GOOD.replace("rank = 4", "rank = 4 x 16"), ["study", "mine"],
     "settings.ini [mine.lora]: rank must be a valid integer, unable to parse string as an integer, got 'x'"),
    (GOOD + "[mine.adapter]\nbottleneck_size = 0\n", ["study", "mine"],
     "settings.ini [mine.adapter]: bottleneck_size must be at least 1, got '0'"),
    (GOOD + "seed = 0..4\n", ["study", "mine"],
     "[mine.lora]: seed must be a valid integer, unable to parse string as an integer, got '0..4'"),
    ("[mine]\ntask_name = rte\n", ["study", "mine"], "study 'mine' has no section [mine.METHOD]"),
    ("mine\n", ["study", "mine"], "; settings.ini of this folder declares none"),
    (GOOD, ["study", "mine", "--shard", "5/3"], "shard must be i/n with i from 1 to n, got '5/3'"),
    (GOOD, ["study", "mine", "--final-seeds", "0 1"],
     "settings.ini [mine]: final_seeds must be other seeds than those that tune: 0 is in seed"),
    (GOOD + "final_seeds = 1\n", ["study", "mine"], "settings.ini [mine.lora]: unknown setting 'final_seeds'"),
    (GOOD, ["study", "mine", "--tune-share", "0.5"],
     "settings.ini [mine.lora]: tune_share must be less than 0.5, got '0.5'"),
    (GOOD, ["study", "mine", "--tune-share", "0.1", "--max-train-examples", "4"],
     "tune_share 0.1 of 4 training examples is too small"),
    (GOOD, ["study", "mine", "--shard", "two"], "shard must be i/n with i from 1 to n, got 'two'"),
    (GOOD, ["study", "mine", "--methods", "adapter"], "adapter"),
    (GOOD, ["study", "mine", "--tasks", "rte,mrcp"], "settings.ini [mine.lora]: unknown task_name 'mrcp'"),
    (GOOD, ["study", "mine", "--rnak", "8"], "rnak"),
    (GOOD, ["study", "mine", "--engine", "slurm"], "engine must be local or ray"),
    (GOOD, ["study", "mine", "--stack", "0"], "stack must be auto, or a number from 1 on, got '0'"),
    (GOOD, ["study", "mine", "--engine", "ray", "--stack", "4"], "stack must be auto or 1 with --engine ray, got '4'"),
    (GOOD.replace("[mine.lora]", "primary = adapter\n[mine.lora]"), ["study", "mine"],
     "settings.ini [mine]: primary: 'adapter' is no method of the study: it has lora, lora r4"),
    (GOOD.replace("[mine.lora]", "primary = lora\nmargin = 1,5\n[mine.lora]") + "[mine.full]\n", ["study", "mine"],
     "settings.ini [mine]: margin must be a number of points between 0 and 100, got '1,5'"),
    (GOOD.replace("[mine.lora]", "final_seeds = 1 2\n[mine.lora]\nlr = 1e-4 1e-3") + "[mine.full]\n", ["study", "mine"],
     "the cells of study 'mine' choose from different numbers of configurations, which favours those with more: "
     "rte full all has 1, rte lora r4 has 2; declare as many for each, or unequal_budgets = true in [mine]"),
    (GOOD, ["predict", "mine"], "no study 'mine'"),
    (GOOD, ["score", "nowhere", "--labels", "nowhere"], "'nowhere': no such folder"),
], ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_bad_input(command, tmp_path, settings, given, message):
    (tmp_path/"settings.ini").write_text(settings)
    code, out, err = command(*given, cwd=tmp_path, takes_outputs=given[0] != "score")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list((tmp_path/"outputs").glob("*/runs"))


def test_unreachable_ray(command, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    (tmp_path/"settings.ini").write_text(GOOD)
    env = os.environ | dict(RAY_ADDRESS="127.0.0.1:9")
    code, out, err = command("study", "mine", "--engine", "ray", cwd=tmp_path, env=env)
    assert code == 2 and "127.0.0.1:9" in err and len(err.strip().splitlines()) == 1, err


def test_dry_runs(command, tmp_path):
    "Every declared study lists its runs without a network; the scaling study has those of the reference study."
    rates = 2 * 3 + 3 * 4 + 5   # of six tasks
    sizes = dict(core=5 * 8 * 4, labels=4 * 3 * (5 * 3 * 2 + 2) + 2 * 3, base=2 * 4 * 3)
    sizes |= dict(small=rates * 12, methods=rates * 10, ablation_init=3 * 4 * 5, official=2 * 8 * 5,
                 encoders=33 * 3, glue=9 * (24 + 8 + 8), scaling=160)
    studies = {name: read_study(name, REPO/"settings.ini") for name in sizes}
    for name, n in sizes.items(): assert len(studies[name].configs) == n, name
    for name in sizes.keys() - {"glue"}:
        assert all(c.tune_share for c in studies[name].configs) and not unequal_budgets(studies[name]), name
    assert unequal_budgets(studies["glue"]) and not any(c.tune_share for c in studies["glue"].configs)
    offline = os.environ | dict(HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    code, out, err = command("study", "encoders", "--dry-run", cwd=REPO, outputs=tmp_path, env=offline)
    assert code == 0 and f"{33 * 3 + 33 * 3} runs" in out and "roberta-base" in out and "887,042" in out, err
    assert "3 seeds of the configuration that will be chosen" in out
    code, out, err = command("study", "scaling", "--task", "sst2", "--dry-run", cwd=REPO, outputs=tmp_path, env=offline)
    assert code == 0 and out.count("sst2 lora r512: seed") == 5 and "mnli" not in out, err
    assert "what is finished is not known here" in out, out   # as the data, which name the runs, are not here


def test_dry_run_counts_what_is_published(command, glue, tmp_path):
    "A fresh clone lists published runs as done, as a start would find them, and writes nothing."
    only = ["--tasks", "cola", "--methods", "full", "--data", str(glue), "--dry-run"]
    code, out, err = command("study", "pilot", *only, cwd=REPO, outputs=tmp_path/"new")
    assert code == 0 and "2 runs; 0.0 h of training left" in out and out.count(" done ") == 2, out + err
    assert not (tmp_path/"new").exists()
    published = next(name for name in published_runs(REPO/"reports/records/pilot") if name.startswith("cola-full-"))
    begun = tmp_path/"begun/pilot/runs"/published   # published, and begun here as well
    begun.mkdir(parents=True)
    code, out, err = command("study", "pilot", *only, cwd=REPO, outputs=tmp_path/"begun")
    assert code == 0 and out.count(" done ") == 2 and not list(begun.iterdir()), out + err
    code, out, err = command("study", "pilot", *only, "--lr", "5e-3", cwd=REPO, outputs=tmp_path/"new")
    assert code == 0 and out.count(" to come ") == 2, out + err


def test_runs_of_another_protocol(command, glue, tmp_path):
    "Published runs with the former tuning split are read; new ones do not join them."
    given = ["study", "small", "--tasks", "rte", "--methods", "head", "--data", str(glue)]
    code, out, err = command(*given, cwd=REPO, outputs=tmp_path)
    assert code == 2 and "runs of an older version, whose tuning split is another" in err.splitlines()[-1], err
    code, out, err = command(*given, "--dry-run", cwd=REPO, outputs=tmp_path/"new")
    assert code == 0 and "8 runs" in out and "older version" in err, out + err


def test_one_cell_of_encoders(command, tmp_path):
    one = flags(methods="lora", lr=1e-3, final_seeds="none")
    code, out, err = command("study", "encoders", *one, *QUICK, cwd=REPO, outputs=tmp_path)
    assert code == 0 and "1/1" in err and "222,338" in out, err


ALL = """
[all]
task_name = {tasks}
checkpoint = {checkpoint}
data = {data}
max_train_examples = 32
max_eval_examples = 40
n_epochs = 1
[all.lora]
"""


def test_submission_of_real_data(command, tmp_path, tiny, glue):
    "Every task in the folder: one short run each, and a file with the rows and words that the server expects."
    (tmp_path/"settings.ini").write_text(ALL.format(tasks=" ".join(TASKS), checkpoint=tiny, data=glue))
    code, out, err = command("study", "all", "--jobs", "2", cwd=tmp_path)
    assert code == 0, err
    code, out, err = command("predict", "all", cwd=tmp_path)
    assert code == 2 and "QQP.tsv (no test file)" in err and "CoLA" not in err
    code, out, err = command("predict", "all", "--fill", cwd=tmp_path)
    assert code == 0, err
    folder = tmp_path/"outputs/all/submission/best"
    manifest = json.loads((folder/"manifest.json").read_text())["files"]
    answered = []
    with zipfile.ZipFile(folder/"submission.zip") as z:
        assert sorted(z.namelist()) == sorted(SUBMISSION_ROWS)
        for task in TASKS.values():
            for split in splits(task).values():
                if not split.submission: continue
                header, *lines = z.read(split.submission).decode().rstrip("\n").split("\n")
                rows = [line.split("\t") for line in lines]
                assert header == "index\tprediction"
                assert [int(i) for i, _ in rows] == list(range(SUBMISSION_ROWS[split.submission]))
                if task.regression: assert all(0 <= float(p) <= 5 for _, p in rows)
                else: assert {p for _, p in rows} <= set(task.words)
                source = glue/split.file
                assert source.is_file() == ("run_id" in manifest[split.submission]), split.submission
                if source.is_file():
                    answered.append(split.submission)
                    asked = list(open(source, encoding="utf-8"))
                    has_header = split.submission != "CoLA.tsv" or asked[0].startswith("index")
                    assert len(rows) == len(asked) - has_header
    print("answered by runs:", *answered)
    labels = tmp_path/"labels"
    labels.mkdir()
    (labels/"RTE.tsv").write_text((folder/"RTE.tsv").read_text().replace("prediction", "label"))
    code, out, err = command("score", folder, "--labels", labels, takes_outputs=False)
    assert code == 0 and "3000" in out and "1.0000" in out, out + err


def test_explore(study, undisturbed, tmp_path):
    "The notebook, on a study of eight runs; on one whose runs are all of one method; and where there is no such study."
    from papermill import PapermillExecutionError, execute_notebook
    source = REPO/"nbs/experiments/explore.ipynb"
    def explore(**parameters):
        given = dict(study="eight", outputs=str(study.folder/"quiet")) | parameters
        return execute_notebook(source, tmp_path/"out.ipynb", given, kernel_name="python3", progress_bar=False)
    text = json.dumps(explore().cells)
    assert text.count("image/png") == 2 and "examples" in text and all(name in text for name in undisturbed)
    assert "lora-r2" in json.dumps(explore(where="method == 'lora'").cells)
    with pytest.raises(PapermillExecutionError, match="no study 'nine'"): explore(study="nine")


def test_the_demo_teaches():
    "Its record: the runs of settings.ini; every size of every method far above the majority class and the probe."
    runs = pd.read_csv(REPO/"reports/records/demo/results.csv")
    study = read_study("demo", REPO/"settings.ini", auto=runs.precision[0])
    def run(c, label, size): return c.task_name, label, size, c.seed, c.lr
    declared = [run(c, c.method.label, c.method.size) for c in study.configs]
    assert sorted(run(r, r.label, r["size"]) for _, r in runs.iterrows()) == sorted(declared)
    majority = dict(cola=0., sst2=.5)   # Matthews correlation, accuracy
    for task, of_task in runs.groupby("task_name"):
        probe = of_task[of_task.method == "head"].score.mean()
        assert probe > majority[task]
        for (method, size), cell in of_task[of_task.method != "head"].groupby(["method", "size"]):
            assert cell.seed.nunique() >= 3 and cell.score.mean() > probe + .15, (task, method, size)
    sizes = runs.groupby("method")["size"].nunique()
    assert sizes["adapter"] >= 3 and sizes["lora"] >= 3 and sizes["full"] == 1
