"From a file to an answer: awkward files, labels that mean nothing, a leak, a kill, and the model that leaves."
import gzip, json, os, random, subprocess, time
import pandas as pd
import pytest
from conftest import PROGRAM, flags, kill_tree
from peft_study.answer.table import read_table, split_table
from peft_study.files import BadInput
from peft_study.tasks.data import words_of

WORDS = "the film was a long and quiet story about people who lived near old houses by sea with dogs cats birds".split()
NOISE = random.Random(0)


def sentence(): return " ".join(NOISE.choice(WORDS) for _ in range(12))


ROWS = [(sentence(), NOISE.choice(["good", "bad"])) for _ in range(200)]


def as_csv(rows, header="text,label", separator=","):
    quoted = [[f'"{cell}"' if separator in str(cell) else str(cell) for cell in row] for row in rows]
    return "\n".join([header] * bool(header) + [separator.join(row) for row in quoted]) + "\n"


def numbered(labels): return [(text, label) for (text, _), label in zip(ROWS, labels)]


READ = dict(
    no_header=(as_csv(ROWS, ""), "has no header: its columns are called 1, 2"),
    mark=("\ufeff" + as_csv(ROWS), "text from 'text'"),
    semicolons=(as_csv([(t.replace(" ", ", ", 3), y) for t, y in ROWS], "Text;Label", ";"), "text from 'Text'"),
    trailing_blanks=(as_csv([(t, y + "  ") for t, y in ROWS]), "2 labels (bad, good)"),
    not_a_number=(as_csv([(t, y if i % 10 else "NaN") for i, (t, y) in enumerate(ROWS)]), "20 rows without label"),
    html=(as_csv([(f"<p>{t}</p>", y) for t, y in ROWS]), "200 texts with HTML tags"),
    emoji=(as_csv([(t + " 😀", {"good": "👍", "bad": "👎"}[y]) for t, y in ROWS]), "2 labels (👍, 👎)"),
    index=(as_csv([(i, *row) for i, row in enumerate(ROWS)], "index,text,label"), "text from 'text'"),
    row_names=(as_csv([(i, *row) for i, row in enumerate(ROWS)], ",text,label"), "text from 'text'"),
    duplicates=(as_csv([*ROWS, *ROWS[:7]]), "7 exact duplicates"),
    single=(as_csv([*ROWS, (sentence(), "odd")]), "1 label with a single example"),
    numbers=(as_csv(numbered(i % 47 / 10 for i in range(200)), "text,score"), "numbers, predicted as such"),
    stars=(as_csv(numbered(i % 5 + 1 for i in range(200)), "review,stars"), "5 labels (1, 2, 3, 4, 5)"),
    few_dates=(as_csv(numbered(f"2024-0{i % 3 + 1}-01" for i in range(200))), "3 labels (2024-01-01"),
    large=(as_csv([(f"{t} {i}", y) for i in range(500) for t, y in ROWS]), "30,000 of 100,000 rows are used"),
)
REFUSED = dict(
    one_class=(as_csv(numbered(["good"] * 200)), "one label only, 'good'"),
    two_rows=(as_csv(ROWS[:2]), "at least 30 are needed"),
    page=("<!DOCTYPE html><html><body>a,b</body></html>", "a page in HTML"),
    dates=(as_csv(numbered(f"2024-{i % 12 + 1:02}-{i % 28 + 1:02}" for i in range(200))), "no labels to learn"),
    empty=("", "one column only"),
    header_alone=("text,label\n", "no rows"),
    unclear=(as_csv([(t, y, y) for t, y in ROWS], "text,liked,seen"), "which column is the label? give --label"),
)


@pytest.mark.parametrize("name", READ)
def test_read(name, tmp_path):
    content, said = READ[name]
    (tmp_path/f"{name}.csv").write_text(content)
    table = read_table(tmp_path/f"{name}.csv")
    parts, share = split_table(table)
    assert any(said in note for note in table.notes), table.notes
    sides = [set(map(words_of, parts[part].text)) for part in ("train", "dev")]
    assert not sides[0] & sides[1]
    assert set(parts["train"].label) == set(parts["dev"].label) or not table.labels
    assert .15 < len(parts["dev"]) / len(parts["train"]) < .3 and 0 < share < .5


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, tmp_path):
    content, said = REFUSED[name]
    (tmp_path/f"{name}.csv").write_text(content)
    with pytest.raises(BadInput) as refusal: split_table(read_table(tmp_path/f"{name}.csv"))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_kinds_agree(tmp_path):
    "The same rows are the same table, whatever kind of file they come in."
    frame = pd.DataFrame([(t, y == "good") for t, y in ROWS], columns=["text", "label"])
    frame.to_csv(tmp_path/"a.csv", index=False)
    frame.to_csv(tmp_path/"a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path/"a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path/"a.parquet")
    (tmp_path/"a.csv.gz").write_bytes(gzip.compress((tmp_path/"a.csv").read_bytes()))
    (tmp_path/"a").mkdir()
    frame[:160].to_csv(tmp_path/"a/train.csv", index=False)
    frame[150:].to_csv(tmp_path/"a/dev.csv", index=False)
    first, *others = [read_table(file).parts["train"] for file in sorted(tmp_path.glob("a.*"))]
    assert len(others) == 4
    for other in others: pd.testing.assert_frame_equal(first, other)
    folder = read_table(tmp_path/"a")
    assert (folder.left_out.reason == "in dev as well").sum() == 10 and len(folder.parts["dev"]) == 50


def test_commands_refuse(command, tmp_path):
    (tmp_path/"one.csv").write_text(REFUSED["one_class"][0])
    for words, said in ((["compare", tmp_path/"one.csv"], "one label only"),
                        (["compare", tmp_path/"no.csv"], "no such file"),
                        (["compare", tmp_path/"one.csv", "--methods", "lorra"], "unknown method"),
                        (["compare", tmp_path/"one.csv", "--checkpoint", "nowhere/at-all"], "nowhere/at-all")):
        offline = dict(env=os.environ | dict(HF_HUB_OFFLINE="1")) if "nowhere/at-all" in words else {}
        code, _, err = command(*words, **offline)
        assert code == 2 and said in err and err.count("\n") == 1, err


def compared(tmp_path, tiny, rows, **more):
    from peft_study import compare
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path/"rows.csv", index=False)
    said = []
    common = dict(minutes=4, methods="lora", checkpoint=str(tiny), outputs=tmp_path/"out", say=said.append)
    answer = compare(tmp_path/"rows.csv", **common | more)
    return answer, "\n".join(said)


def test_shuffled_labels(tmp_path, tiny):
    "Where labels mean nothing, nothing is learned, and it says so."
    to = tmp_path/"model"
    answer, said = compared(tmp_path, tiny, ROWS, minutes=1, export=to)   # a slow machine fits baselines alone
    assert answer.best.name == "constant" and "nothing is learned" in said
    assert "nothing is exported: no model is better than a constant prediction" in said and not to.exists()
    assert {"constant", "tfidf", "embeddings"} <= set(answer.table.method)
    page = (answer.folder/"answer.html").read_text()
    assert "nothing is learned" in page and "http" not in page   # nothing is loaded from elsewhere


def test_light():
    "What is imported from the package by name is a function, however often, and loads nothing before that."
    lines = ["import sys, peft_study", "assert not {'torch', 'pandas', 'transformers'} & set(sys.modules)",
             "from peft_study import compare, classify", "from peft_study import compare as again",
             "assert callable(compare) and compare is again and callable(classify)"]
    assert subprocess.run([PROGRAM[0], "-c", "\n".join(lines)]).returncode == 0


def test_leak(tmp_path, tiny, monkeypatch):
    "Where the text has the label, word counts are enough; the model leaves, and labels new texts; the study is kept."
    from peft_study import classify
    from peft_study.answer.compare import export_best
    from peft_study.answer.plan import study_of
    from peft_study.run.config import read_study
    from transformers import pipeline
    monkeypatch.chdir(tmp_path)
    rows = [(f"{t} {'yes' if y == 'good' else 'no'}", y) for t, y in ROWS]
    answer, said = compared(tmp_path, tiny, rows, export=tmp_path/"model", save_study=True)
    assert read_study("rows").configs == study_of(answer.folder).configs
    assert answer.best.name == "tfidf" and "take logistic regression on TF-IDF" in said
    assert answer.best.predict(["a story yes", "a story no"]) == ["good", "bad"]
    assert f"peft-study export {answer.fine_tuned.model} --to NEW" in said   # for whoever wants it all the same
    some = [t for t, _ in rows[:20]]
    for name in ("tfidf", "embeddings", answer.fine_tuned.name):   # whichever is recommended leaves
        answer.best = next(e for e in answer.entries if e.name == name)
        if name != "tfidf": export_best(answer, tmp_path/f"{name} model")
        model = tmp_path/("model" if name == "tfidf" else f"{name} model")
        labelled = classify(model, tmp_path/"rows.csv")
        assert answer.best.predict(some) == labelled.predicted[:20].tolist()
        assert "How it was chosen" in (model/"README.md").read_text()
        assert (labelled.filter(like="p(").sum(axis=1) - 1).abs().max() < 1e-4
    again = pipeline("text-classification", model=str(model))(some, truncation=True)
    assert [r["label"] for r in again] == labelled.predicted[:20].tolist()


def test_setfit_where_labels_are_few(tmp_path, tiny, monkeypatch):
    "It is run once and repeated like the others, the answer is held against it, and it leaves like the others."
    from peft_study import classify
    from peft_study.answer import compare as module
    from peft_study.answer.plan import METHODS, candidates
    monkeypatch.setattr(module, "candidates", lambda asked, *about: candidates(asked, *about)[-1:])   # the last alone
    rows = [(f"{t} {'yes' if y == 'good' else 'no'}", y) for t, y in ROWS[:60]]
    answer, said = compared(tmp_path, tiny, rows, methods=None)
    assert list(METHODS)[-1] == "setfit" and "SetFit, its own settings: " in said
    entry = answer.fine_tuned
    assert entry.name == "setfit" and "plan: 3 baselines, then 4 runs" in said
    assert len(list(answer.folder.glob("runs/*-setfit-*/result.json"))) == 4
    answer.best = entry
    module.export_best(answer, tmp_path/"model")
    labelled = classify(tmp_path/"model", tmp_path/"rows.csv")
    assert entry.predict([t for t, _ in rows]) == labelled.predicted.tolist()
    assert "Fitted with setfit" in (tmp_path/"model/README.md").read_text()


def test_goes_on_after_a_kill(tmp_path, tiny):
    "Killed, the same command keeps what is finished and comes to an answer."
    (tmp_path/"rows.csv").write_text(as_csv(ROWS))
    call = [*PROGRAM, "compare", "rows.csv", *flags(minutes=3, methods="lora", checkpoint=tiny, outputs="out")]
    output = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    def begin(): return subprocess.Popen(call, cwd=tmp_path, **output)
    child, until = begin(), time.monotonic() + 180
    def results(): return {f: f.read_bytes() for f in tmp_path.glob("out/rows/runs/*/result.json")}
    while not results() and time.monotonic() < until: time.sleep(.2)
    kill_tree(child)
    before = results()
    assert before
    child = begin()
    out, _ = child.communicate()
    assert child.returncode == 0 and "answer.html" in out, out
    assert before.items() <= results().items() and len(results()) > len(before)
    seeds = json.loads((tmp_path/"out/rows/study.json").read_text())
    assert seeds["seeds"] == [0] and seeds["final_seeds"] == [1, 2, 3]
