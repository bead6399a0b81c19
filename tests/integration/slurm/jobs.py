"""Jobs of the batch scripts of launch/slurm/, with a rank on each of two nodes."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from cluster import Cluster
from launching import ROOT
from safetensors.torch import load_file

SCRIPTS = {name: ROOT / "launch" / "slurm" / f"pretrain_{name}.sbatch" for name in ("deepspeed", "fsdp2")}


class Job:
    """A job of two nodes with a rank each.

    Args:
        cluster: where it runs.
        script: the batch script.
        argv: its arguments.
        options: of ``sbatch``.
        minutes: that it is waited for; its time limit is twice as far.
    """

    def __init__(
        self, cluster: Cluster, script: Path, *argv: str, options: tuple[str, ...] = (), minutes: int = 5
    ) -> None:
        self.cluster, self.minutes = cluster, minutes
        self._since = time.monotonic()
        self._waits: float | None = None
        self.log = cluster.folder / f"{script.stem}-{time.monotonic_ns()}.txt"
        wanted = ["--parsable", f"--output={self.log}", "--gpus-per-node=0", f"--time={2 * minutes}", *options]
        printed = cluster.run("sbatch", *wanted, str(script), *argv, cwd=ROOT)
        self.number = int(printed.split(";")[0])

    @property
    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def printed(self) -> str:
        # Bytes of progress bars may be cut in two by another process's lines.
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until(self, condition) -> None:
        deadline = time.monotonic() + 60 * self.minutes
        while not condition():
            assert time.monotonic() < deadline, self.printed() + str(self.cluster.job(self.number))
            time.sleep(0.2)

    def wait(self) -> str:
        """The state in which it ended."""
        self._since = time.monotonic()
        self.until(self.ended)
        return self.state

    def hurry(self) -> None:
        """Start it again soon where slurm would let two minutes pass.

        Not in the second in which it ended: slurmd has revoked its credentials.
        """
        fields = self.cluster.job(self.number)
        if (fields["JobState"], fields["Reason"]) != ("PENDING", "BeginTime"):
            self._waits = None
        elif self._waits is None:
            self._waits = time.monotonic()
        elif time.monotonic() - self._waits > 2:
            self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now", check=False)

    def ended(self) -> bool:
        """Whether it has been in a final state for a while: one that is being queued again passes through one."""
        self.hurry()
        fields = self.cluster.job(self.number)
        if fields["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            self._since = time.monotonic()
        return time.monotonic() - self._since > 5


def same_weights(one: Path, other: Path) -> bool:
    """Whether two runs have saved the same weights, bit by bit."""
    here, there = (load_file(folder / "model.safetensors") for folder in (one, other))
    return here.keys() == there.keys() and all(torch.equal(weight, there[name]) for name, weight in here.items())
