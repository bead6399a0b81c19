"""Gloo's threads at the end of a process, which Python's shutdown would abort."""

from __future__ import annotations

import atexit
import time
from functools import cache
from pathlib import Path

_TASKS = Path("/proc/self/task")


@cache
def await_gloo_at_exit() -> None:
    """See to it, once, that Python's shutdown finds gloo's threads idle.

    A collective is over for the program when its tensors are there; gloo's thread lets go of them a moment later, and
    needs the interpreter for that. Where the interpreter is shutting down, Python before 3.14 ends a thread that asks
    for it, and C++ ends the process with it: "terminate called without an active exception", exit code -6, after
    everything was done. ``destroy_process_group`` does not wait for these threads while anything refers to a group, as
    DeepSpeed and device meshes do.
    """
    atexit.register(await_gloo)


def await_gloo(limit: float = 60.0) -> None:
    """Return when every thread of gloo is idle, or after ``limit`` seconds; at once where there are none.

    To be called when nothing is sent any more. Knows the threads by the name that torch gives them (Linux).
    """
    deadline, looks = time.monotonic() + limit, 0
    while looks < 3 and time.monotonic() < deadline:
        threads = [task for task in _TASKS.glob("*") if _read(task / "comm").startswith("pt_gloo_runloop")]
        if not threads:
            return
        time.sleep(0.005)  # lets go of the interpreter: who waited for it is running now, or about to
        idle = all(_read(task / "stat").rpartition(")")[2].split()[:1] in ([], ["S"]) for task in threads)
        looks = looks + 1 if idle else 0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the thread has ended
        return ""
