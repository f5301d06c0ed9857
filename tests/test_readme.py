"README's numbers are those of the records."
import json, re
from zipfile import ZipFile
import pandas as pd
import pytest
from conftest import REPO
from peft_study.bench.bench import against_peers, ratios
from peft_study.results.plots import number

TEXT = (REPO/"README.md").read_text()


def test_submission(command, glue, tmp_path):
    "A fresh clone makes the published submission from the records."
    if glue.resolve() != (REPO/"../shared/glue").resolve(): pytest.skip("the published runs name ../shared/glue")
    code, out, err = command("predict", "small", "--fill", cwd=REPO, outputs=tmp_path)
    assert code == 0, err
    made, published = tmp_path/"small/submission/best", REPO/"reports/records/small/submission/best"
    assert (made/"manifest.json").read_text() == (published/"manifest.json").read_text()
    with ZipFile(published/"submission.zip") as z:
        for name in z.namelist(): assert (made/name).read_bytes() == z.read(name), name


def mean_and_spread(scores) -> str:
    "Such as `0.17 ± 0.08`."
    return f"{number(scores.mean(), 'z.2f')} ± {number(scores.std(), 'z.2f')}"


def test_untrained(glue):
    "What the checkpoint scores before any training, as recorded."
    import torch
    from transformers import AutoModel, AutoTokenizer
    from peft_study.tasks.data import minilm_folder, read_split
    from peft_study.tasks.glue import METRICS, get_task
    folder, pairs = minilm_folder(), list(read_split(get_task("stsb"), "dev", glue))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def embed(sentences): # (sentences, width), of unit length
        tokens = tokenizer(sentences, padding=True, truncation=True, max_length=128, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        mean = (model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=1)

    def cosines(some): return (embed([e.a for e in some]) * embed([e.b for e in some])).sum(1)
    cosine = torch.cat([cosines(pairs[i:i + 64]) for i in range(0, len(pairs), 64)]).numpy()
    row = pd.read_csv(REPO/"reports/published/untrained.csv").set_index("task_name").loc["stsb"]
    assert (row.checkpoint, row.examples) == ("minilm", len(pairs))
    labels = [e.label for e in pairs]
    for metric in ("pearson", "spearman"):
        assert METRICS[metric](cosine, labels) == pytest.approx(row[metric], abs=1e-3)


def test_demo_table():
    runs = pd.read_csv(REPO/"reports/records/demo/results.csv")
    names = dict(lora="LoRA r = {}", adapter="adapters m = {}", full="full fine-tuning",
                 head="linear probe (pooler and head)")
    for (method, size), cell in runs.groupby(["method", "size"]):
        scores = [mean_and_spread(cell.score[cell.task_name == task]) for task in ("cola", "sst2")]
        row = [names[method].format(size[1:]), f"{cell.parameters_trainable.iloc[0]:,}", *scores]
        assert f"| {' | '.join(row)} |" in TEXT
    assert f"{len(runs)} runs" in TEXT


@pytest.mark.parametrize("side, written", [("ours", r"LoRA on MiniLM trains ([\d.]+) times"),
                                           ("ours_fp32", r"at equal precision it is ([\d.]+) to ([\d.]+) times")])
def test_speed(side, written):
    rows = json.loads((REPO/"reports/records/bench/bench.json").read_text())["rows"]
    found = ratios(rows, side).query("method == 'lora'").ratio
    expected = [found.median()] if side == "ours" else [found.min(), found.max()]
    assert [f"{x:.1f}" for x in expected] == list(re.search(written, TEXT).groups())


def test_peers():
    "The table of the peer at its best and at its defaults is the record's."
    record = REPO/"reports/records/bench_peers/bench.json"
    if not record.is_file(): pytest.skip("not measured on a quiet machine yet: see nbs/bench/01_bench.ipynb")
    assert against_peers(json.loads(record.read_text())["rows"]) in TEXT
