"""A slurm of two nodes or more on one machine: munged, slurmctld and slurmds of Debian's ``slurm-wlm`` and ``munge``.

    python tests/integration/slurm/cluster.py FOLDER COMMAND...

starts one of two nodes in an empty folder, runs the command with it (``sbatch``, ``squeue``, a shell) and ends it.
Nothing outside the folder is touched, and any user may run it. The nodes, ``node-1`` and on, have a processor each;
partition ``low`` (the default) is preempted by ``high``, with 60 seconds for a checkpoint.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
SECONDS = 120.0
GRACE = 60

# Processes are found by their parents: cgroups are not to be had everywhere. Each node is a slurmd with a port and
# folders of its own. A refused registration would drain a node for good, hence ReturnToService.
CONFIGURATION = """\
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=5,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
MinJobAge=86400
KillWait=30
ReturnToService=2
SlurmdParameters=config_overrides
PartitionName=low Nodes=node-[1-{count}] Default=YES PriorityTier=1 GraceTime={grace} State=UP
PartitionName=high Nodes=node-[1-{count}] PriorityTier=2 PreemptMode=OFF State=UP
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=1 RealMemory=1000\n"


def missing() -> str | None:
    """Why there can be no slurm here, or ``None``."""
    absent = [program for program in NEEDED if _program(program) is None]
    return f"no {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


class Cluster:
    """Nodes of one processor each, started on entering and ended on leaving.

    Args:
        folder: empty, or not there yet; configuration, states and logs go there.
        nodes: how many, ``node-1`` and on.

    Attributes:
        environment: variables with which slurm's commands find it.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder = folder.absolute()
        self.names = [f"node-{number}" for number in range(1, nodes + 1)]
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]
        self.environment["GPUS_PER_NODE"] = "1"
        self.environment["GLOO_SOCKET_IFNAME"] = "lo"  # all nodes are this machine, whatever its name resolves to
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munge's socket may lie in no folder that others can write to
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        controller, *ports = _free_ports(1 + len(self.names))
        host = socket.gethostname().split(".")[0]
        nodes = [NODE.format(name=name, host=host, port=port) for name, port in zip(self.names, ports)]
        (self.folder / "slurm.conf").write_text(
            "".join(nodes)
            + CONFIGURATION.format(
                host=host,
                user=getpass.getuser(),
                folder=self.folder,
                controller=controller,
                count=len(nodes),
                grace=GRACE,
            )
        )
        try:
            files = {"key-file": key, "socket": self.folder / "munge.socket", "pid-file": self.folder / "munge.pid"}
            files |= {"log-file": self.folder / "munge.log", "seed-file": self.folder / "munge.seed"}
            self._start("munged", "--foreground", "--force", *(f"--{name}={path}" for name, path in files.items()))
            self._until(lambda: (self.folder / "munge.socket").exists(), "munged made no socket")
            self._start("slurmctld", "-D")
            for name in self.names:
                (self.folder / name).mkdir()
                self._start("slurmd", "-D", "-N", name)
            count = str(len(self.names))
            self._until(lambda: self.run("sinfo", "-h", "-t", "idle", "-p", "low", "-o", "%D") == count, "no nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if len(self._daemons) > 1:
                self.run("scancel", "--user", getpass.getuser(), check=False)
        finally:
            self._end()

    def _end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str | Path, cwd: Path | None = None, check: bool = True) -> str:
        """What one of slurm's commands prints."""
        try:
            done = subprocess.run(
                command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{command} did not answer within {SECONDS:.0f} s") from error
        if check and done.returncode:
            raise RuntimeError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout.strip()

    def job(self, number: int) -> dict[str, str]:
        """Fields of a job, as ``scontrol show job`` names them."""
        line = self.run("scontrol", "show", "job", "--oneliner", str(number))
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def _start(self, program: str, *arguments: str) -> None:
        path = _program(program)
        assert path is not None, program
        log = (self.folder / "daemons.log").open("a")
        self._daemons.append(
            subprocess.Popen([path, *arguments], env=self.environment, stdout=log, stderr=log, start_new_session=True)
        )

    def _until(self, condition, otherwise: str) -> None:
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                if condition():
                    return
            except RuntimeError:  # the controller does not answer yet
                pass
            dead = [str(daemon.args) for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(f"{log}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))
                raise RuntimeError(f"{otherwise} within {SECONDS:.0f} s; ended: {dead}\n{logs}")
            time.sleep(0.2)


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def main(argv: list[str]) -> int:
    """Run a command with a cluster in a folder."""
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    with Cluster(Path(argv[0])) as cluster:
        return subprocess.run(argv[1:], env=cluster.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
