"What compares the stored outputs of notebooks with what they show: it finds what is stale, and nothing else."
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from notebooks import differing


def notebook(text, tags=(), name="stdout"):
    cell = new_code_cell("f()", outputs=[new_output("stream", name=name, text=text)], metadata=dict(tags=list(tags)))
    return new_notebook(cells=[cell])


STALE = [("prefix 1", "full 1"), ("96,027 parameters", "96,029 parameters"), ("score 0.71", "score 0.74"),
         ("one\ntwo", "one"), ("r8", "r4"), ("", "a line")]
FRESH = [("loss 0.69314", "loss 0.69317"), ("6.7e-08", "1.2e-07"), ("a  b\nc", "a b c"),
         ("<A at 0x7f00aa00bb00>", "<A at 0x7f11cc11dd11>"), ("ok\n", "10 examples [00:00, 12.5 examples/s]\nok\n"),
         ("step 2/2 · loss 0.6 · 9 examples/s\n1", "step 2/2 · loss 0.6 · 8 examples/s\n1")]


@pytest.mark.parametrize("stored, found", STALE)
def test_stale(stored, found):
    assert len(differing(notebook(stored), notebook(found))) == 1
    assert not differing(notebook(stored, ["varies"]), notebook(found))


@pytest.mark.parametrize("stored, found", FRESH)
def test_fresh(stored, found): assert not differing(notebook(stored), notebook(found))


def test_results_and_pictures():
    def result(**data): return new_notebook(cells=[new_code_cell("x", outputs=[new_output("display_data", data=data)])])
    def table(words, html): return result(**{"text/plain": words, "text/html": html})
    assert not differing(table("a 1", "<td>1</td>"), table("a 1", "<td>one</td>"))
    assert differing(table("a 1", ""), table("b 1", ""))
    figure = {"text/plain": "<Figure size 900x240 with 3 Axes>"}
    assert not differing(result(**figure, **{"image/png": "AAAA"}), result(**figure, **{"image/png": "BBBB"}))
    assert not differing(notebook("warning", name="stderr"), notebook("", name="stderr"))


def test_tags_stay():
    "Cleaning keeps the tag."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    nb = notebook("1 s", ["varies"])
    clean_nb(nb, allowed_cell_metadata_keys=get_config().allowed_cell_metadata_keys)
    assert nb.cells[0].metadata.tags == ["varies"] and nbformat.validate(nb) is None
