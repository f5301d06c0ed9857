"README's numbers are those of the records."
import json, re, shutil
from unittest.mock import patch
from zipfile import ZipFile
import nbformat
import pandas as pd
import pytest
from conftest import REPO
from peft_study.bench.bench import against_peers, ratios
from peft_study.files import BadInput
from peft_study.report.facts import Facts, _README_PART, execute_paper, readme_part

TEXT = (REPO/"README.md").read_text()


def test_findings(tmp_path):
    "The first screen is what the paper shows, whose numbers and claims are checked in its execution."
    executed = execute_paper(tmp_path/"paper.ipynb")
    found = _README_PART.search(TEXT)
    assert found and found[0] == found[1] + readme_part(executed) + found[2]


def written_paper(core) -> dict:
    "The names of the paper's summary, computed from these records of `core`."
    from peft_study.report import facts
    cells = [c.source for c in nbformat.read(REPO/"reports/paper.ipynb", 4).cells if c.cell_type == "code"]
    code = "\n".join(cells[:3]).replace("%config InlineBackend", "# %config InlineBackend")
    names = {"facts": None}
    known = facts.facts   # which reads each study once
    with patch.object(facts, "facts", lambda study: core if study == "core" else known(study)): exec(code, names)
    return names


def test_claims(tmp_path, monkeypatch):
    "A number that changes in the records changes the text; a claim that is no longer true fails by its words."
    monkeypatch.chdir(REPO/"reports")   # where the paper is executed
    records = tmp_path/"core"
    shutil.copytree(REPO/"reports/records/core", records)
    core = Facts("core", records)
    before = written_paper(core)["short"]
    assert core.megabytes("adapter") < 1 and "0.7 MB" in before
    worse = [json.loads(line) for line in (records/"runs.jsonl").read_text().splitlines()]
    for run in worse:
        if run["config"]["method"] == "adapter": run["result"]["cost"]["adapter_bytes"] *= 2
    (records/"runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in worse))
    assert "become 1.3 MB" in written_paper(Facts("core", records))["short"]
    for run in worse:
        if run["config"]["method"] == "adapter": run["result"]["score"] -= .05
    (records/"runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in worse))
    with pytest.raises(AssertionError, match="within 1.5 points of full fine-tuning"):
        written_paper(Facts("core", records))


def test_facts():
    "What is asked of a method that the study does not have is one line."
    core = Facts("core")
    with pytest.raises(BadInput, match="'lorra' is not reported on"): core.difference("lorra")
    with pytest.raises(BadInput, match="'adapter' is not reported on mrpc"): Facts("base").difference("adapter")
    with pytest.raises(BadInput, match="no published records"): Facts("no_such")


def test_code(tmp_path, monkeypatch):
    "README's lines for one's own code run as they stand."
    from transformers import BertConfig, BertForSequenceClassification
    monkeypatch.chdir(tmp_path)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)
    BertForSequenceClassification(BertConfig(**sizes)).save_pretrained("tiny")
    rows = [dict(input_ids=[1 + i] * 8, attention_mask=[1] * 8, labels=i % 2) for i in range(8)]
    code = re.search("```python\n(.*?)```", TEXT, re.DOTALL)[1]
    names = dict(checkpoint="tiny", rows=rows)
    exec(code, names)
    assert not any("lora" in name for name in BertForSequenceClassification.from_pretrained("merged").state_dict())
    assert (tmp_path/"adapter/adapter_config.json").is_file()


def test_length():
    "The first screen is short, and so is the whole."
    first = TEXT.partition("```bash")[0]
    assert len([w for line in first.splitlines() if not line.startswith("|") for w in line.split()]) <= 250
    assert len(TEXT.splitlines()) <= 150


@pytest.mark.parametrize("study", ["small", "core"])
def test_submission(study, command, glue, tmp_path):
    "A fresh clone makes the published submission from the records."
    if glue.resolve() != (REPO/"../shared/glue").resolve(): pytest.skip("the published runs name ../shared/glue")
    code, out, err = command("predict", study, "--fill", cwd=REPO, outputs=tmp_path)
    assert code == 0, err
    made, published = tmp_path/study/"submission/best", REPO/"reports/records"/study/"submission/best"
    assert (made/"manifest.json").read_text() == (published/"manifest.json").read_text()
    with ZipFile(published/"submission.zip") as z:
        for name in z.namelist(): assert (made/name).read_bytes() == z.read(name), name


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


@pytest.mark.parametrize("side, written", [("ours", r"in hardware, it is ([\d.]+) times"),
                                           ("ours_fp32", r"([\d.]+) to ([\d.]+) times with both in fp32")])
def test_speed(side, written):
    rows = json.loads((REPO/"reports/records/bench/bench.json").read_text())["rows"]
    found = ratios(rows, side).query("method == 'lora'").ratio
    expected = [found.median()] if side == "ours" else [found.min(), found.max()]
    assert [f"{x:.1f}" for x in expected] == list(re.search(written, TEXT).groups())


def test_peers():
    "The table of the peer at its best and at its defaults is the record's."
    record = REPO/"reports/records/bench_peers/bench.json"
    assert against_peers(json.loads(record.read_text())["rows"]) in TEXT
