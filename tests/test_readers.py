"Every reader of a file that others may have written gives a value or BadInput, whatever is in the file."
import json, os
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_study.bench.bench import read_bench
from peft_study.cli import shortened
from peft_study.run.config import RunConfig, read_study
from peft_study.tasks.data import read_file
from peft_study.encoders import Sites, tiny_config
from peft_study.share.exchange import peft_method
from peft_study.files import BadInput
from peft_study.tasks.glue import get_task, make_task
from peft_study.methods.core import apply_method, find_method, load_adapter, save_adapter
from peft_study.report.report import trace_cell
from peft_study.results.table import cell_means, load_runs, predictions_of
from peft_study.run.runs import cut_metrics, read_config, read_metrics, read_record, read_result
from peft_study.share.submission import score_submission

EXAMPLES = int(os.environ.get("EXAMPLES", 30))   # of each reader and each kind of damage
a_few = settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)

CONFIG = RunConfig(task_name="rte", data="demo", method="lora", rank=2)
SCORES = dict(accuracy=.7, score=.7, epoch=3)
RESULT = dict(run_id=CONFIG.run_id, size="r2", config=CONFIG.flat(), score=.7,
              dev=dict(last=SCORES, best=SCORES), steps=9, parameters=dict(trainable=10, total=100, share=.1),
              cost=dict(train_seconds=2., examples_per_second=9.5, batch_parts=1),
              provenance=dict(finished="2026-01-01T00:00:00+00:00", code="01234567", versions=dict(torch="2"),
                              threads=2, data_fingerprint="ab"))
METRICS = [dict(step=1, steps=9, epoch=.3, loss=.7, lr=1e-4, grad_norm=1., examples_per_second=9., seconds_left=3.),
           dict(step=9, dev_score=.6, epoch=1)]
CELL = dict(text="70.0", runs=[dict(run_id="a", study="s", score=.7, command="peft-study run")])
PEFT = dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["query", "value"], bias="none", lora_dropout=0.,
            modules_to_save=["classifier"])
INI = """[s]
task_name = rte mrpc
data = demo
betas = 0.9,0.999
[s.lora]
rank = 1 2
alpha = rank
[s.full]
top_k = none 1
"""
TSV = ("index\tsentence1\tsentence2\tlabel\n"
       "0\tA dog sleeps.\tA dog.\tentailment\n1\tIt rains.\tIt snows.\tnot_entailment\n")
ANSWERS = "index\tprediction\n0\tentailment\n1\tnot_entailment\n"
PREDICTIONS = "index\tlabel\tprediction\n0\tentailment\tentailment\n1\tentailment\tnot_entailment\n"

def lists_and_dictionaries(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)

values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
                      lists_and_dictionaries, max_leaves=4)


def places(value, path=()):
    "The paths to all parts of a JSON value."
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children: yield from places(child, (*path, key))


def replaced(value, path, new):
    if not path: return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@st.composite
def other_json(draw, value):
    "The value with one of its parts replaced."
    return json.dumps(replaced(value, draw(st.sampled_from(list(places(value)))), draw(values))).encode()


@st.composite
def other_bytes(draw, content:bytes):
    "A file that was cut, that has other bytes in its middle, or that is something else."
    start, end = sorted((draw(st.integers(0, len(content))), draw(st.integers(0, len(content)))))
    middle, other = draw(st.binary(max_size=8)), draw(st.binary(max_size=40))
    mark, utf16, windows = b"\xef\xbb\xbf" + content, content.decode().encode("utf-16"), content.replace(b"\n", b"\r\n")
    damaged = [content[:start], content[:start] + middle + content[end:], other, mark, utf16, windows]
    return draw(st.sampled_from(damaged))


ODD_WORDS = ["\t", "\n", "[", "[s.lora]", "\"", "=", "none", "nan", "1e999", "²", "\u2028", ":", "-1", "\x00"]

@st.composite
def other_text(draw, text:str):
    "A text with another word, line or character somewhere."
    at = draw(st.integers(0, len(text)))
    new = draw(st.text(max_size=6) | st.sampled_from(ODD_WORDS))
    return (text[:at] + new + text[draw(st.integers(at, min(len(text), at + 8))):]).encode("utf-8", "replace")


def read_adapter(folder): load_adapter(MODEL, METHOD, folder/"adapter")
def read_peft(folder): peft_method(folder/"adapter", Sites(tiny_config()))
def read_configuration(folder): return read_config(folder/RUN).run_id
def read_trace(folder): return trace_cell("tbl-main", "rte/lora", "s", folder)[1]["runs"]
def read_rows(folder): return read_bench(folder, dict(data="demo"))


def read_study_json(folder):
    read_record("study", folder)
    load_runs("study", folder)


def read_submission(folder):
    content = (folder/"RTE.tsv").read_bytes()
    (folder/"labels/RTE.tsv").write_bytes(ANSWERS.replace("prediction", "label").encode())
    score_submission(folder, folder/"labels")
    (folder/"labels/RTE.tsv").write_bytes(content.replace(b"prediction", b"label"))
    score_submission(folder, folder/"labels")


METHOD = find_method("head")()
RUN = f"study/runs/{CONFIG.run_id}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What lies beside a file of each kind."
    from transformers import AutoModelForSequenceClassification
    global MODEL
    MODEL = apply_method(AutoModelForSequenceClassification.from_config(tiny_config(num_labels=2)), METHOD)
    folder = tmp_path_factory.mktemp("read")
    for name in (f"{RUN}/predictions", "s/report", "RTE", "labels", "own", "csv"): (folder/name).mkdir(parents=True)
    (folder/RUN/"config.json").write_text(json.dumps(CONFIG.flat()))
    save_adapter(MODEL, METHOD, folder/"adapter", {})
    return folder


def read_run(folder):
    "A damaged result counts as none, and the table has the run all the same."
    run = folder/RUN
    result = read_result(run)
    table = load_runs("study", folder)
    assert len(table) == 1 and (table.status.iloc[0] == "done") == (result is not None)
    cell_means(table)


def read_log(folder):
    run = folder/RUN
    try: assert all(isinstance(m["step"], int) for m in read_metrics(run))
    finally: cut_metrics(run, 5)
    assert all(m["step"] <= 5 for m in read_metrics(run))


LOG = "".join(json.dumps(m) + "\n" for m in METRICS)
OWN = dict(columns=["text"], labels=["bad", "good"], metrics=["accuracy"], label="label", test_labelled=True)
OWN_RUN = dict(task_name="own", method="head", data="demo", task=OWN)
OWN_CSV = 'text,label\n"fine, ""quite""",good\ndull,bad\n'


def read_own(folder):
    task = make_task("own", OWN, "here")
    return read_file(task, "train", folder/"csv")


JSON = {f"{RUN}/config.json": (CONFIG.flat(), read_configuration),
        "own/config.json": (OWN_RUN, lambda f: read_config(f/"own")),
        f"{RUN}/result.json": (RESULT, read_run),
        "study/study.json": (dict(name="study", seeds=[0], final_seeds=[1, 2], auto="fp32"), read_study_json),
        "adapter/run.json": (dict(method="head", checkpoint="x"), read_adapter),
        "adapter/adapter_config.json": (PEFT, read_peft),
        "s/report/trace.json": ({"tbl-main": {"rte/lora": CELL}}, read_trace),
        "bench.json": (dict(settings=dict(data="demo"), machine={}, rows=[dict(task="rte")]), read_rows)}
TEXT = {f"{RUN}/metrics.jsonl": (LOG, read_log),
        "settings.ini": (INI, lambda f: [c.run_id for c in read_study("s", f/"settings.ini").configs]),
        "RTE/train.tsv": (TSV, lambda f: read_file(get_task("rte"), "train", f)),
        f"{RUN}/predictions/dev.tsv": (PREDICTIONS, lambda f: predictions_of(CONFIG.run_id, f/"study")),
        "csv/train.csv": (OWN_CSV, read_own),
        "RTE.tsv": (ANSWERS, read_submission)}


def holds(damaged, folder, name, read):
    "Whatever is in the file, there is a value or BadInput."
    file = folder/name
    before = file.read_bytes() if file.is_file() else None

    @a_few
    @given(damaged)
    def check(content):
        file.write_bytes(content)
        try: read(folder)
        except BadInput as e: assert str(e)

    check()
    file.unlink()
    if before is not None: file.write_bytes(before)


@pytest.mark.parametrize("name", JSON)
def test_other_values(folder, name):
    value, read = JSON[name]
    holds(other_json(value), folder, name, read)


@pytest.mark.parametrize("name", TEXT)
def test_other_words(folder, name):
    text, read = TEXT[name]
    holds(other_text(text), folder, name, read)


@pytest.mark.parametrize("name", [*JSON, *TEXT])
def test_other_bytes(folder, name):
    value, read = (JSON | TEXT)[name]
    text = value if isinstance(value, str) else json.dumps(value)
    holds(other_bytes(text.encode()), folder, name, read)


@given(values)
@a_few
def test_settings_of_any_kind(value):
    for name in [*RunConfig.model_fields, "rank", "targets", "self"]:
        try: RunConfig(**dict(task_name="rte", method="lora", data="demo") | {name: value}).run_id
        except BadInput as e: assert len(shortened(str(e))) < 700
