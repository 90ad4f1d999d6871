"""A Slurm of two nodes on this machine: its own munge, controller and two daemons, in a folder of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
NODES = ("127.0.0.1", "127.0.0.2")
"""Names that lead to this machine without anyone's /etc/hosts; Slurm takes `localhost` for the machine's own name."""
CONF = """
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
SlurmUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
ReturnToService=2
MailProg={folder}/mail
KillWait=30
NodeName=127.0.0.1 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs={cpus} RealMemory=6000
NodeName=127.0.0.2 NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs={cpus} RealMemory=6000
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no such cluster here, or None."""
    path = os.environ.get("PATH", "") + ":/usr/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"Slurm is not here: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0:
        return "only root starts Slurm's daemons"
    return None


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@dataclass
class Cluster:
    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin"}

    def run(self, *command: str, **keys) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, **keys)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        text = self.run("scontrol", "show", "job", job)
        return text.partition("JobState=")[2].split()[0]

    def until(self, job: str, *states: str, seconds: float = 240) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (found := self.state(job)) in states:
                return found
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {self.state(job)} after {seconds} s, not {states}")

    def begin_now(self, job: str) -> None:
        """A job that was queued again waits two minutes before it starts, so that its nodes have done with it.

        A node refuses credentials that are not younger than the end of the job there, to the second.
        """
        self.until(job, "PENDING")
        for _ in range(120):
            if set(self.run("sinfo", "--noheader", "--format=%T").split()) == {"idle"}:
                break
            time.sleep(0.5)
        time.sleep(2)
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def start(self, *command: str) -> None:
        self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL))


@contextmanager
def two_nodes(folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    host = socket.gethostname().partition(".")[0]
    for part in ("munge", "state", *(f"spool-{node}" for node in NODES)):
        (folder / part).mkdir(parents=True)
    (folder / "mail").symlink_to("/bin/true")
    munge = folder / "munge"
    munge.chmod(0o711)
    key = munge / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    cpus = os.cpu_count() or 1
    conf = CONF.format(folder=folder, host=host, ports=free_ports(3), cpus=cpus)
    (folder / "slurm.conf").write_text(conf)
    try:
        files = {"key-file": key, "socket": munge / "socket", "pid-file": munge / "pid", "log-file": munge / "log"}
        files["seed-file"] = munge / "seed"
        cluster.start("munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items()))
        wait_for((munge / "socket").exists)
        cluster.start("slurmctld", "-D")
        for node in NODES:
            cluster.start("slurmd", "-D", "-N", node)
        wait_for(lambda: cluster.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == "2")
        yield cluster
    finally:
        for job in _jobs(cluster):
            with suppress(AssertionError):
                cluster.run("scancel", "--signal=KILL", "--full", job)
                cluster.run("scancel", job)
        for daemon in reversed(cluster.daemons):
            daemon.terminate()
        for daemon in cluster.daemons:
            daemon.wait(timeout=60)


def _jobs(cluster: Cluster) -> list[str]:
    try:
        return cluster.run("squeue", "-h", "-o", "%i").split()
    except AssertionError:
        return []


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with suppress(AssertionError):
            if condition():
                return
        time.sleep(0.2)
    raise AssertionError("Slurm did not come up")
