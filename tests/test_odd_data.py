"GLUE folders as people have them: with a relative path, broken rows, or a test file that numbers its rows itself."
import os, shutil
from contextlib import chdir
import pytest
from peft_study.run.config import RunConfig
from peft_study.run.predict import complete_predictions, evaluate, missing_predictions
from peft_study.results.table import disagreements
from peft_study.run.runs import read_result, run_folder
from peft_study.share.submission import submit
from peft_study.run.train import train

WHAT, HOW = ("film", "story", "cast", "end"), ("fine", "dull", "new", "old")
SENTENCES = [f"the {what} is {how}" for what in WHAT for how in HOW]


def write(folder, name, header, rows):
    file = folder/name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["\t".join(header), *("\t".join(map(str, row)) for row in rows)]) + "\n")


def sst2(folder):
    for name in ("train", "dev"):
        write(folder, f"SST-2/{name}.tsv", ["sentence", "label"], [(s, i % 2) for i, s in enumerate(SENTENCES)])
    numbers = reversed(range(len(SENTENCES)))
    write(folder, "SST-2/test.tsv", ["index", "sentence"], list(zip(numbers, SENTENCES)))


def test_relative_path_seen_from_elsewhere(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_study.share.submission.SUBMISSION_ROWS", {"SST-2.tsv": 16} | {n: 2 for n in OTHERS})
    (tmp_path/"here").mkdir()
    sst2(tmp_path/"glue")
    checkpoint = os.path.relpath(tiny, tmp_path/"here")
    short = dict(n_epochs=1, max_length=16)
    config = RunConfig(task_name="sst2", data="../glue", checkpoint=checkpoint, method="head", **short)
    with chdir(tmp_path/"here"):
        train([config], tmp_path/"o")
        folder = run_folder(config, tmp_path/"o")
    (tmp_path/"away"/"deeper").mkdir(parents=True)
    with chdir(tmp_path/"away"/"deeper"):
        scores = read_result(folder)["dev"]["last"]
        assert evaluate(folder) == pytest.approx({k: v for k, v in scores.items() if k != "epoch"})
        submit("adhoc", tmp_path/"o", fill=True)
        lines = (tmp_path/"o/adhoc/submission/best/SST-2.tsv").read_text().splitlines()
        assert [line.split("\t")[0] for line in lines[1:]] == [str(i) for i in reversed(range(16))]
        shutil.copytree(folder, other := folder.with_name("other"))
        (other/"predictions/test.tsv").write_text("\n".join([lines[0], *(f"{i}\tneither" for i in range(16))]) + "\n")
        texts = disagreements(folder, other, "test").text
        assert len(texts) == 16 and all(text == SENTENCES[15 - i] for i, text in texts.items())


OTHERS = [f"{n}.tsv" for n in "CoLA MRPC STS-B QQP MNLI-m MNLI-mm QNLI RTE WNLI AX".split()]


def test_rows_left_out_are_counted(command, tiny, tmp_path):
    columns = "id qid1 qid2 question1 question2 is_duplicate".split()
    rows = [(i, 1, 2, s, "is it?", i % 2) for i, s in enumerate(SENTENCES)]
    for name in ("train", "dev"): write(tmp_path/"glue", f"QQP/{name}.tsv", columns, rows)
    file = tmp_path/"glue/QQP/train.tsv"
    lines = file.read_text().splitlines()
    lines[5] = '"\tWas this person real?\t0'
    file.write_text("\n".join(lines) + "\n")
    flags = f"--task qqp --data {tmp_path}/glue --checkpoint {tiny} --method head --epochs 1 --max-length 16".split()
    code, out, err = command("run", *flags)
    assert code == 2 and "QQP/train.tsv line 6: 3 columns, expected 6" in err and "skip_bad_rows = N" in err
    code, out, err = command("run", *flags, "--skip-bad-rows", 1)
    assert code == 0, err
    folder, = (tmp_path/"outputs/adhoc/runs").iterdir()
    assert read_result(folder)["examples"] == dict(train=15, dev=16, skipped=1)
    assert 0 <= evaluate(folder, "train")["accuracy"] <= 1


def test_a_test_file_that_comes_later(tiny, tmp_path):
    "A finished run only gets the predictions that it lacks, the same as it would have made."
    sst2(tmp_path/"glue")
    short = dict(n_epochs=1, max_length=16, max_eval_examples=12)
    config = RunConfig(task_name="sst2", data=str(tmp_path/"glue"), checkpoint=str(tiny), method="lora", **short)
    folder, = train([config], tmp_path/"o")
    predictions, result = folder/"predictions/test.tsv", read_result(folder)
    assert result["examples"]["test"] == 12 and missing_predictions(folder) == []
    wanted, trained = predictions.read_bytes(), (folder/"metrics.jsonl").stat().st_mtime_ns
    predictions.unlink()
    file = tmp_path/"glue/SST-2/test.tsv"
    later = file.rename(tmp_path/"test.tsv")
    assert missing_predictions(folder) == [] == complete_predictions(folder)
    later.rename(file)
    assert missing_predictions(folder) == ["test"]
    train([config], tmp_path/"o")
    assert predictions.read_bytes() == wanted and read_result(folder) == result
    assert (folder/"metrics.jsonl").stat().st_mtime_ns == trained
    predictions.unlink()
    shutil.rmtree(folder/"adapter")   # as in a published run
    assert complete_predictions(folder) == []
