"What is said about runs, where the truth is known: run folders with made-up results."
import json, math, re, shutil
from itertools import product
import nbformat, numpy as np, pandas as pd, pytest
from fabricate import final_seeds, run_folder
from peft_study.tasks.glue import BadInput
from peft_study.report.report import Trace, execute_report, percent, points, save_trace
from peft_study.report.tables import (View, baseline, cost_table, data_table, difference_table, compared, forest,
                                      main_table, missing_table, other_methods, pair_table, paired_table, panels,
                                      parameters_figure, question_table, study_table, unlearned)
from peft_study.results.table import (DevExamples, best_runs, cell_means, compare, compare_pairs, floors, learned,
                                      load_runs, not_reported, paired, pairs, predictions_of, publish_predictions,
                                      reported)
from peft_study.share.submission import choose
from peft_study.cli import print_table
from rich.console import Console


def test_two_encoders_in_a_study(tmp_path):
    "LoRA is one point worse on each of two encoders, 15 points apart: that is what comes out, with rows for each."
    for encoder, level in (("minilm", .70), ("bert-base-uncased", .85)):
        for seed in range(5):
            for method, worse in (("full", 0), ("lora", .01)):
                folder = run_folder(tmp_path, level, checkpoint=encoder, method=method, seed=seed)
                result = json.loads((folder/"result.json").read_text())
                (folder/"result.json").write_text(json.dumps(result | dict(score=level - worse + .001 * seed)))
    table = load_runs("made_up", tmp_path)
    found = compare(table).set_index("encoder")
    assert found.difference.round(9).to_dict() == {"minilm": -.01, "bert-base-uncased": -.01}
    cells = cell_means(table)
    best = cells.groupby("encoder").score.max().round(3).to_dict()
    assert len(cells) == 4 and best == {"minilm": .702, "bert-base-uncased": .852}
    rows = main_table(table, Trace(), DevExamples(tmp_path)).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| RTE (bert-base-uncased)", "| RTE (MiniLM)"]


def test_ours_and_the_official_implementation(tmp_path):
    "Pairs are equal in data, rate and rank: a planted −1 is −1, whatever else is in the table."
    planted = dict(lora=.79, hf_lora=.80)
    def add(method, score, **settings):
        folder = run_folder(tmp_path, .8, method=method, **settings)
        result = json.loads((folder/"result.json").read_text())
        (folder/"result.json").write_text(json.dumps(result | dict(score=score)))
    for seed in range(5):
        for method, score in planted.items(): add(method, score, seed=seed, rank=8, lr=1e-3)
        for rank, rate in ((1, 1e-3), (8, 1e-2), (64, 1e-3)): add("lora", .5, seed=seed, rank=rank, lr=rate)
        add("lora", .99, seed=seed, rank=8, lr=1e-3, checkpoint="minilm")
        add("hf_lora", .20, seed=seed + 10, rank=8, lr=1e-3)   # other seeds are no pairs
    table = load_runs("made_up", tmp_path)
    (shared, ours, theirs), = pairs(table, "method", "lora", "hf_lora")
    assert math.isclose(paired(ours, theirs)["difference"], -.01) and paired(ours, theirs)["n"] == 5
    found = compare_pairs(table, "method", [("lora", "hf_lora")])
    text = pair_table(table, found, Trace(), "tbl-official")
    assert text.count("\n") == 2 and "−1.0" in text


def test_starts_of_adapters(tmp_path):
    "Planted differences come out, in the report of the study that has the pairs, and in no other."
    for task in ("rte", "mrpc"):
        run_folder(tmp_path, .8, task_name=task, method="full", max_train_examples=100)   # other data, to a table
        for size, init in product((1, 64), ("near", "framework")):
            for seed in range(1, 6):
                folder = run_folder(tmp_path, .8, study="ablation_init", task_name=task, method="adapter",
                                    bottleneck_size=size, init=init, lr=2e-3, seed=seed)
                gain = (.2 * (size == 1) + .001 * (seed - 3)) * (init == "near")
                result = json.loads((folder/"result.json").read_text())
                (folder/"result.json").write_text(json.dumps(result | dict(score=.6 + gain)))
    table = paired_table(View("ablation_init", tmp_path), "init")
    assert table.count("+20.0") == 2 and table.count("| 0.0 |") == 2 and table.count("| RTE |") == 2
    assert paired_table(View("made_up", tmp_path), "init") == ""


def asking(outputs, primary, seeds=(), **more):
    questions = dict(primary=primary, tasks=["rte", "mrpc"]) | more
    record = dict(name="made_up", final_seeds=list(seeds), questions=questions)
    (outputs/"made_up/study.json").write_text(json.dumps(record))


def test_questions_asked_beforehand(tmp_path):
    "Planted differences come out for each question, at the margin that was declared, and Holm is over these alone."
    planted = dict(full=0, adapter=-.002, lora=-.05, bitfit=-.02, ia3=.1)
    for task, seed, (method, worse) in product(("rte", "mrpc", "cola"), range(5), planted.items()):
        folder = run_folder(tmp_path, .8, task_name=task, method=method, seed=seed)
        rng = np.random.default_rng([seed, list(planted).index(method)])
        noise = rng.normal(scale=.01 if method == "bitfit" else .001)
        result = json.loads((folder/"result.json").read_text())
        score = .7 + worse + noise if task != "cola" else .1   # which is not asked about
        (folder/"result.json").write_text(json.dumps(result | dict(score=score)))
        shutil.rmtree(folder/"predictions")   # chance of the seeds alone
    asking(tmp_path, [dict(label=m) for m in ("adapter", "lora", "bitfit")], margin=1.5)
    view = View("made_up", tmp_path)
    found, text = view.answers.set_index("label"), question_table(view)
    assert found.verdict.to_dict() == dict(adapter="within", lora="below", bitfit="open")
    assert np.allclose(found.difference, [-.002, -.05, -.02], atol=.01) and set(found.n) == {5}
    assert found.p.idxmin() == "lora" and math.isclose(found.p_holm["lora"], 3 * found.p["lora"])
    for label, decision in dict(adapter="within the margin", lora="below by more", bitfit="open").items():
        assert f"| {percent(-found.low[label])} | {decision} |" in text, text
    report = said(execute_report("made_up", tmp_path))
    assert report.count("p (Holm)") == 1 and "| questions asked beforehand | 3, margin 1.5 points |" in report
    assert "99%" not in report and "Wilcoxon" not in report


def test_facts_are_one_table(tmp_path):
    "What the report's tables say of a difference is the row of the facts; a mean lacks an answer where a task does."
    planted = dict(full=dict(rte=.9, mrpc=.8), lora=dict(rte=.8, mrpc=.75), ia3=dict(rte=.7))
    for method, of_tasks in planted.items():
        for (task, accuracy), seed in product(of_tasks.items(), (1, 2, 3)):
            run_folder(tmp_path, accuracy, task_name=task, method=method, seed=seed)
    view = View("made_up", tmp_path)
    found = compared(view).set_index(["where", "label"])
    assert list(panels(view)) == ["mean of 2 tasks", "MRPC", "RTE"] and baseline(view) == "full"
    mean, (mrpc, rte) = found.loc[("mean of 2 tasks", "lora")], (found.loc[(t, "lora")] for t in ("MRPC", "RTE"))
    assert abs(mean.difference - (mrpc.difference + rte.difference) / 2) < 1e-12
    assert mean.low < mean.difference < mean.high
    lacking = found.loc[("mean of 2 tasks", "ia3")]
    assert lacking.n == 0 and lacking.lacks == ["mrpc"] and ("MRPC", "ia3") not in found.index
    text = difference_table(view).replace("\u00a0", " ")
    assert f"| {points(mean.difference)} | {points(mean.low)} to {points(mean.high)} | 3 |" in text
    assert "no answer yet: MRPC" in text
    drawn = {t.get_text() for ax in forest(view).axes for t in ax.texts}
    assert {"no answer yet", "LoRA, r = 8", "(IA)³"} <= drawn and [ax.get_title() for ax in forest(view).axes][:3] == [
        "mean of 2 tasks", "MRPC", "RTE"]


def test_choosing_on_dev_is_compared_with_what_is_reported(tmp_path):
    "The best of the grid on dev, minus the mean of the final seeds: the luck of one seed is in it."
    for rate, dev, tune in ((1e-3, .9, .6), (2e-3, .8, .8)):
        run_folder(tmp_path, dev, tune=tune, method="lora", lr=rate, seed=0, tune_share=.1)
    for seed in (1, 2, 3): run_folder(tmp_path, .7, tune=.8, method="lora", lr=2e-3, seed=seed, tune_share=.1)
    final_seeds(tmp_path, [1, 2, 3])
    view = View("made_up", tmp_path)
    [row] = view.usual.to_dict("records")
    grid = view.done[view.done.stage == "tune"]
    assert row["usual"] == grid.dev_best_score.max() and abs(row["fair"] - view.runs.score.mean()) < 1e-12
    assert row["usual"] - row["fair"] > .15


def test_paths_do_not_split_a_cell(tmp_path):
    "One folder of data, spelled in two ways by two machines; a run without a result knows it by its path."
    for seed, data in ((0, "../shared/glue"), (1, "/data/glue/"), (2, "../shared/glue")):
        folder = run_folder(tmp_path, .8, method="lora", seed=seed)
        for file in ("config.json", "result.json"):
            content = json.loads((folder/file).read_text())
            content.get("config", content)["data"] = data
            if "provenance" in content: content["provenance"]["data_fingerprint"] = "5eed"
            (folder/file).write_text(json.dumps(content))
        if seed == 2: (folder/"result.json").unlink()
    table = load_runs("made_up", tmp_path)
    assert table.configuration.nunique() == 1 and len(cell_means(table)) == 1 and cell_means(table).n[0] == 2


def test_a_run_that_collapsed(tmp_path):
    "Its score is not a number: tables, choice and submission of the others are as without it."
    run_folder(tmp_path, .8, method="lora", task_name="stsb")
    folder = run_folder(tmp_path, .8, method="full", task_name="stsb")
    (folder/"result.json").write_text((folder/"result.json").read_text().replace('"score": ', '"score": NaN, "was": '))
    tuned = run_folder(tmp_path, .8, tune=math.nan, method="bitfit", task_name="stsb", tune_share=.1)
    table = load_runs("made_up", tmp_path)
    assert set(table.run_id[table.status != "done"]) == {folder.name, tuned.name}
    assert cell_means(table).label.tolist() == ["lora"] and best_runs(table).label.tolist() == ["lora"]
    assert choose(table)["stsb"].label == "lora" and main_table(table, Trace(), DevExamples(tmp_path))


def test_the_tuning_score_chooses(tmp_path):
    "Not the dev score, which is only reported: for tables, sizes and the submission."
    for rate, dev, tune in ((1e-3, .90, .60), (2e-3, .70, .80)):
        run_folder(tmp_path, dev, tune=tune, method="lora", rank=1, lr=rate, tune_share=.1)
    run_folder(tmp_path, .95, tune=.70, method="lora", rank=8, tune_share=.1)
    table = load_runs("made_up", tmp_path)
    cells = cell_means(table).set_index("size")
    assert abs(cells.score["r1"] - .70) < .1 and cells.tried["r1"] == 2
    assert choose(table)["rte"]["lr"] == 2e-3 and choose(table)["rte"]["size"] == "r1"


def test_floors(tmp_path):
    "Above the linear probe by its interval, or not; without a probe, above the constant prediction."
    accuracies = dict(full=.85, bitfit=.62, ia3=.5, head=.6)
    for seed in range(5):
        for method, accuracy in accuracies.items(): run_folder(tmp_path, accuracy, method=method, seed=seed)
    table, examples = load_runs("made_up", tmp_path), DevExamples(tmp_path)
    found = learned(table, examples)
    assert dict(zip(found.label, found.learned)) == dict(full=True, bitfit=False, ia3=False, head=True)
    alone = table[table.method != "head"]
    found = learned(alone, examples)
    assert dict(zip(found.label, found.learned)) == dict(full=True, bitfit=True, ia3=False)
    text = main_table(table, Trace(), examples)
    assert text.count("‡") == 2 and "| linear probe | constant |" in text


def test_published_predictions(tmp_path):
    "One file a study has what the run folders had: the same intervals come out."
    for seed in range(3):
        for method, accuracy in (("full", .85), ("lora", .8)): run_folder(tmp_path, accuracy, method=method, seed=seed)
    table = load_runs("made_up", tmp_path)
    before = compare(table, examples=DevExamples(tmp_path))
    publish_predictions(reported(table), tmp_path/"made_up")
    for folder in (tmp_path/"made_up/runs").iterdir(): shutil.rmtree(folder/"predictions")
    after = compare(table, examples=DevExamples(tmp_path))
    pd.testing.assert_frame_equal(before, after)
    assert before.low.notna().all() and predictions_of("rte-other", tmp_path/"made_up") is None


def said(notebook) -> str:
    "What an executed report says, tables included, with plain spaces."
    cells = [c for c in nbformat.read(notebook, 4).cells if c.cell_type == "code"]
    assert not [o for c in cells for o in c.outputs if o.output_type in ("error", "stream")]
    shown = [o.get("data", {}) for c in cells for o in c.outputs]
    return "\n\n".join(data["text/markdown"] for data in shown if "text/markdown" in data).replace("\u00a0", " ")


def test_report_of_two_stages(tmp_path):
    "Unequal grids, a final seed that failed, repetitions of a former choice, a cell that waits: each is said."
    def run(method, accuracy, seed, lr=1e-3, **more):
        return run_folder(tmp_path, accuracy, method=method, seed=seed, lr=lr, tune_share=.1, **more)
    for method, rates in (("full", (1e-3,)), ("lora", (1e-3, 2e-3, 3e-3)), ("head", (1e-3,)), ("bitfit", (1e-3,))):
        for rate in rates: run(method, .6 + 50 * rate, 0, rate, tune=.6 + 50 * rate)
    for method, rate in (("full", 1e-3), ("lora", 3e-3), ("head", 1e-3)):
        for seed in (1, 2, 3, 4):
            error = "killed" if (method, seed) == ("lora", 4) else None
            run(method, .6 if method == "head" else .8, seed, rate, tune=.8, error=error)
    superseded = run("lora", .99, 1, 2e-3, tune=.8)
    final_seeds(tmp_path, [1, 2, 3, 4])
    table = load_runs("made_up", tmp_path)
    assert table.stage.value_counts().to_dict() == dict(final=12, tune=6, superseded=1)
    assert set(not_reported(table).run_id) == {superseded.name} | set(table.run_id[table.status == "failed"])
    text = said(execute_report("made_up", tmp_path))
    for words in ("| configurations a cell | 1–3, unequal within a task |", "1 (full on RTE) to 3 (LoRA, r = 8 on RTE)",
                  "| seeds without a result | LoRA, r = 8 on RTE: 4 |", superseded.name,
                  "| runs failed | 1; 1 × killed |", "| tuned, not repeated with the final seeds yet | BitFit on RTE |",
                  "| seeds | 0 to tune; 1, 2, 3, 4 to report |", "best on dev | reported"):
        assert words in text, words
    lora = cell_means(table).set_index("label").loc["lora"]
    score = f"{100 * lora.score:.1f}"
    assert lora.n == 3 and f"| {score}" not in text and f"[{score}](runs.html#tbl-sizes-rte-lora-r8)" in text


def test_tasks_that_no_method_learns(tmp_path):
    "They are in the tables, and named; no mean difference and no statement about sizes takes them into account."
    def add(task, method, accuracy, **size):
        for seed in (1, 2, 3): run_folder(tmp_path, accuracy, task_name=task, method=method, seed=seed, **size)
    for task, best in (("rte", .9), ("wnli", .4)):
        add(task, "full", best)
        for rank, worse in ((4, .2), (8, .1)): add(task, "lora", best - worse, rank=rank)
    view = View("made_up", tmp_path)
    assert [place[0] for place in unlearned(view)] == ["wnli"]
    assert list(panels(view)) == ["RTE", "WNLI"] and set(compared(view)["where"]) == {"RTE", "WNLI"}   # no mean
    assert "| left out of means: no method has learned there | WNLI |" in missing_table(view)
    add("mrpc", "full", .9)
    add("mrpc", "lora", .8, rank=8)
    view = View("made_up", tmp_path)
    assert {condition[0] for condition in panels(view)["mean of 2 tasks"]} == {"rte", "mrpc"}


def test_means_over_tasks(tmp_path):
    "A mean has an interval of its own, which is narrower than those of its tasks."
    accuracies = dict(full=(.9, .8), adapter=(.8, .75), lora=(.7, .6))
    for method, of_tasks in accuracies.items():
        for task, accuracy in zip(("rte", "mrpc"), of_tasks):
            for seed in (1, 2, 3): run_folder(tmp_path, accuracy, task_name=task, method=method, seed=seed)
    found = compared(View("made_up", tmp_path)).query("label == 'adapter'")
    mean, each = found[found.tasks == 2].iloc[0], found[found.tasks == 1]
    assert abs(mean.difference - each.difference.mean()) < 1e-12
    assert mean.high - mean.low < (each.high - each.low).min()


def test_two_encoders_have_a_mean_each(tmp_path):
    for task, checkpoint, (method, accuracy) in product(("rte", "mrpc"), ("minilm", "bert-base-uncased"),
                                                        (("full", .9), ("lora", .8))):
        for seed in (1, 2, 3):
            run_folder(tmp_path, accuracy, task_name=task, checkpoint=checkpoint, method=method, seed=seed)
    view = View("made_up", tmp_path)
    assert list(panels(view))[:2] == ["mean of 2 tasks (bert-base-uncased)", "mean of 2 tasks (MiniLM)"]
    assert "| bert-base-uncased | full |" in cost_table(view).replace("\\", "") and forest(view)


def test_seeds_that_are_missing(tmp_path):
    "Differences, intervals and means are of the seeds that both sides have, and of the tasks that both have."
    for seed in range(1, 6): run_folder(tmp_path, .95 - .03 * seed, method="full", seed=seed)
    for seed in (1, 2, 3): run_folder(tmp_path, .7, method="lora", seed=seed)
    for seed, method in ((1, "full"), (2, "lora")): run_folder(tmp_path, .8, task_name="mrpc", method=method, seed=seed)
    found = compared(View("made_up", tmp_path)).set_index("where")
    assert found.n["RTE"] == 3 and math.isclose(found.low["RTE"], compare(load_runs("made_up", tmp_path),
                                                examples=DevExamples(tmp_path)).set_index("task_name").low["rte"])
    assert found.n["mean of 2 tasks"] == found.n["MRPC"] == 0   # which have no seed in common


def test_places_of_one_name(tmp_path):
    "Two folders with the same last part are two encoders."
    for checkpoint, accuracy in (("a/base", .9), ("b/base", .8)):
        for seed in (1, 2, 3):
            for method, worse in (("full", 0), ("lora", .1)):
                run_folder(tmp_path, accuracy - worse, checkpoint=checkpoint, method=method, seed=seed)
    view = View("made_up", tmp_path)
    assert list(view.conditions.values()) == ["RTE (base) [a/base]", "RTE (base) [b/base]"]
    assert forest(view) and difference_table(view).count("[a/base]") == 1


def test_predictions_that_are_missing(tmp_path):
    "The constant prediction is known from any run that has predictions, and what is not known is said."
    for method, accuracy in (("full", .9), ("lora", .8)):
        for seed in (1, 2, 3): run_folder(tmp_path, accuracy, method=method, seed=seed)
    first, *rest = reported(load_runs("made_up", tmp_path)).run_id
    def constant(view): return floors(view.table, view.examples).constant.iloc[0]
    before = constant(View("made_up", tmp_path))
    shutil.rmtree(tmp_path/"made_up/runs"/first/"predictions")
    view = View("made_up", tmp_path)
    assert constant(view) == before > 0
    assert "| without predictions: intervals are over seeds alone | 1 of 6 runs |" in missing_table(view)
    for run_id in rest: shutil.rmtree(tmp_path/"made_up/runs"/run_id/"predictions")
    view = View("made_up", tmp_path)
    assert math.isnan(constant(view)) and "constant" not in data_table(view) and "‡" not in missing_table(view)


def test_a_cell_of_two_studies(tmp_path):
    "A cell that the study shares with `methods` is the study's own."
    for seed in (1, 2, 3):
        def run(accuracy, **settings): run_folder(tmp_path, accuracy, train_pooler=True, seed=seed, **settings)
        run(.9, method="full")
        run(.8, method="bitfit", lr=1e-3)
        for method, accuracy in (("bitfit", .6), ("ia3", .7)): run(accuracy, study="methods", method=method, lr=2e-3)
    view = View("made_up", tmp_path)
    assert set(other_methods(view).label) == {"ia3"}
    assert view.cells.score[view.cells.label == "bitfit"].iloc[0] > .7


def test_runs_that_cannot_be_read(tmp_path):
    "A folder without seed, and one whose method is not here: the report is of the others, and has no command of it."
    for seed in (0, 1): run_folder(tmp_path, .8, .8, method="lora", seed=seed, tune_share=.1)
    final_seeds(tmp_path, [1])
    broken = run_folder(tmp_path, .8, .8, method="full", tune_share=.1)
    for name in ("config.json", "result.json"): (broken/name).write_text("{}")
    view = View("made_up", tmp_path)
    assert "| seeds | 0 to tune; 1 to report |" in study_table(view)
    assert "2 finished, 1 failed" in study_table(view)
    (tmp_path/"pages").mkdir()
    view.trace.cell("tbl-runs", broken.name, "80.0", view.runs.assign(run_id=broken.name))
    save_trace(view.trace, tmp_path/"pages", tmp_path)
    [run] = json.loads((tmp_path/"pages/trace.json").read_text())["tbl-runs"][broken.name]["runs"]
    assert run["command"] is None


def test_no_task_is_learned(tmp_path):
    "Then there is nothing to leave out."
    for method, accuracy in (("full", .4), ("lora", .3)):
        for seed in (1, 2, 3): run_folder(tmp_path, accuracy, method=method, seed=seed)
    view = View("made_up", tmp_path)
    assert unlearned(view) == [] and "| RTE: full, LoRA |" in missing_table(view) and len(compared(view)) == 1


@pytest.mark.parametrize("method", ["head", "full", "lora"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_one_method_alone(tmp_path, method, seeds):
    "A study of one method has a report as well, without comparisons."
    for seed in range(seeds): run_folder(tmp_path, .8, method=method, seed=seed)
    view = View("made_up", tmp_path)
    assert compared(view).empty and forest(view) is None and difference_table(view) == ""
    assert parameters_figure(view) is None
    text = missing_table(view)
    assert ("no full fine-tuning" in text) == (method != "full") and ("no linear probe" in text) == (method != "head")
    assert ("fewer than three seeds" in text) == (seeds == 1)


def test_tasks_may_differ_in_their_budget(tmp_path):
    "Methods are compared within a task: unequal is what is unequal there."
    def tried(task, method, *rates):
        for rate in rates: run_folder(tmp_path, .8, task_name=task, method=method, lr=rate, tune_share=.1)
    def said_of_budgets():
        view = View("made_up", tmp_path)
        return re.search(r"configurations a cell \| (.*) \|", study_table(view))[1], "unequal" in missing_table(view)
    for method in ("full", "lora"): tried("rte", method, 1e-3, 2e-3)
    assert said_of_budgets() == ("2", False)
    for method in ("full", "lora"): tried("mrpc", method, 1e-3)
    assert said_of_budgets() == ("1–2", False)
    tried("mrpc", "lora", 2e-3)
    assert said_of_budgets() == ("1–2, unequal within a task", True)
    assert "1 (full on MRPC) to 2 (LoRA, r = 8 on MRPC)" in missing_table(View("made_up", tmp_path))


def test_which_training_examples(tmp_path):
    "Whole sentences only are no sample."
    for task, settings in (("sst2", dict(whole_texts=True)), ("rte", dict(max_train_examples=100))):
        run_folder(tmp_path, .8, task_name=task, method="lora", **settings)
    text = data_table(View("made_up", tmp_path))
    assert "| whole sentences only |" in text and "| a sample, the same for all runs |" in text


def test_run_folders_of_former_versions(tmp_path):
    "They lack what is newer: settings, the tuning split, the fingerprint of the checkpoint, study.json."
    for method, accuracy in (("full", .8), ("lora", .8)):
        for seed in range(3):
            folder = run_folder(tmp_path, accuracy, method=method, seed=seed, task_name="mrpc")
            for file in ("config.json", "result.json"):
                content = json.loads((folder/file).read_text())
                settings = content.get("config", content)
                for newer in ("tune_share", "cache_frozen", "placement"): settings.pop(newer, None)
                (folder/file).write_text(json.dumps(content))
    new = run_folder(tmp_path, .8, method="lora", seed=3, task_name="mrpc")
    table = load_runs("made_up", tmp_path)
    assert set(table.stage) == {"single"} and table[table.method == "lora"].configuration.nunique() == 1
    assert new.name in set(table.run_id)
    text = said(execute_report("made_up", tmp_path))
    assert "| protocol | no tuning split: dev chooses, and dev is reported |" in text and "| no linear probe |" in text


def test_several_data_sets_are_no_submission(tmp_path):
    for seed, data in ((0, "demo"), (1, "hub")): run_folder(tmp_path, .8, method="lora", seed=seed, data=data)
    with pytest.raises(BadInput, match="the runs of rte are on several data sets, .* do not compare: demo, hub"):
        choose(load_runs("made_up", tmp_path))


def test_more_tries_win_nothing():
    "Two methods without a difference, one with 16 configurations to choose from, the other with two, in 120 places."
    from peft_study.results.table import as_table, made_up
    rng, rows = np.random.default_rng(0), []
    bases = dict(lora=made_up("lora", .8, tune_share=.1), bitfit=made_up("bitfit", .8, tune_share=.1))
    def add(place, method, lr, seed):
        settings = dict(checkpoint=f"encoder-{place}", lr=float(lr), seed=seed)
        dev, tune = rng.normal(.8, .02, 2)   # every configuration is equally good
        config = bases[method]["config"] | settings
        run_id = f"{place}-{method}-{lr}-{seed}"
        rows.append(bases[method] | settings | dict(run_id=run_id, score=dev, tune_last_score=tune, config=config))
        return tune
    for place in range(120):
        for method, tried in (("bitfit", 2), ("lora", 16)):
            best = np.argmax([add(place, method, lr, 0) for lr in range(tried)])
            for seed in (1, 2, 3, 4, 5): add(place, method, best, seed)
    table = as_table(rows, final_seeds=[1, 2, 3, 4, 5])
    assert set(table.stage) == {"tune", "final"} and set(cell_means(table).tried) == {2, 16}
    found = compare(table, "bitfit")
    assert len(found) == 120 and (found.n == 5).all()
    assert (found.p <= .05).mean() <= .05 + 3 * (.05 * .95 / 120)**.5   # at most 6%: the lesson
    assert .36 < (found.difference > 0).mean() < .64
    grid = table[table.stage == "tune"]
    on_dev = grid.groupby(["encoder", "method"]).score.max().unstack()   # the usual way: what is best on dev, of dev
    assert (on_dev.lora > on_dev.bitfit).mean() > .8


@pytest.mark.parametrize("threads, warned", [((1, 2, 1), True), ((2, 2, 2), False)], ids=["differ", "alike"])
def test_different_numbers_of_threads(tmp_path, capsys, threads, warned):
    "The study's table says so once, and so does its report."
    for seed, n in enumerate(threads):
        folder = run_folder(tmp_path, .8, method="lora", seed=seed)
        result = json.loads((folder/"result.json").read_text())
        made = result["provenance"] | dict(threads=n, device="a processor")
        (folder/"result.json").write_text(json.dumps(result | dict(provenance=made)))
    print_table(load_runs("made_up", tmp_path), Console())
    assert capsys.readouterr().out.count("runs were made with 1 or 2 threads") == warned
    row = "| different numbers of threads, so that last bits may differ | 1; 2 |"
    assert (row in missing_table(View("made_up", tmp_path))) == warned
