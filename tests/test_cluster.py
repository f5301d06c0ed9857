"Studies on Ray and Slurm, in a network of their own: what is no cluster, two nodes, of which one goes away, and Slurm."
import os, re, shutil, signal, subprocess, sys, time
from pathlib import Path
import nbformat, psutil, pytest
from conftest import REPO, findings
from peft_study.study import cluster
from peft_study.tasks.glue import BadInput

pytest.importorskip("ray", reason="Ray is not installed")
ALONE = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]   # nothing but loopback


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
    print(out)
    assert child.returncode == 0
    assert int(re.search(r"(\d+) runs were finished before", out)[1]) < 8
    assert len(re.findall("a machine was lost: .+; 1 run begins again from the last checkpoint", out)) == 1, out
    assert "raylet" not in out and len(out.splitlines()) < 40, out
    assert findings(study.folder/"ray") == undisturbed
    assert not list(study.folder.glob("ray/eight/runs/*/.node"))


def on_two_small_nodes(script):
    "A script of the notebook for what there is here: two nodes without GPUs, and two runs."
    for asked, here in ((r" --gpus\S+", ""), ("--nodes=4", "--nodes=2"), ("1-8", "1-2"), ("TASK_ID/8", "TASK_ID/2"),
                        ("study scaling", "study eight --methods lora --seed 0"), ("/shared/", "")):
        script = re.sub(asked, here, script)
    return script


def test_the_scripts_for_slurm(study, undisturbed, tmp_path):
    "Of the notebook, on a real Slurm of two nodes, whose tasks have one CPU each on a machine that has more."
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))): pytest.skip("no Slurm here: slurm-wlm, munge")
    alone = ["unshare", "--net", "--mount", *ALONE[2:]]
    if subprocess.run([*alone, "true"], capture_output=True).returncode: pytest.skip("no network namespaces here")
    cells = nbformat.read(REPO/"nbs/study/02_cluster.ipynb", 4).cells
    array, job = map(on_two_small_nodes, re.findall("```bash\n(.*?)```", "\n".join(c.source for c in cells), re.DOTALL))
    array = array.replace("sbatch", "sbatch --wait").replace("outputs outputs", "outputs array")
    (tmp_path/"job.sh").write_text(job.replace("outputs outputs", "outputs job"))
    shutil.copy(study.folder/"settings.ini", tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= dict(PATH=f"{Path(sys.executable).parent}:{env['PATH']}", RAY_worker_niceness="0")
    command = [*alone, sys.executable, REPO/"tests/two_slurm_nodes.py", tmp_path/"slurm", "bash", "-ec",
               f"{array}\nsbatch --wait job.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    logs = "\n".join(f.read_text() for f in sorted(tmp_path.glob("slurm-*.out")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    wanted = {name: found for name, found in undisturbed.items() if "-lora-" in name and "-s0-" in name}
    assert len(wanted) == 2 and findings(tmp_path/"array") == findings(tmp_path/"job") == wanted, logs
    assert "threads, so their last bits may differ" not in logs
