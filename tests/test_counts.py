"Trainable parameters against every published count of the reference study."
import csv
import pytest, torch
from transformers import BertConfig, BertForSequenceClassification
from conftest import REPO
from peft_study.methods.core import apply_method, count, expected_parameters, find_method

ROWS = list(csv.DictReader(open(REPO/"reports/published/seed_mnli_scaling.csv")))
FIELD = dict(adapter=("adapter", "bottleneck_size"), lora=("lora", "rank"), top_k=("full", "top_k"))


def test_all_rows_are_there(): assert len(ROWS) == 32


@pytest.mark.parametrize("row", ROWS, ids=lambda r: f"{r['method']}-{r['size']}")
def test_count_on_bert_base(row):
    name, size = FIELD[row["method"]]
    method = find_method(name)(**{size: int(row["size"])})
    with torch.device("meta"): model = BertForSequenceClassification(BertConfig(num_labels=3))
    assert count(apply_method(model, method))["trainable"] == int(row["trainable_params"])
    assert expected_parameters(method, model.config) == int(row["trainable_params"])
