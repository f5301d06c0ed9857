"What a run's identity rests on: defaults, which are left out of it, and the code that its checkpoints are valid for."
import subprocess, sys
import pytest
from conftest import REPO
from peft_study.run.config import RunConfig, _run_id
from peft_study.methods.core import ESTIMATORS, find_method, method_names
from peft_study.run.runs import code_files

# A default that is changed gives finished runs another meaning under the same name. New settings come with a default
# that is as before.
COMMON = dict(study="adhoc", checkpoint="bert-base-uncased", data="hub", n_epochs=3, lr=None, batch_size=32,
              optimizer="adamw", betas=(.9, .999), eps=1e-6, weight_decay=.01, warmup_ratio=.1, max_grad_norm=1.,
              max_length=128, precision="fp32", seed=0, keep="last", tune_share=0., train_pooler=False,
              pooling="model", cache_frozen=False, max_train_examples=None, max_eval_examples=None, max_steps=None,
              skip_bad_rows=0, whole_texts=False, sample_by_seed=False, n_evaluations=None)
LORA = dict(rank=8, alpha=None, targets=("query", "value"), lora_dropout=0., rslora=False, dora=False, lora_plus=1.)
ADAPTER = dict(bottleneck_size=64, nonlinearity="gelu", init="near", placement="houlsby")
METHODS = dict( # default learning rate, settings, and the identity of a run with nothing but defaults, its data apart
    adapter=(1e-3, ADAPTER, "rte-adapter-m64-s0-b832ed0f"),
    bitfit=(2e-3, {}, "rte-bitfit-all-s0-b4f6708d"),
    full=(2e-5, dict(top_k=None), "rte-full-all-s0-ff0b9881"),
    head=(5e-3, {}, "rte-head-all-s0-132058fb"),
    hf_ia3=(5e-3, {}, "rte-hf_ia3-all-s0-2fd33db9"),
    hf_lora=(1e-3, dict(rank=8), "rte-hf_lora-r8-s0-dd65d839"),
    hf_prefix=(1e-2, dict(prefix_length=10), "rte-hf_prefix-n10-s0-331bffb6"),
    hf_prompt=(1e-2, dict(prompt_length=20), "rte-hf_prompt-n20-s0-7eb9a30d"),
    ia3=(5e-3, {}, "rte-ia3-all-s0-b982f8cc"),
    layernorm=(2e-3, {}, "rte-layernorm-all-s0-8e47c225"),
    lora=(1e-3, LORA, "rte-lora-r8-s0-c3115367"),
    prefix=(1e-2, dict(prefix_length=10, reparam=None), "rte-prefix-n10-s0-f0871133"),
    prompt=(1e-2, dict(prompt_length=20, read="cls"), "rte-prompt-n20-s0-48b44b09"),
    tfidf=(None, {}, "rte-tfidf-all-s0-a794f90c"),
    embeddings=(None, {}, "rte-embeddings-all-s0-28b424d0"),
    setfit=(None, {}, "rte-setfit-all-s0-73e06f7c"))


def id_but_for_data(config):
    "The id that the settings alone make."
    return _run_id(config, {name: value for name, value in config.identity().items() if name != "data"})


def defaults(model):
    return {name: field.default for name, field in model.model_fields.items() if not field.is_required()}


def test_common_defaults(): assert defaults(RunConfig) == COMMON


def test_every_method_is_pinned(): assert {*method_names(), *ESTIMATORS} == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_defaults_of_a_method(name):
    lr, settings, run_id = METHODS[name]
    method = find_method(name)
    assert (method().default_lr, defaults(method)) == (lr, settings)
    assert id_but_for_data(RunConfig(task_name="rte", method=name, data="demo")) == run_id


TRAIN = """
import sys
from peft_study.run.config import RunConfig
from peft_study.run.runs import read_result
from peft_study.run.train import train
short = dict(max_train_examples=32, max_eval_examples=8, n_epochs=1)
folder, = train([RunConfig(task_name="cola", method="lora", data="demo", checkpoint=sys.argv[1], **short)], sys.argv[2])
origin = read_result(folder)["provenance"]
assert {len(origin[name]) for name in ("data_fingerprint", "use_fingerprint")} == {16} and len(origin["canary"]) == 8
print(*[m for m in sys.modules if m.startswith("peft_study.")])
"""


def test_code_version_has_what_decides(tiny, tmp_path):
    "All that a run imports is in the fingerprint, but for what only keeps its files."
    command = [sys.executable, "-c", TRAIN, str(tiny), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stderr
    rooms, keeping = {"methods", "tasks", "run"}, {"run.runs", "run.resume"}
    imported = {m.partition(".")[2] for m in done.stdout.splitlines()[-1].split()} - rooms - keeping
    package = REPO/"peft_study"
    hashed = {".".join(f.relative_to(package).with_suffix("").parts) for f in code_files()}
    assert imported <= hashed, "a module that training imports is not in runs.code_files"
    idle = {m for m in hashed - imported if not m.startswith("methods.")}
    assert idle == set(), "runs.code_files has a module that training does not import"


def test_same_rows_from_anywhere(tmp_path, monkeypatch):
    "The Hub, a clone of its files, and the TSVs of the official download: the same rows are the same run."
    import pandas as pd
    from datasets import Dataset
    from peft_study.tasks import data
    rows = pd.DataFrame(dict(sentence1=["It rains. ", "A man sings."], sentence2=["It pours.", "A man is silent."],
                             label=[3.8, .25])).astype(dict(label="float32"))
    (tmp_path/"tsv/STS-B").mkdir(parents=True)
    (tmp_path/"clone/stsb").mkdir(parents=True)
    for split, name in (("train", "train"), ("validation", "dev")):
        rows.to_parquet(tmp_path/f"clone/stsb/{split}-00000-of-00001.parquet")
        lines = [f"{r.sentence1}\t{r.sentence2}\t{r.label:.3f}" for r in rows.itertuples()]
        (tmp_path/f"tsv/STS-B/{name}.tsv").write_text("\n".join(["sentence1\tsentence2\tscore", *lines]) + "\n")
    monkeypatch.undo()   # of what stands for the Hub
    monkeypatch.setattr(data, "_load_hub", lambda hub, split=None: Dataset.from_pandas(rows))
    places = ("hub", str(tmp_path/"clone"), str(tmp_path/"tsv"))
    runs = [RunConfig(task_name="stsb", method="lora", data=place) for place in places]
    assert len({run.run_id for run in runs}) == 1
