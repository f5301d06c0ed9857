"Real GLUE data: every split loads with its official number of rows, and one run of each kind of task goes through."
import json
import pytest
from conftest import flags
from peft_study.tasks.data import has_split, read_split
from peft_study.tasks.glue import TASKS, splits

# train, dev, test; QNLI, MNLI and QQP are samples in the folder the tests are written for
ROWS = dict(cola=(8551, 1043, 1063), sst2=(67349, 872, 1821), mrpc=(3668, 408, 1725), stsb=(5749, 1500, 1379),
            rte=(2490, 277, 3000), wnli=(635, 71, 146), qnli=(None, 5463, 5463), mnli=(None, 9815, None),
            qqp=(None, None, None))


@pytest.mark.parametrize("name", TASKS)
def test_rows(glue, name):
    task = TASKS[name]
    for split, rows in zip(("train", "dev", "test"), ROWS[name]):
        if not has_split(task, split, str(glue)): continue
        examples = read_split(task, split, str(glue))
        assert rows is None or len(examples) == rows
        assert [e.index for e in examples] == list(range(len(examples)))
        assert all(e.a and (e.b is not None) == (len(task.columns) == 2) for e in examples)
        if splits(task)[split].labelled:
            labels = {e.label for e in examples}
            assert min(labels) >= 0 and max(labels) <= 5 if task.regression else labels == set(range(len(task.labels)))


def test_diagnostic(glue):
    assert len(read_split(TASKS["mnli"], "ax", str(glue))) == 1104


@pytest.mark.parametrize("task, method", [("stsb", "adapter"), ("cola", "full"), ("mnli", "lora")])
def test_short_run(command, glue, tmp_path, task, method):
    short = flags(max_train_examples=64, max_eval_examples=40, epochs=1)
    code, out, err = command("run", *flags(task=task, data=glue, checkpoint="minilm", method=method), *short)
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    result = json.loads((folder/"result.json").read_text())
    assert set(result["dev"]["last"]) == {*TASKS[task].metrics, "score", "epoch"}
    expected = {s for s in splits(TASKS[task]) if s != "train" and has_split(TASKS[task], s, str(glue))}
    assert {f.stem for f in (folder/"predictions").iterdir()} == expected
