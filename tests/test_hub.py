"README's default path, and what can be wrong with it: the real libraries of the Hub against an imitation of it."
import os, shutil, time
import pandas as pd, pytest
from conftest import REPO, flags
from hub import hub
from peft_study.tasks import data
from peft_study.tasks.data import read_split
from peft_study.tasks.glue import get_task, splits
from peft_study.run.runs import read_metrics

SHORT = flags(epochs=1, max_length=16, max_train_examples=32, max_eval_examples=8)
MODEL, DATA = "someone/tiny-bert", "nyu-mll/glue"
GATED = (403, dict(X_Error_Code="GatedRepo"))
BUSY = (429, {"Retry-After": "0"})
BUSY_FOR_LONG = (429, {"Retry-After": "3000"})


@pytest.fixture(scope="module")
def repositories(tiny, tmp_path_factory):
    "A model, and the demo's examples in the layout of GLUE on the Hub."
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny, root/"models"/MODEL)
    folder = root/"datasets"/DATA
    card = ["---", "configs:"]
    for name in ("sst2", "cola"):
        (folder/name).mkdir(parents=True)
        card += [f"- config_name: {name}", "  data_files:"]
        for split in splits(get_task(name)).values():
            if (name, split.name) == ("cola", "dev"): continue   # a mirror that lacks one
            rows = read_split(get_task(name), split.name, "demo")
            labels = [-1 if e.label is None else e.label for e in rows]
            table = pd.DataFrame(dict(sentence=[e.a for e in rows], label=labels))
            table.to_parquet(folder/name/f"{split.hub}-00000-of-00001.parquet")
            card += [f"  - split: {split.hub}", f"    path: {name}/{split.hub}-*"]
    (folder/"README.md").write_text("\n".join([*card, "---", ""]), encoding="utf-8")
    return root


@pytest.fixture
def cached(tmp_path):
    "An environment with a cache of its own and this address."
    def environment(address, **more):
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "OFFLINE" not in k}
        return env | dict(HF_HOME=str(tmp_path/"cache"), HF_ENDPOINT=address, PYTHONPATH=str(REPO), NO_PROXY="*") | more
    return environment


def run(command, env, task="sst2", checkpoint=MODEL, data="hub", **kw):
    given = flags(task=task, checkpoint=checkpoint, data=data, method="lora")
    return command("run", *given, *SHORT, env=env, **kw)


def results(outputs):
    (folder,) = (outputs/"adhoc/runs").iterdir()
    losses = [line.get("loss") for line in read_metrics(folder)]
    return losses, (folder/"adapter/adapter_model.safetensors").read_bytes()


def test_from_the_hub_and_from_the_cache(command, repositories, cached, tiny, tmp_path):
    "The bits are those of the folders that the Hub serves. When it is gone, the cache is used, and a line says so."
    with hub(repositories) as (address, asked):
        code, out, err = run(command, cached(address))
        assert code == 0 and any(MODEL in path for path in asked) and any(DATA in path for path in asked), err
    first = results(tmp_path/"outputs")
    started = time.monotonic()
    code, out, err = run(command, cached(address), outputs=tmp_path/"gone")   # nobody listens there any more
    assert code == 0 and err.count("the 🤗 Hub cannot be reached") == 1, err
    assert time.monotonic() - started < 90 and results(tmp_path/"gone") == first
    code, out, err = run(command, cached(address), checkpoint=tiny, data="demo", outputs=tmp_path/"folders")
    assert code == 0 and results(tmp_path/"folders") == first, err


@pytest.mark.parametrize("what, refused, part", [
    (dict(checkpoint="someone/gated"), {"someone/gated": GATED}, "it is gated: accept its terms"),
    (dict(checkpoint="someone/nothing"), {}, "the Hub has nothing of this name"),
    (dict(checkpoint=MODEL), {MODEL: BUSY}, "too many requests from here (429)"),
    (dict(checkpoint=MODEL), {MODEL: BUSY_FOR_LONG}, "too many requests from here (429)"),
    (dict(), {DATA: BUSY_FOR_LONG}, "(429)"),
    (dict(), {DATA: GATED}, "it is gated: accept its terms"),
    (dict(task="mrpc"), {}, "mrpc"),
    (dict(task="cola"), {}, 'validation')],
    ids=["gated", "no-such", "busy", "busy-for-long", "busy-data", "gated-data", "no-configuration", "no-split"])
def test_what_the_hub_refuses(command, repositories, cached, tiny, what, refused, part):
    with hub(repositories, refused) as (address, asked):
        code, out, err = run(command, cached(address), **dict(checkpoint=tiny) | what)
    *progress, last = err.strip().splitlines()
    assert code == 2 and last.startswith("peft-study: ") and part in last and "Traceback" not in err, err


def test_nothing_in_the_cache(command, cached, tiny):
    started = time.monotonic()
    for given in (dict(), dict(checkpoint=tiny)):
        code, out, err = run(command, cached("http://127.0.0.1:9"), **given)
        assert code == 2 and "not reached" in err and "not in the cache" in err, err
    assert time.monotonic() - started < 90


def test_the_hub_asks_to_wait_a_little(capsys, monkeypatch):
    "It is said once, and a minute is waited in all."
    import httpx2
    monkeypatch.setattr(data, "_waited", [])
    asked = httpx2.Response(429, headers={"Retry-After": "25"}, request=httpx2.Request("GET", "http://127.0.0.1"))
    for _ in range(2): data._wait_or_stop(asked)
    with pytest.raises(OSError, match="asks to wait 25 s"): data._wait_or_stop(asked)
    assert capsys.readouterr().err == "the 🤗 Hub asks to wait 25 s (429)\n"


def test_what_listens_and_says_nothing(command, cached, dumb):
    "It is asked once; the Hub's library would ask again and again."
    code, out, err = run(command, cached(f"http://{dumb}", HF_HUB_ETAG_TIMEOUT="1", HF_HUB_DOWNLOAD_TIMEOUT="1"))
    assert code == 2 and err.count("the 🤗 Hub cannot be reached") == 1 and "not in the cache" in err, err
