"What leaves carries its card: `export`, `export --peft` and `publish`, and where it goes with `--push`."
import json, os
from unittest.mock import patch
import pandas as pd
import pytest
from conftest import REPO
from huggingface_hub import DatasetCard, ModelCard
from peft_study.share.cards import push, run_card, study_card
from peft_study.results.table import cell_means
from peft_study.run.runs import read_config, read_result

OFFLINE = os.environ | dict(HF_HUB_OFFLINE="1", HF_TOKEN="")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "A finished run of LoRA on synthetic MRPC, which has two metrics."
    from peft_study.run.config import RunConfig
    from peft_study.run.train import train
    settings = dict(data="demo", checkpoint="minilm", max_train_examples=64, max_eval_examples=32, n_epochs=2, seed=7)
    config = RunConfig(task_name="mrpc", method="lora", rank=4, **settings)
    folder, = train([config], tmp_path_factory.mktemp("outputs"))
    return folder


@pytest.mark.parametrize("flags, library", [([], "transformers"), (["--peft"], "peft")], ids=["merged", "peft"])
def test_card(command, run_folder, tmp_path, flags, library):
    code, out, err = command("export", run_folder, "--to", tmp_path/"out", *flags, takes_outputs=False, env=OFFLINE)
    assert code == 0, err
    result = json.loads((run_folder/"result.json").read_text())
    card = ModelCard.load(tmp_path/"out"/"README.md")
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found == {m: result["dev"]["last"][m] for m in ("f1", "accuracy")}
    datasets = {(r.dataset_type, r.dataset_config, r.dataset_split) for r in card.data.eval_results}
    assert datasets == {("synthetic", "mrpc", "validation")}
    assert {r.metric_args["seed"] for r in card.data.eval_results} == {7}
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.license == "apache-2.0" and card.data.library_name == library
    assert "peft-study run --task-name mrpc" in card.text and "--seed 7" in card.text
    for place in (str(REPO), str(tmp_path), str(run_folder), "site-packages"): assert place not in str(card)


def test_command_of_the_card(command, run_folder):
    "The command in the card is the same run."
    text = run_card(read_config(run_folder), read_result(run_folder)).text
    words = next(line for line in text.splitlines() if line.startswith("peft-study run")).split()[1:]
    code, out, err = command(*words, outputs=run_folder.parents[2])
    assert code == 0 and f"{run_folder.name} is finished already" in out, err


@pytest.mark.parametrize("env, repo, message", [
    (dict(HF_TOKEN=""), "me/model", "no token of the 🤗 Hub"),
    (dict(HF_TOKEN="hf_made_up", HF_HUB_OFFLINE="1"), "me/model", "the 🤗 Hub cannot be reached"),
    (dict(HF_TOKEN="hf_made_up", HF_ENDPOINT="http://127.0.0.1:9"), "me/model", "the 🤗 Hub cannot be reached"),
    (dict(), "no such/name!", "is called USER/NAME")])
def test_no_push(command, run_folder, tmp_path, env, repo, message):
    "Known before anything is written: one line, exit code 2."
    env = os.environ | dict(HF_HOME=str(tmp_path/"home")) | env
    code, out, err = command("export", run_folder, "--to", tmp_path/"out", "--push", repo, takes_outputs=False, env=env)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path/"out").exists()


def test_push(tmp_path):
    "The Hub gets the folder, under the name that it gives the repository."
    (tmp_path/"README.md").write_text("# a card")
    with patch("huggingface_hub.HfApi") as hub:
        api = hub.return_value
        api.create_repo.return_value.repo_id = "me/model"
        push(tmp_path, "model")
        api.create_repo.assert_called_once_with("model", repo_type="model", exist_ok=True)
        api.upload_folder.assert_called_once_with(folder_path=tmp_path, repo_id="me/model", repo_type="model")


def test_page_of_a_study(tmp_path):
    "The demo's record: a row an encoder, method and size, with the means of results.csv."
    runs = pd.read_csv(REPO/"reports/records/demo/results.csv").assign(encoder="minilm")
    study_card("demo", cell_means(runs), "score_vs_parameters.png").save(tmp_path/"README.md")
    card = DatasetCard.load(tmp_path/"README.md")
    assert card.data.pretty_name == "Study demo"
    assert "](score_vs_parameters.png)" in card.text and "synthetic" in card.text
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    for (label, size), cell in runs.groupby(["label", "size"]):
        row, = [row for row in rows if row[0] == f"| {label}" and row[1] == size]
        for task, column in (("cola", 3), ("sst2", 4)):
            assert row[column].startswith(f"{cell[cell.task_name == task].score.mean():.3f} ±")
    assert str(REPO) not in str(card)
