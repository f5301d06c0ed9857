"""`python two_slurm_nodes.py FOLDER COMMAND …`, as root: the command beside a Slurm of two nodes of one CPU on this
machine. It needs namespaces of its own for the network and for mounts, as it adds an interface and names of hosts."""
import os, subprocess, sys, time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
NodeName=one NodeHostname=localhost NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=two NodeHostname=localhost NodeAddr=127.0.0.1 Port=17002 CPUs=1
PartitionName=all Nodes=one,two Default=YES OverSubscribe=NO
"""
folder, command = Path(sys.argv[1]).resolve(), sys.argv[2:]
(folder/"state").mkdir(parents=True)
(folder/"slurm.conf").write_text(CONF.format(folder=folder))
(folder/"hosts").write_text(f"127.0.0.1 localhost one two {os.uname().nodename}\n")
(folder/"key").write_bytes(os.urandom(128))
(folder/"key").chmod(0o400)
os.environ["SLURM_CONF"] = str(folder/"slurm.conf")
for line in ("ip link add slurm0 type bridge", "ip addr add 10.99.0.1/24 dev slurm0", "ip link set slurm0 up",
             f"mount --bind {folder}/hosts /etc/hosts"):   # srun resolves no name where there is only loopback
    subprocess.run(line.split(), check=True)

own = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
DAEMONS = [["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *own],
           ["slurmctld", "-D"], ["slurmd", "-D", "-N", "one"], ["slurmd", "-D", "-N", "two"]]


def says(*query): return subprocess.run(query, capture_output=True, text=True).stdout.strip()


def wait(holds, seconds=60):
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end: time.sleep(.2)


running = []
try:
    with open(folder/"daemons.log", "wb") as log:
        for daemon in DAEMONS:
            running.append(subprocess.Popen(daemon, stdout=log, stderr=log))
            wait(lambda: (folder/"munge.socket").exists())
    wait(lambda: says("sinfo", "-h", "-t", "idle", "-o", "%D") == "2")
    code = subprocess.run(command).returncode
    wait(lambda: not says("squeue", "-h"))
finally:
    for daemon in running[::-1]: daemon.terminate()
    for daemon in running: daemon.wait()
sys.exit(code)
