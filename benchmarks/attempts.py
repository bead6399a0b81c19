"""Ranks of launch/pretrain.py without a launcher, as srun starts them, to be killed and started again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

from rank_pool import free_port

from ds_lowrank import manifest

ROOT = Path(__file__).resolve().parent.parent
_STEP = re.compile(r"step +(\d+) ")


class Attempt:
    """One start of all ranks with one command line.

    Args:
        folder: where they run; each rank's output goes to ``rank_K.log`` there.
        argv: arguments of the script.
        ranks: how many.
        script: what they run.
    """

    def __init__(
        self, folder: Path, argv: Sequence[str], ranks: int, script: Path = ROOT / "launch" / "pretrain.py"
    ) -> None:
        self.log = folder / "rank_0.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        port = str(free_port())
        self.processes = []
        for rank in range(ranks):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
            group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with open(folder / f"rank_{rank}.log", "w") as log:
                # A group of its own, so that what a rank starts can be ended with it.
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), *argv],
                        cwd=folder,
                        env={**environment, **(place | group if ranks > 1 else {})},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )

    @property
    def running(self) -> bool:
        """Whether no rank has ended."""
        return all(process.poll() is None for process in self.processes)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to one rank."""
        self.processes[rank].send_signal(number)

    def end(self) -> None:
        """Kill what is left of all ranks and of what they have started."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.processes:
            process.wait()

    def wait(self, timeout: float) -> list[int]:
        """Exit codes of all ranks; once one fails the others are ended.

        Raises:
            TimeoutError: they did not end in time.
        """
        deadline = time.monotonic() + timeout
        while None in (codes := [process.poll() for process in self.processes]):
            if time.monotonic() > deadline:
                self.end()
                raise TimeoutError(f"the ranks did not end within {timeout} s:\n{self.printed()[-3000:]}")
            if any(codes):
                time.sleep(2)  # the others meet the same error
                self.end()
            time.sleep(0.05)
        return [process.returncode for process in self.processes]

    def printed(self) -> str:
        """What rank 0 has printed."""
        return self.log.read_text(errors="replace")

    def last_step(self) -> int:
        """The last step that was logged, 0 before the first."""
        return max(map(int, _STEP.findall(self.printed())), default=0)


def write_corpus(path: Path) -> Path:
    """A small corpus: ten modules of the standard library, a paragraph a document."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:10]
    path.write_text("\n\n".join(p.read_text(encoding="utf-8") for p in sources), encoding="utf-8")
    return path


Ruins = dict[int, tuple[int, int]]


def unfinished(output: Path) -> Ruins:
    """Incomplete checkpoints by step, with what tells one from another of the same step, written later."""
    ruins = {}
    for step, folder in manifest.checkpoints(output):
        try:
            if not manifest.is_complete(folder):
                stat = folder.stat()
                ruins[step] = (stat.st_ino, stat.st_mtime_ns)
        except FileNotFoundError:  # deleted in this moment
            continue
    return ruins


def newest_step(output: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((step for step, folder in manifest.checkpoints(output) if manifest.is_complete(folder)), default=0)
