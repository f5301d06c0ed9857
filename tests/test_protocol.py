"A study in two stages, as its users run it: the grid tunes, the final seeds repeat what it chose."
import json, os, subprocess, sys, time
import pandas as pd
import pytest
from conftest import kill_tree


@pytest.fixture
def two(command, tmp_path, tiny):
    "Start `peft-study study two …` in a folder of its own."
    (tmp_path/"settings.ini").write_text(
        f"[two]\ntask_name = cola\ndata = demo\ncheckpoint = {tiny}\n"
        "max_train_examples = 320\nmax_eval_examples = 40\nn_epochs = 2\n"
        "tune_share = 0.2\nseed = 0\nfinal_seeds = 1 2\nlr = 1e-4 1e-2\n[two.lora]\nrank = 1\n[two.head]\n")
    def start(*flags):
        program = [sys.executable, "-c", "from peft_study.cli import main; main()"]
        command = [*program, "study", "two", "--checkpoint-minutes", "0", *flags]
        env = os.environ | dict(OMP_NUM_THREADS="1")
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, start_new_session=True)
    def finish(*flags) -> str:
        code, out, err = command("study", "two", "--checkpoint-minutes", 0, *flags, cwd=tmp_path)
        assert code == 0, err
        return out + err
    start.to_its_end = finish
    start.runs = tmp_path/"outputs/two/runs"
    start.table = lambda: pd.read_csv(tmp_path/"outputs/two/results.csv")
    return start


def finished(two): return {f.parent.name: f.stat().st_mtime_ns for f in two.runs.glob("*/result.json")}


def kill_when(child, condition):
    while not condition():
        time.sleep(.02)
        assert child.poll() is None, "it ended before it was killed"
    kill_tree(child)


def test_from_grid_to_repetitions(two):
    out = two.to_its_end("--shard", "1/2")   # the first rate of each method
    assert "cola lora r1: 1 of 2 runs of its grid are finished" in out and "cola head all: 1 of 2" in out
    assert len(finished(two)) == 2

    kill_when(two(), lambda: len(finished(two)) == 3)
    kill_when(two(), lambda: len(finished(two)) >= 5)   # among the repetitions
    before = finished(two)
    two.to_its_end()
    after = finished(two)
    assert len(after) == 4 + 4 and all(after[run] == at for run, at in before.items())
    table = two.table()
    assert sorted(table.stage) == ["final"] * 4 + ["tune"] * 4 and set(table.seed[table.stage == "final"]) == {1, 2}
    for label, runs in table.groupby("label"):
        tuned = runs[runs.stage == "tune"]
        chosen = set(runs.lr[runs.stage == "final"])
        assert len(chosen) == 1 and chosen <= set(tuned.lr[tuned.tune_last_score == tuned.tune_last_score.max()]), label
    assert (table.score == table.dev_last_score).all() and (table.steps == 2 * 8).all()   # 256 of 320 in batches of 32
    record = json.loads((two.runs.parent/"study.json").read_text())
    assert (record["seeds"], record["final_seeds"]) == ([0], [1, 2])

    two.to_its_end("--final-seeds", "1 2 3")
    assert len(finished(two)) == 4 + 6 and all(finished(two)[run] == at for run, at in after.items())
    two.to_its_end("--final-seeds", "1 2 3", "--lr", "1e-4 1e-3 1e-2")
    table = two.table()
    assert (table.stage == "tune").sum() == 6 and (table.stage == "final").sum() == 6
    for label, runs in table[table.stage != "tune"].groupby("label"):
        assert len(runs) in (3, 6) and (runs.stage == "superseded").sum() == len(runs) - 3, label
