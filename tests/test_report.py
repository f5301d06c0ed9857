"The report as its readers meet it: the page, its figures and links, and studies that lack something."
import json, re, resource, shutil, time
from functools import partial
from html.parser import HTMLParser
import nbformat, pytest
from conftest import REPO
from peft_study.run.config import RunConfig
from peft_study.methods.core import method_names
from peft_study.share.cards import command_of
from peft_study.report import report as report_module
from peft_study.report.report import (execute_report, faults_of_pdf, options, quarto_program, render_with_pandoc,
                                      report)
from peft_study.run.kernels import ForkedKernel, execute_notebook
from peft_study.run.runs import read_config, start_run


class Page(HTMLParser):
    "Links, anchors, pictures and text of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.alts, self.words, self.headings, self.tag = [], set(), [], [], "", None
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if attrs.get("id"): self.ids.add(attrs["id"])
        if tag == "img": self.alts.append(attrs.get("alt", ""))
        self.tag = tag
    def handle_data(self, data):
        if self.tag not in ("style", "script"): self.words.append(data)
        if self.lasttag in ("h1", "h2"): self.headings += data
    @property
    def text(self): return " ".join(" ".join(self.words).split())


def unresolved(page): return re.findall(r"@(?:fig|tbl|sec|eq)-\w+|\[@|@[a-z]+\d{4}\w+", page.text)


def check_page(folder):
    "What holds of every report; returns the page."
    page, runs = Page((folder/"report.html").read_text()), Page((folder/"runs.html").read_text())
    assert not unresolved(page) and "Traceback" not in page.text and "#| label" not in page.text
    assert "nan" not in page.text.split()
    assert "🤗" not in page.text and "data:image/png" not in (folder/"report.html").read_text()
    assert not re.search(r"(?<![\w-])-\.?\d", page.text)   # minus signs are minus signs
    assert all(page.alts)   # pictures say what they show
    for link in page.links:
        if link.startswith("#"): assert link[1:] in page.ids, link
        elif link.startswith("runs.html#"): assert link.split("#")[1] in runs.ids, link
        elif link == "report.pdf": assert (folder/link).is_file()   # Quarto links its other formats
        else: assert link.startswith("https://"), link
    files = [link for link in runs.links if link.startswith("../")]
    assert files and all((folder/link).exists() for link in files)
    return page


def squeezed(text): return re.sub(r"[\s\u00ad\u2010-]", "", text.replace("−", "-").replace("’", "'"))


def table_rows(folder):
    "The rows of each table that the executed notebook shows, as the words of their cells."
    cells = nbformat.read(folder/"report.ipynb", 4).cells
    outputs = [o for c in cells if c.cell_type == "code" for o in c.outputs]
    shown = [o.data.get("text/markdown", "") for o in outputs if "data" in o]
    for text in (text for text in shown if "<details>" not in text):   # the appendix, which the PDF leaves out
        lines = re.findall(r"^\|(.*)\|$", re.sub(r"\[([^]]*)\](\([^)]*\)|\{\.unbroken\})", r"\1", text), re.M)
        if lines: yield [[re.sub(r"[*`\\]", "", cell) for cell in line.split(" | ")] for line in lines]


def check_pdf(folder):
    "The PDF's text without spaces; every table's last row is on a page, no text lies on another, or beyond the paper."
    from pypdf import PdfReader
    assert faults_of_pdf(folder/"report.pdf") == []
    text = squeezed("".join(page.extract_text() for page in PdfReader(folder/"report.pdf").pages))
    for rows in table_rows(folder):
        words = [part for cell in rows[-1] for part in re.split(r"@[\w-]+", cell)]   # a citation is written otherwise
        for part in words: assert squeezed(part) in text, rows[-1]
    return text


@pytest.fixture
def forked(monkeypatch):
    "A report's kernel is a fork, without the imports of a new one."
    monkeypatch.setattr(report_module, "execute_notebook", partial(execute_notebook, kernel=ForkedKernel))


@pytest.fixture(scope="module")
def reported(study, undisturbed):
    "The report of a study of eight runs: four configurations, one of which trains the top layer, and two seeds."
    files, missing = report("eight", study.folder/"quiet")
    assert [f.name for f in files] == ["report.html", "report.pdf"] and bool(missing) == (quarto_program() is None)
    return files[0].parent


def test_page(reported, undisturbed):
    page, printed = check_page(reported), check_pdf(reported)
    for words in ("1 What was run", "Table 3", "Figure 1", "References", "Houlsby", "synthetic", "8 finished",
                  "fewer than three seeds: no intervals", "no full fine-tuning", "Learning curves", "Appendix"):
        assert words in page.text, words
    for words in ("Pairs", "Questions asked beforehand", "Differences"):   # sections that the study has nothing for
        assert f"{words}" not in page.headings, words
    assert all(run in page.text and squeezed(run) not in printed for run in undisturbed)
    notebook = nbformat.read(reported/"report.ipynb", 4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type in ("error", "stream")]


def test_numbers_lead_to_runs(reported, study, command):
    "Each mean of the trace is that of its runs, and each command is of the run's own identity."
    tables = json.loads((reported/"trace.json").read_text())
    runs = study.folder/"quiet/eight/runs"
    for cell in tables["tbl-sizes"].values():
        scores = [json.loads((runs/r["run_id"]/"result.json").read_text())["score"] for r in cell["runs"]]
        assert cell["text"] == f"{100 * sum(scores) / len(scores):.1f}"
        assert all(r["command"] == command_of(read_config(runs/r["run_id"])) for r in cell["runs"])
    code, out, err = command("trace", "tbl-main", "cola/lora", outputs=study.folder/"quiet")
    assert code == 0 and out.count("result.json") == 2 and out.count("peft-study run") == 2, err
    code, out, err = command("trace", "tbl-main", "cola/prefix", outputs=study.folder/"quiet")
    assert code == 2 and "there are cola/top_k, cola/adapter, cola/lora" in err
    code, out, err = command("report", "nothing", outputs=study.folder/"quiet")
    assert code == 2 and "no study 'nothing'" in err and len(err.strip().splitlines()) == 1


def test_published_study(command, tmp_path):
    "A fresh clone renders a published study, and traces each of its numbers."
    code, out, err = command("report", "ablation_init", "--to", "html", outputs=tmp_path)
    assert code == 0 and "start near the identity" in check_page(tmp_path/"ablation_init/report").text, err
    tables = json.loads((tmp_path/"ablation_init/report/trace.json").read_text())
    runs = [run for cells in tables.values() for cell in cells.values() for run in cell["runs"]]
    assert {run["study"] for run in runs} == {"ablation_init"} and all(run["command"] for run in runs)
    cell = next(iter(tables["tbl-init"]))
    code, out, err = command("trace", "tbl-init", cell, outputs=tmp_path)
    assert code == 0 and out.count("peft-study run") == 5, err


@pytest.mark.parametrize("keep, words", [
    (dict(method="lora", size="r1", seed=0), "no linear probe"),
    (dict(method="lora"), "no full fine-tuning"),
    (dict(seed=0), "fewer than three seeds: no intervals, no tests"),
], ids=["one run", "a missing method", "one seed"])
def test_what_is_missing_is_said(forked, study, undisturbed, tmp_path, keep, words):
    source = study.folder/"quiet/eight/runs"
    for folder in source.iterdir():
        config = read_config(folder)
        about = dict(method=config.method.name, size=config.method.size, seed=config.seed)
        if about | keep == about: shutil.copytree(folder, tmp_path/"eight/runs"/folder.name)
    report("eight", tmp_path)
    assert words in check_page(tmp_path/"eight/report").text and check_pdf(tmp_path/"eight/report")


def test_failed_run(forked, study, undisturbed, tmp_path):
    shutil.copytree(study.folder/"quiet/eight/runs", tmp_path/"eight/runs")
    failed = next((tmp_path/"eight/runs").glob("cola-adapter-*-s1-*"))
    (failed/"result.json").unlink()
    (failed/"error.txt").write_text("OutOfMemoryError: out of *memory* at [step](2)\n")
    report("eight", tmp_path)
    page = check_page(tmp_path/"eight/report")
    assert "7 finished, 1 failed" in page.text and "runs failed" in page.text
    assert "out of *memory* at [step](2)" in page.text   # as it is, not as Markdown


def make_run(outputs, score, **settings):
    "The folder of a run that was never made."
    config = RunConfig(**dict(study="many") | settings)
    folder = start_run(config, outputs)
    dev = dict.fromkeys(("matthews", "accuracy", "f1", "pearson", "spearman"), score)
    size = int(re.sub(r"\D", "", config.method.size) or 1)
    parameters = dict(trainable=1000 * size, total=10**6, share=size / 1000)
    cost = dict(train_seconds=9, examples_per_second=9, peak_memory_bytes=1e9, adapter_bytes=1e6)
    result = dict(run_id=config.run_id, size=config.method.size, score=score, config=config.flat(),
                  parameters=parameters, dev=dict(last=dev, best=dev), cost=cost,
                  provenance=dict(finished="2026", code="a"))
    (folder/"result.json").write_text(json.dumps(result))
    (folder/"notebook.ipynb").touch()
    log = [dict(step=epoch, epoch=epoch, loss=1 / epoch) for epoch in range(1, 5)]
    (folder/"metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    return config.run_id


def sizes(method): return dict(full=("top_k", range(1, 13)), lora=("rank", [2**k for k in range(10)]),
                               adapter=("bottleneck_size", [2**k for k in range(10)]))[method]


def test_a_thousand_runs(tmp_path):
    "Table and figures of 1,000 run folders in under 20 seconds."
    from peft_study.results.plots import cost_vs_score, plt, score_vs_parameters
    from peft_study.report.report import Trace
    from peft_study.report.tables import main_table, size_table
    from peft_study.results.table import DevExamples, compare, load_runs
    made = 0
    for task in ("cola", "sst2", "mrpc", "stsb", "rte"):
        for method in ("lora", "adapter", "full"):
            name, values = sizes(method)
            for size in values:
                for seed in range(7):
                    if made == 1000: break
                    make_run(tmp_path, .5 + made / 3000, task_name=task, method=method, seed=seed, **{name: size})
                    made += 1
    assert made == 1000
    start = time.time()
    table, trace = load_runs("many", tmp_path), Trace()
    for draw in (score_vs_parameters, cost_vs_score): plt.close(draw(table))
    examples = DevExamples(tmp_path)   # which there are none of
    assert len(compare(table, "top_k")) == 8
    assert main_table(table, trace, examples) and size_table(table, trace, examples)
    print(f"{time.time() - start:.1f} s")
    assert time.time() - start < 20


def seconds_of_children(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def test_every_row_of_a_long_table(tmp_path):
    "The 160 runs of the scaling study and one of every method, each in the page's appendix, whoever renders it."
    made = []
    for method in ("full", "adapter", "lora"):
        name, values = sizes(method)
        def one(k, size, seed):
            score = .6 + .01 * k + .001 * seed
            return make_run(tmp_path, score, task_name="mnli", method=method, seed=seed, **{name: size})
        made += [one(k, size, seed) for k, size in enumerate(values) for seed in range(5)]
    assert len(made) == 160
    made += [make_run(tmp_path, .6, task_name="rte", method=method) for method in method_names()]
    make_run(tmp_path, .6, task_name="rte", method="lora", study="one")
    started = seconds_of_children()
    execute_report("one", tmp_path)
    before = seconds_of_children()
    notebook = execute_report("many", tmp_path)
    assert seconds_of_children() - before < 3 * (before - started)   # twice as long, whatever the machine
    render_with_pandoc(notebook)
    check_every_row(notebook.parent, made)
    if quarto_program():
        report("many", tmp_path)
        check_every_row(notebook.parent, made)


def check_every_row(folder, runs):
    page, text = check_page(folder), check_pdf(folder)
    for run in runs: assert run in page.text and squeezed(run) not in text, run


def test_source_follows_quarto():
    "Labels, captions and options as Quarto wants them; nothing that belongs to one machine."
    notebook, labels = nbformat.read(REPO/"reports/report.ipynb", 4), set()
    text = "\n".join(c.source for c in notebook.cells)
    for cell in notebook.cells:
        found = options(cell.source) if cell.cell_type == "code" else {}
        if label := found.get("label"):
            labels.add(label)
            kind = label.split("-")[0]
            assert cell.source.startswith("#| label") and kind in ("fig", "tbl"), label
            assert found[f"{kind}-cap"].endswith("."), label
            assert kind == "tbl" or found.get("fig-alt"), label   # what a picture shows, for who cannot see it
    labels |= set(re.findall(r"\{#((?:sec|eq)-[\w-]+)\}", text))
    assert set(re.findall(r"@((?:fig|tbl|sec|eq)-[\w-]+)", text)) <= labels
    keys = set(re.findall(r"^@\w+\{([\w-]+),", (REPO/"reports/references.bib").read_text(), re.M))
    assert set(re.findall(r"@([a-z]+\d{4}[a-z]+)", text)) <= keys
    assert "/home/" not in text and "/work" not in text and "/tmp" not in text
    assert "🤗" not in text   # an empty box in most fonts
    assert "breakable" in (REPO/"_quarto.yml").read_text()


def test_paper(tmp_path):
    "The stored paper renders as it is: its references resolve, and README's part of it is not shown twice."
    shutil.copy(REPO/"reports/paper.ipynb", tmp_path)
    page = Page(render_with_pandoc(tmp_path/"paper.ipynb")[0].read_text())
    assert not unresolved(page) and "Houlsby" in page.text and "Table 2" in page.text
    assert all(link.startswith(("#", "https://")) for link in page.links)
    assert page.text.count("Take adapters") == 2
    text = (tmp_path/"paper.ipynb").read_text()
    assert "/home/" not in text and "/work" not in text and "/tmp" not in text
    assert "reports/paper.ipynb" in (REPO/"_quarto.yml").read_text()


def test_subtitle():
    "A study of synthetic data is not one of GLUE, whatever its tasks are called."
    import pandas as pd
    from peft_study.report.report import subtitle
    def of(*rows): return subtitle(pd.DataFrame(rows, columns=["task_name", "data"]))
    assert of(("cola", "demo"), ("sst2", "demo")).endswith("on synthetic data")
    assert of(("cola", "hub")).endswith("on GLUE")


def test_a_quarto_that_does_not_end(tmp_path, monkeypatch):
    program = tmp_path/"quarto"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(report_module, "quarto_program", lambda: str(program))
    monkeypatch.setattr(report_module, "QUARTO_SECONDS", .5)
    with pytest.raises(RuntimeError, match="quarto render --to html has not ended within 0.5 s"):
        report_module.render_with_quarto(tmp_path/"report.ipynb", ["html"])
