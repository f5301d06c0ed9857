"`python two_nodes.py FOLDER COMMAND …`: the command beside two Ray nodes; one goes away when two runs train there"
import os, subprocess, sys, time
from pathlib import Path
from ray.cluster_utils import Cluster

folder, *command = sys.argv[1:]
os.environ["RAY_worker_niceness"] = "0"   # Ray's own choice, 15, starves where others compute
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
try:
    second = cluster.add_node(num_cpus=1)
    child = subprocess.Popen(command, env=os.environ | dict(RAY_ADDRESS=cluster.address))
    end = time.time() + 180
    def begun(): return len(list(Path(folder).glob("*/metrics.jsonl")))
    while begun() < 2 and time.time() < end and child.poll() is None: time.sleep(.1)
    done = len(list(Path(folder).glob("*/result.json")))
    cluster.remove_node(second, allow_graceful=False)
    print(f"{done} runs were finished before", flush=True)
    code = child.wait(timeout=400)
finally: cluster.shutdown()
sys.exit(code)
