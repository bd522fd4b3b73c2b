"""A Slurm of two nodes on this machine, in namespaces of its own: nothing outside sees a port, file or process of it.

with two_nodes.slurm(empty_folder) as inside:
    subprocess.run([*inside, "srun", "-n", "2", "hostname"], env=two_nodes.environment())
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from needs import NOT_HERE, needs_root
from support import clean_env

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "scancel")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NAMESPACES = ("--net", "--pid", "--mount", "--uts", "--ipc")
CONF = """\
ClusterName=tests
SlurmctldHost=own1(10.99.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=/run/munge.sock
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd-%n.pid
SlurmdSpoolDir=/run/spool-%n
StateSaveLocation=/run/state
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The nodes say more CPUs than there are.
SlurmdParameters=config_overrides
# From the SIGTERM of scancel to SIGKILL: no test waits for it.
KillWait=600
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=own[1-2] NodeHostname=own1 NodeAddr=10.99.0.1 Port=[16821-16822] CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
# Names of Slurm's nodes resolve only where a network beside the loopback is up.
UP = """\
set -e
mount -t tmpfs -o mode=755 tests /run
cp slurm.conf /run
printf '127.0.0.1 localhost\\n10.99.0.1 own1 own2\\n' > /run/hosts
mount --bind /run/hosts /etc/hosts
hostname own1
ip link set lo up
ip link add own type bridge
ip address add 10.99.0.1/24 dev own
ip link set own up
mkdir /run/state
head -c 128 /dev/urandom > /run/munge.key
chmod 600 /run/munge.key
munged --key-file=/run/munge.key --socket=/run/munge.sock --pid-file=/run/munged.pid --log-file=munged.log \\
    --seed-file=/run/munge.seed
slurmctld -D > slurmctld.log 2>&1 &
daemons=$!
slurmd -D -N own1 > own1.log 2>&1 &
daemons="$daemons $!"
slurmd -D -N own2 > own2.log 2>&1 &
daemons="$daemons $!"
until [ "$(sinfo -h -N -o %T 2> sinfo.log | grep -c idle)" = 2 ]; do
    for daemon in $daemons; do kill -0 $daemon; done
    sleep 0.1
done
echo up
wait
"""


def environment() -> dict[str, str]:
    """The environment of a command that runs inside."""
    kept = {name: value for name, value in clean_env(OMP_NUM_THREADS="1").items() if not name.startswith("SLURM")}
    return {**kept, "PATH": PATH, "SLURM_CONF": "/run/slurm.conf"}


@contextmanager
def slurm(folder: Path) -> Iterator[list[str]]:
    """Start the cluster, with its logs in `folder`; gives the beginning of a command line that runs inside."""
    if absent := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        pytest.skip(f"a run under srun: {NOT_HERE}: {', '.join(absent)} are not installed, as `make e2e` does")
    if subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True).returncode:
        pytest.skip(needs_root("a run under srun"))
    folder.chmod(0o755)  # munged writes no log where others may.
    (folder / "slurm.conf").write_text(CONF)
    # However this process ends, the kernel ends the cluster.
    command = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    with subprocess.Popen(
        [*command, "sh", "-c", UP], cwd=folder, env=environment(), stdout=subprocess.PIPE, text=True
    ) as cluster:
        try:
            assert cluster.stdout
            told = cluster.stdout.readline()
            assert told == "up\n", {log.name: log.read_text() for log in folder.glob("*.log")}
            first = Path(f"/proc/{cluster.pid}/task/{cluster.pid}/children").read_text().split()[0]
            yield ["nsenter", "--target", first, *NAMESPACES]
        finally:
            cluster.kill()
