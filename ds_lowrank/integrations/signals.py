"""Signals that end a run: caught without doing anything, and agreed upon by the ranks without any of them waiting."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist


class Signals:
    """Remembers a signal instead of dying of it. Handlers that were there before are called as well.

    Args:
        numbers: the signals.

    Attributes:
        got: the last signal that came, or 0.
    """

    def __init__(self, *numbers: int) -> None:
        self.got = 0
        self._numbers = numbers
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Begin. Only the main thread can set handlers; elsewhere this does nothing."""
        self.got = 0
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in self._numbers:
            self._before[number] = signal.signal(number, self._remember)

    def restore(self) -> int:
        """Put the handlers of before back; returns the signal that came, or 0."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before = {}
        return self.got

    def _remember(self, number: int, frame: Any) -> None:
        self.got = number
        before = self._before.get(number)
        if callable(before):
            before(number, frame)


class Vote:
    """Whether any rank was told to stop: asked at the end of one step, answered at the end of the next.

    The number travels while the next step is computed. On a GPU it is brought to the host on a stream of its own, so
    that reading it waits for the step in which it was asked and not for the one that has been queued since.

    Args:
        device: of the ranks' collectives.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = torch.device(device)
        self._read: Callable[[], float] | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._host = torch.zeros(1, pin_memory=True)
            self._event = torch.cuda.Event()

    def ask(self, number: int) -> None:
        """Start to find the largest number of all ranks. Collective; does not wait."""
        tensor = torch.full((1,), float(number), device=self._device)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, async_op=True)
        self._asked = tensor  # kept until it has been read
        if self._device.type != "cuda":

            def read() -> float:
                work.wait()
                return tensor.item()

        else:
            with torch.cuda.stream(self._stream):
                work.wait()  # the stream waits, the host does not
                self._host.copy_(tensor, non_blocking=True)
                self._event.record()

            def read() -> float:
                self._event.synchronize()
                return self._host.item()

        self._read = read

    def answer(self) -> int:
        """What the ranks answered to the last question, 0 where none is open.

        Raises:
            RuntimeError: a rank died or hangs.
        """
        if self._read is None:
            return 0
        read, self._read = self._read, None
        try:
            return int(read())
        except RuntimeError as error:
            raise RuntimeError(f"the ranks could not agree whether to stop: {error}") from error


class _Undisturbed:
    """A data loader's ``worker_init_fn`` that leaves SIGTERM to the process that trains."""

    def __init__(self, inner: Callable[[int], None] | None) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        if self.inner is not None:
            self.inner(worker)


def ignore_termination_in_workers(loader: Any) -> None:
    """Have a data loader's processes outlive a signal that a scheduler sends to every process of a job.

    They would die of it at once, and the ranks of that before their checkpoint is written. They still end with the
    process that they work for.
    """
    if getattr(loader, "num_workers", 0) and not isinstance(loader.worker_init_fn, _Undisturbed):
        loader.worker_init_fn = _Undisturbed(loader.worker_init_fn)
