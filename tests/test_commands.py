"The command as its users meet it: bad input, one run from end to end, the same run again."
import json, os, subprocess, sys
import nbformat, pytest
from conftest import QUICK, REPO, flags

RTE = ["run", "--task", "rte", "--method", "lora", *QUICK]


def rte_folder(path, rows=8, **files):
    "A GLUE folder with a small RTE; keyword arguments replace a file's text, or leave it out when None."
    (path/"RTE").mkdir(parents=True)
    header, words = "index\tsentence1\tsentence2\tlabel", ("entailment", "not_entailment")
    text = "\n".join([header, *(f"{i}\tIt rains.\tIt snows.\t{words[i % 2]}" for i in range(rows))]) + "\n"
    for split, content in (dict(train=text, dev=text) | files).items():
        if content is not None: (path/"RTE"/f"{split}.tsv").write_text(content)
    return path


def with_last_row(row): return "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt snows.\tentailment\n" + row + "\n"


@pytest.mark.parametrize("given, message", [
    (["--task", "imdb"], "unknown task_name 'imdb': use one of cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli"),
    (["--method", "lorra"], "unknown method 'lorra': use one of"),
    (["--checkpoint", "no/such/folder"], "checkpoint 'no/such/folder' cannot be loaded"),
    (["--data", "no/such/folder"], "data 'no/such/folder': no such folder"),
    (["--rank", "0"], "rank must be at least 1, got '0'"),
    (["--rank", "385"], "rank must be at most the layer's width 384, got 385"),
    (["--rank", "many"], "rank"),
    (["--method", "full", "--top_k", "7"], "top_k must be at most the encoder's 6 layers, got 7"),
    (["--method", "adapter", "--bottleneck-size", "1000"],
     "bottleneck_size must be at most the encoder's hidden size 384"),
    (["--method", "adapter", "--rank", "4"], "unknown setting 'rank' for method adapter: it has bottleneck_size"),
    (["--lr", "-1e-4"], "lr must be greater than 0"),
    (["--n-epochs", "0"], "n_epochs must be at least 1"),
    (["--epochs", "0"], "n_epochs must be at least 1"),
    (["--batch-size", "0"], "batch_size must be at least 1"),
    (["--targets", "query,keys"], "targets must be of query, key, value"),
    (["--precision", "fp8"], "precision must be 'fp32', 'tf32', 'bf16' or 'auto'"),
    (["--max-length", "1000"], "max_length must be at most the encoder's 512 positions"),
    (["--method", "json:dumps"], "method 'json:dumps' is no subclass"),
    (["--rnak", "4"], "unknown setting 'rnak' for method lora"),
    (["--task", "qqp"], "the synthetic demo data has no task 'qqp'"),
    (["--processes", "0"], "processes"),
    (["stray"], "unexpected argument 'stray'"),
], ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_flag(command, tmp_path, given, message):
    code, out, err = command(*RTE, *given)
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err and out == ""
    assert not (tmp_path/"outputs").exists()


@pytest.mark.parametrize("files, message", [
    (dict(train=with_last_row("1\tIt rains.\tentailment")), "RTE/train.tsv line 3: 3 columns, expected 4"),
    (dict(train=with_last_row("1\tIt rains.\tIt snows.\tperhaps")),
     "RTE/train.tsv line 3: unknown label 'perhaps', expected one of entailment, not_entailment"),
    (dict(dev=with_last_row("\n2\tIt rains.\tIt snows.\tentailment")), "RTE/dev.tsv line 3: 1 columns, expected 4"),
    (dict(test="index\tsentence1\n0\tIt rains.\n"), "RTE/test.tsv: no column 'sentence2' in its header"),
    (dict(train=None), "RTE/train.tsv is missing; RTE needs its train and dev files"),
    (dict(dev=None), "RTE/dev.tsv is missing"),
], ids=["columns", "label", "empty-line", "header", "no-train", "no-dev"])
def test_bad_data(command, tmp_path, files, message):
    code, out, err = command(*RTE, "--data", rte_folder(tmp_path/"glue", **files))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path/"outputs").exists()


def test_unwritable_outputs(command, tmp_path):
    (tmp_path/"file").write_text("in the way")
    code, out, err = command(*RTE, outputs=tmp_path/"file")
    assert code == 2 and "cannot be written" in err and len(err.strip().splitlines()) == 1, err
    assert (tmp_path/"file").read_text() == "in the way"


def test_unknown_key_in_settings(command, tmp_path):
    (tmp_path/"settings.ini").write_text("[mine]\ntask_name = rte\nsed = 1\n[mine.lora]\n")
    code, out, err = command("study", "mine", cwd=tmp_path)
    assert code == 2 and "settings.ini [mine.lora]: unknown setting 'sed'" in err, err
    assert len(err.strip().splitlines()) == 1, err


def test_unknown_papermill_parameter(tmp_path):
    from papermill import PapermillExecutionError, execute_notebook
    from peft_study.study.sweep import template
    with pytest.raises(PapermillExecutionError, match="unknown setting 'sed' for method lora"):
        given = dict(sed=1, outputs=str(tmp_path/"outputs"))
        execute_notebook(template(), tmp_path/"out.ipynb", given, kernel_name="python3", progress_bar=False)
    assert not (tmp_path/"outputs").exists()


NO_NETWORK = dict(offline=dict(HF_HUB_OFFLINE="1"), unreachable=dict(HF_ENDPOINT="http://127.0.0.1:9"))

@pytest.mark.parametrize("how", NO_NETWORK.values(), ids=NO_NETWORK)
def test_hub_without_network(command, tmp_path, how):
    offline = os.environ | dict(HF_HOME=str(tmp_path/"hf")) | how
    given = flags(task="rte", method="lora", checkpoint="minilm", data="hub")
    code, out, err = command("run", *given, env=offline)
    *before, line = err.strip().splitlines()   # that the cache is used is said where a connection has failed
    assert code == 2 and "give a folder or 'demo' as data" in line and len(before) <= ("HF_ENDPOINT" in how), err


def test_run_twice_and_again(command, tmp_path):
    "One run from end to end; the same elsewhere has the same bits; a finished one is left alone."
    args = [*RTE, "--rank", "2", "--train-pooler"]
    for outputs in ("a", "b"):
        code, out, err = command(*args, outputs=tmp_path/outputs)
        assert code == 0, err
        assert "(synthetic)" in out and "167,042 of 22,732,418 parameters" in out
    (a,), (b,) = [list((tmp_path/o/"adhoc/runs").iterdir()) for o in "ab"]
    assert a.name == b.name and a.name.startswith("rte-lora-r2-s0-")
    for file in ("adapter/adapter_model.safetensors", "predictions/dev.tsv", "predictions/test.tsv", "config.json"):
        assert (a/file).read_bytes() == (b/file).read_bytes(), file
    def losses(folder):
        lines = map(json.loads, (folder/"metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]
    assert losses(a) == losses(b) and len(losses(a)) == 2
    result = json.loads((a/"result.json").read_text())
    assert result["dev"] == json.loads((b/"result.json").read_text())["dev"]
    assert len((a/"predictions/dev.tsv").read_text().splitlines()) == 33
    notebook = nbformat.read(a/"notebook.ipynb", 4)
    assert not [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]

    before = (a/"result.json").stat().st_mtime_ns
    code, out, err = command(*args, outputs=tmp_path/"a")
    assert code == 0 and "is finished already" in out
    assert (a/"result.json").stat().st_mtime_ns == before

    code, out, err = command("evaluate", a, takes_outputs=False)
    assert code == 0 and f"score      {result['score']:.6f}" in out
    code, out, err = command("list", outputs=tmp_path/"a")
    assert code == 0 and "done" in out and a.name in out
    assert (tmp_path/"a/adhoc/results.csv").read_text().splitlines()[1].startswith(f"{a.name},done,single,False,")


OWN_METHOD = """
from pydantic import Field
from peft_study.methods.core import Method
class Biases(Method):
    lowest: int = Field(0, ge=0)
    def trains(self, name, sites): return name.endswith("bias") and (sites.layer_of(name) or 0) >= self.lowest
"""


def test_own_method(command, tmp_path):
    "A method in a file of the user's own, with a setting of its own."
    (tmp_path/"mine.py").write_text(OWN_METHOD)
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    code, out, err = command("run", *flags(task="cola", method="mine:Biases", lowest=5), *QUICK, env=env)
    assert code == 0, err
    (folder,) = (tmp_path/"outputs/adhoc/runs").iterdir()
    assert folder.name.startswith("cola-Biases-") and json.loads((folder/"config.json").read_text())["lowest"] == 5


MINE = """
[mine]
task_name = cola
data = demo
checkpoint = minilm
max_train_examples = 64
max_eval_examples = 32
n_epochs = 1
[mine.lora]
rank = 1 2
[mine.full]
top_k = 1
"""


def test_study(command, tmp_path):
    "A declared study to its table and plot; again it has nothing to do."
    (tmp_path/"settings.ini").write_text(MINE)
    code, out, err = command("study", "mine", "--jobs", "2", cwd=tmp_path)
    assert code == 0 and "3/3" in err, err
    for file in ("results.csv", "score_vs_parameters.png", "score_vs_parameters.svg"):
        assert (tmp_path/"outputs/mine"/file).stat().st_size > 500
    assert "synthetic" in out and out.count("lora") == 2
    code, out, err = command("study", "mine", cwd=tmp_path)
    assert code == 0 and "3 of 3 runs are finished already" in err


def test_missing_task(command):
    code, out, err = command("run", "--method", "lora")
    assert code == 2 and err.strip() == "peft-study: task_name is missing"


SESSION = """
import matplotlib
matplotlib.use("Agg")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
"""


def test_notebook_by_hand(tmp_path):
    "Run all, change a parameter, run all again, in one kernel; then only from the parameters on."
    from peft_study.study.sweep import template
    cells = [c.source for c in nbformat.read(template(), 4).cells if c.cell_type == "code"]
    parameters = next(i for i, c in enumerate(cells) if c.startswith("task_name"))
    quick = f"\nmax_train_examples = 32\nmax_eval_examples = 16\nn_epochs = 1\noutputs = {str(tmp_path)!r}\n"
    script = "\n".join([*cells[:parameters + 1], quick, *cells[parameters + 1:]])
    again = script.replace('task_name = "cola"', 'task_name = "mrpc"')
    other_task = cells[parameters].replace('task_name = "cola"', 'task_name = "rte"')
    later = "\n".join([other_task, quick, *cells[parameters + 1:]])
    asked = [f"assert shell.run_cell({part!r}).success\n" for part in (script, again, later)]
    (tmp_path/"session.py").write_text(SESSION + "".join(asked))
    done = subprocess.run([sys.executable, str(tmp_path/"session.py")], capture_output=True, text=True, cwd=REPO)
    assert done.returncode == 0, done.stdout[-3000:]
    assert sorted(f.name.split("-")[0] for f in (tmp_path/"adhoc/runs").iterdir()) == ["cola", "mrpc", "rte"]


def test_bench(command, tmp_path):
    "Measured rows are kept and not measured again; other settings, methods, sides and tasks are refused."
    quick = dict(tasks="sst2", methods="lora", sides="ours", rounds=1, examples=32, eval_examples=8, epochs=1)
    def bench(**more):
        given = quick | dict(output=tmp_path/"bench") | more
        return command("bench", *flags(**given), takes_outputs=False)
    code, out, err = bench()
    assert code == 0 and "examples/s" in out, err
    record = (tmp_path/"bench/bench.json").read_text()
    code, out, err = bench()
    assert code == 0 and "examples/s" not in out
    assert json.loads(record)["rows"] == json.loads((tmp_path/"bench/bench.json").read_text())["rows"]
    refused = [(dict(epochs=2), "its rows have n_epochs 1, not 2"), (dict(methods="lroa"), "unknown method 'lroa'"),
               (dict(sides="theirs"), "unknown side 'theirs'"), (dict(tasks="xyz"), "xyz"),
               (dict(data=tmp_path/"nowhere"), "no such folder"), (dict(examples=3), "examples")]
    for more, says in refused:
        code, out, err = bench(**more)
        assert code == 2 and says in err and len(err.strip().splitlines()) == 1, err


def test_bench_of_a_gpu_needs_one(command):
    code, out, err = command("bench", "--gpu", takes_outputs=False, env=os.environ | dict(CUDA_VISIBLE_DEVICES=""))
    assert code == 2 and err.strip() == "peft-study: bench --gpu finds no GPU that torch can use", err
