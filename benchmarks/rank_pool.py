"""Persistent gloo ranks on this machine: started once, then a call costs a pipe's round trip.

A failing rank's traceback reaches the caller; a rank that hangs is given up after a timeout, and the pool with it.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest.mock import patch

import torch

# What ranks import before or in their first call, ds_lowrank aside: four seconds of a processor for each of them.
PRELOADED = (
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "deepspeed.runtime.zero.stage3",
    "pytest",
)


class RankError(RuntimeError):
    """A rank raised, died or did not answer."""


class RankPool:
    """``size`` processes in one gloo group, each ready to run functions.

    Args:
        size: number of ranks.
        timeout: seconds that a collective may take.
        patience: seconds that a whole call may take; default: the same.
        threads: torch threads a rank.
    """

    def __init__(self, size: int, timeout: float = 120.0, patience: float | None = None, threads: int = 1):
        context = _context()
        port = free_port()
        self.size = size
        self._patience = patience or timeout
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port, timeout, threads), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)
        self.run(_ready)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run a module-level function on every rank; returns the results in rank order.

        Raises:
            RankError: with the traceback of the first rank that failed.
        """
        answers = self._answers(function, args, kwargs, patient=False)
        return [answers[rank] for rank in range(self.size)]

    def run_to_the_end(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Like :meth:`run`, with a :class:`RankError` in the place of what a failing rank returns; ends the pool."""
        answers = self._answers(function, args, kwargs, patient=True)
        self.close()
        return [answers[rank] for rank in range(self.size)]

    def _answers(self, function: Callable[..., Any], args: Any, kwargs: Any, patient: bool) -> dict[int, Any]:
        for pipe in self._pipes:
            pipe.send((function, args, kwargs))
        results: dict[int, Any] = {}
        pending: dict[Any, int] = dict(zip(self._pipes, range(self.size)))
        while pending:
            ready: list[Any] = wait(list(pending), timeout=self._patience)
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(pending.values())} did not answer within {self._patience} s")
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    value = RankError(f"rank {rank} of {self.size}:\n{value}")
                    if not patient:
                        self.close()  # the other ranks may hang in a collective
                        raise value
                results[rank] = value
        return results

    @property
    def alive(self) -> bool:
        """Whether the pool can take a call."""
        return bool(self._processes)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes = []


def _context() -> Any:
    """How ranks are started: forked from one process that has imported what they need, or where that is not safe (a
    device, another system than Linux) each by itself.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    # As prepare_cpu() tells DeepSpeed; and no threads that torch 2.6 starts to compile, which a fork would lose.
    with patch.dict(os.environ, {"DS_ACCELERATOR": "cpu", "TORCHINDUCTOR_COMPILE_THREADS": "1"}):
        forkserver.ensure_running()
    return context


def _serve(pipe: Connection, rank: int, size: int, port: int, timeout: float, threads: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )
    # DeepSpeed reports its memory on stdout at every initialize; results come through the pipe.
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    warnings.simplefilter("ignore", FutureWarning)
    import ds_lowrank

    torch.set_num_threads(threads)
    ds_lowrank.prepare_cpu()
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=timeout), verbose=False)
    gc.freeze()  # DeepSpeed collects garbage whenever an engine is made and destroyed
    while True:
        try:
            function, args, kwargs = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _ready() -> None:
    """Answer, once the group is up."""


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
