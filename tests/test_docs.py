"The pages of the site, as nbdev prepares them for Quarto; Quarto itself is not needed."
import json, re, subprocess, sys
import pytest, yaml
from conftest import REPO
from peft_study.report.docs import contents

def hidden(notebook): return any(part.startswith((".", "_")) for part in notebook.relative_to(REPO).parts)

SOURCES = sorted(notebook for notebook in (REPO/"nbs").rglob("*.ipynb") if not hidden(notebook))


def cells(notebook): return json.loads(notebook.read_text())["cells"]
def source(cell): return "".join(cell["source"])
def named(notebook): return str(notebook.relative_to(REPO/"nbs"))


@pytest.fixture(scope="module")
def prepared():
    "The folder of prepared pages, and what nbdev had to say."
    command = [sys.executable, "-c", "from nbdev.serve import proc_nbs; proc_nbs(force=True)"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return REPO/"_proc", done.stderr


def test_cells_run_apart(prepared):
    "nbdev runs a cell with an import whole, and no other lesson: imports stand alone."
    assert "Found cells containing imports and other code" not in prepared[1]


@pytest.mark.parametrize("notebook", SOURCES, ids=named)
def test_page(prepared, notebook):
    page = cells(prepared[0]/named(notebook))
    front = yaml.safe_load(source(page[0]).strip().strip("-"))
    assert front["title"] and front["description"]
    shown = "\n".join(source(c) for c in page)
    words = [source(c) for c in cells(notebook) if c["cell_type"] == "markdown"]
    # nbdev drops what else is in the cell of title and description
    assert re.fullmatch(r"# .*\n\n> .*", words[0]), "title and description have a cell of their own"
    for text in words[1:]: assert text.split()[-1] in shown
    if "#| default_exp" in notebook.read_text():
        imports = [c for c in page[:6] if source(c).startswith(("import ", "from "))]
        assert not imports, "a page begins with imports: #| hide"
    for cell in page:
        pictures = [o for o in cell.get("outputs", []) if any(k.startswith("image/") for k in o.get("data", {}))]
        assert not pictures or "#| fig-alt: " in source(cell), "a picture without alternative text"
    for output in [o for c in page for o in c.get("outputs", [])]:
        text = json.dumps(output)
        assert "__main__" not in text and "it/s]" not in text and "text/html" not in output.get("data", {})


def test_sidebar():
    "The sidebar lists every notebook."
    def listed(contents):
        for entry in contents:
            if isinstance(entry, str): yield entry
            elif "href" in entry: yield entry["href"]
            if isinstance(entry, dict): yield from listed(entry["contents"])
    sidebar = yaml.safe_load((REPO/"nbs/_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    assert sorted(listed(sidebar)) == sorted(map(named, SOURCES))


@pytest.mark.parametrize("notebook", SOURCES, ids=named)
def test_links(notebook):
    "Each link to a file leads to one."
    words = "\n".join(source(c) for c in cells(notebook) if c["cell_type"] == "markdown")
    for link in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", words): assert (notebook.parent/link).exists(), link


def test_index():
    "The list that is stored in the index is the one that the notebooks' titles make now."
    outputs = [o for c in cells(REPO/"nbs/index.ipynb") for o in c.get("outputs", [])]
    stored = ["".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})]
    assert stored == [contents(REPO/"nbs")], "run nbdev-test --save nbs/index.ipynb"
