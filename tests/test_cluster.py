"The runs of a study on Ray: two nodes, of which one goes away in the middle."
import time
import pytest
from conftest import findings

ray = pytest.importorskip("ray", reason="Ray is not installed")


def test_node_removed(study, undisturbed):
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    try:
        second = cluster.add_node(num_cpus=1)
        child = study("ray", "--engine", "ray", env=dict(RAY_ADDRESS=cluster.address))
        end = time.time() + 180
        def begun(): return len(list(study.folder.glob("ray/eight/runs/*/metrics.jsonl")))
        while begun() < 2 and time.time() < end and child.poll() is None: time.sleep(.1)
        assert len(list(study.folder.glob("ray/eight/runs/*/result.json"))) < 8
        cluster.remove_node(second, allow_graceful=False)
        out, _ = child.communicate(timeout=400)
        assert child.returncode == 0, out
    finally: cluster.shutdown()
    assert findings(study.folder/"ray") == undisturbed
