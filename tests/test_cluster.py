"The runs of a study on Ray, in a network of its own: what is no cluster, and two nodes, of which one goes away."
import os, re, signal, socket, subprocess, sys, time
from threading import Thread
import psutil, pytest
from conftest import REPO, findings
from peft_study import cluster
from peft_study.glue import BadInput

pytest.importorskip("ray", reason="Ray is not installed")
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]   # nothing but loopback


@pytest.fixture
def dumb():
    "The address of something that takes connections, and never says a word."
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []
        def accept():
            while True:
                try: held.append(server.accept())
                except OSError: return
        Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("kind", ["", "ray://"], ids=["driver", "client"])
def test_what_is_no_cluster(tmp_path, monkeypatch, dumb, kind):
    "One line, in time; and what has asked is gone."
    monkeypatch.setattr(cluster, "SECONDS", dict(there=3, here=120))
    monkeypatch.setenv("RAY_ADDRESS", kind + dumb)
    with pytest.raises(BadInput) as refused: cluster.Ray(tmp_path)
    (line,) = str(refused.value).splitlines()
    assert f"RAY_ADDRESS '{kind}{dumb}'" in line and "within 3 s" in line
    assert "`ray start --head`" in line and f"{tmp_path}/ray.log" in line
    psutil.wait_procs(psutil.Process().children(), timeout=5)
    assert not [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]


def test_ctrl_c_while_a_cluster_is_asked(study, dumb):
    child = study("asked", "--engine", "ray", env=dict(RAY_ADDRESS=dumb))
    end = time.time() + 60
    while not (study.folder/"asked/ray.log").exists() and time.time() < end: time.sleep(.05)
    time.sleep(2)
    began = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)
    out, _ = child.communicate(timeout=60)
    assert child.returncode == 130 and out.strip() == "peft-study: interrupted; the same command goes on from here"
    assert time.monotonic() - began < 10


def test_node_removed(study, undisturbed):
    "What is lost is said in one line, and Ray's own words go to a file."
    if subprocess.run([*ALONE, "true"], capture_output=True).returncode: pytest.skip("no network namespaces here")
    nodes = [*ALONE, sys.executable, str(REPO/"tests/two_nodes.py"), str(study.folder/"ray/eight/runs")]
    child = study("ray", "--engine", "ray", start=nodes)
    out, _ = child.communicate(timeout=600)
    assert child.returncode == 0, out
    assert int(re.search(r"(\d+) runs were finished before", out)[1]) < 8
    assert len(re.findall("a machine was lost: .+; 1 run begins again from the last checkpoint", out)) == 1, out
    assert "raylet" not in out and len(out.splitlines()) < 40, out
    assert findings(study.folder/"ray") == undisturbed
    assert not list(study.folder.glob("ray/eight/runs/*/.node"))
