"""Ranks that are threads of one process: what ``torch.distributed`` does for :class:`ds_lowrank.comm.collectives.Comm`.

One rank runs at a time; it hands over where it waits for a collective. So nothing hangs: when every rank waits for what
nobody will start, all of them are told at once who waits for what. What is received is full of NaN until it is waited
for, and what is sent must not change before: a real collective may still be on its way.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Ranks = tuple[int, ...]
_here = threading.local()


class RankError(RuntimeError):
    """A rank raised."""


class Released(RuntimeError):
    """A rank waits for a collective that another one has left for good."""


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Call a function on ``size`` ranks; returns what they return, in their order.

    Raises:
        RankError: from the error of the rank that failed first.
    """
    return _World(size).run(function, args)


def this_rank() -> int:
    """Number of the rank that runs."""
    return _here.rank


def on_a_rank() -> bool:
    """Whether a rank runs here."""
    return hasattr(_here, "world")


@dataclass
class _Meeting:
    """One collective: what its ranks bring."""

    kind: str
    ranks: Ranks
    number: int
    parts: dict[int, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.parts) == len(self.ranks)


class _World:
    def __init__(self, size: int):
        self.size = size
        self.everyone = tuple(range(size))
        self._baton = threading.Condition()  # whoever runs has it
        self._meetings: dict[tuple[Ranks, int], _Meeting] = {}
        self._started: dict[tuple[Ranks, int], int] = {}
        self._waiting: dict[int, _Meeting] = {}
        self._over: dict[int, str] = {}
        self._errors: list[tuple[int, BaseException]] = []
        self._results: list[Any] = [None] * size

    def run(self, function: Callable[..., Any], args: Any) -> list[Any]:
        threads = [threading.Thread(target=self._rank, args=(k, function, args), daemon=True) for k in self.everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            rank, error = self._errors[0]
            raise RankError(f"rank {rank} of {self.size}: {type(error).__name__}: {error}") from error
        return self._results

    def _rank(self, rank: int, function: Callable[..., Any], args: Any) -> None:
        with self._baton:
            _here.world, _here.rank = self, rank
            torch.set_num_threads(1)
            end = "has returned"
            try:
                self._results[rank] = function(*args)
            except BaseException as error:
                end = f"has raised {type(error).__name__}"
                self._errors.append((rank, error))
            self._over[rank] = end
            self._baton.notify_all()

    def start(self, kind: str, ranks: Ranks, part: Any) -> _Meeting:
        """Bring this rank's part to the next collective of these ranks."""
        rank = _here.rank
        if rank not in ranks:
            raise RuntimeError(f"rank {rank} starts {kind} of ranks {ranks}")
        number = self._started[ranks, rank] = self._started.get((ranks, rank), -1) + 1
        meeting = self._meetings.setdefault((ranks, number), _Meeting(kind, ranks, number))
        if meeting.kind != kind:
            others = sorted(meeting.parts)
            raise RuntimeError(
                f"rank {rank} starts {kind} where ranks {others} have started {meeting.kind} (number {number} of ranks "
                f"{list(ranks)})"
            )
        meeting.parts[rank] = part
        if meeting.complete:
            del self._meetings[ranks, number]
            self._baton.notify_all()
        return meeting

    def wait(self, meeting: _Meeting) -> list[Any]:
        """Every rank's part, in their order."""
        rank = _here.rank
        self._waiting[rank] = meeting
        while not meeting.complete:
            gone = [k for k in meeting.ranks if k in self._over and k not in meeting.parts]
            if gone or self._stuck():
                self._baton.notify_all()
                raise Released(self._describe())
            self._baton.wait()
        del self._waiting[rank]
        return [meeting.parts[k] for k in meeting.ranks]

    def _stuck(self) -> bool:
        """Whether all that are left wait, and for each other."""
        return all(k in self._over or (k in self._waiting and not self._waiting[k].complete) for k in self.everyone)

    def _describe(self) -> str:
        told = []
        for rank in self.everyone:
            if rank in self._over:
                told.append(f"rank {rank} {self._over[rank]}")
            elif rank in self._waiting:
                meeting = self._waiting[rank]
                missing = [k for k in meeting.ranks if k not in meeting.parts]
                told.append(f"rank {rank} waits for ranks {missing} in {meeting.kind}")
        return "deadlock: " + ", ".join(told)


class Group:
    """A process group: ``None`` stands for all ranks."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks


class _Work:
    """What an asynchronous collective returns."""

    def __init__(self, meeting: _Meeting, finish: Callable[[list[Any]], None]):
        self._meeting, self._finish = meeting, finish

    def wait(self) -> None:
        self._finish(_here.world.wait(self._meeting))


class ThreadDist:
    """The functions of ``torch.distributed`` that the package uses."""

    ReduceOp = torch.distributed.ReduceOp

    @staticmethod
    def all_to_all_single(
        output: Tensor, input: Tensor, received: list[int], sent: list[int], group: Any = None, async_op: bool = False
    ) -> Any:
        rank = _here.rank
        assert (output.numel(), input.numel()) == (sum(received), sum(sent)), "the sizes are not those of the tensors"

        def finish(parts: list[Any]) -> None:
            _unchanged(input, parts[place][0])
            for source, room, (values, sizes) in zip(ranks, output.split(received), parts):
                if sizes[place] != room.numel():
                    raise RuntimeError(f"rank {source} sends rank {rank} {sizes[place]} numbers, not {room.numel()}")
                _same_dtype(values, room)
                room.copy_(values.split(sizes)[place])

        ranks = _ranks(group)
        place = ranks.index(rank)
        return _start("an all-to-all", ranks, (input.clone(), sent), finish, async_op, output)

    @staticmethod
    def all_gather(output: Tensor, input: Tensor, group: Any = None, async_op: bool = False) -> Any:
        ranks = _ranks(group)
        place = ranks.index(_here.rank)
        assert output.numel() == input.numel() * len(ranks)

        def finish(parts: list[Any]) -> None:
            _unchanged(input, parts[place])
            for room, values in zip(output.view(len(ranks), -1), parts):
                _same_dtype(values, room)
                room.copy_(values.view(-1))

        return _start("an all-gather", ranks, input.clone(), finish, async_op, output)

    @staticmethod
    def reduce(tensor: Tensor, dst: int, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        assert op is None, "only sums are"

        def finish(parts: list[Any]) -> None:
            if _here.rank == dst:
                tensor.copy_(_sum(parts))

        return _start(f"a reduction to rank {dst}", _ranks(group), tensor.clone(), finish, async_op, tensor)

    @staticmethod
    def all_reduce(tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False) -> Any:
        most = op == torch.distributed.ReduceOp.MAX

        def finish(parts: list[Any]) -> None:
            tensor.copy_(torch.stack(parts).amax(0) if most else _sum(parts))

        return _start("a maximum" if most else "a sum", _ranks(group), tensor.clone(), finish, async_op, tensor)

    @staticmethod
    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        def finish(parts: list[Any]) -> None:
            gathered[:] = [pickle.loads(part) for part in parts]

        _start("an all-gather of objects", _ranks(group), pickle.dumps(value), finish, False)

    @staticmethod
    def get_global_rank(group: Group, rank: int) -> int:
        return group.ranks[rank]


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Every rank's value, in their order."""
    found: list[Any] = []
    ThreadDist.all_gather_object(found, value, group)
    return found


def _ranks(group: Any) -> Ranks:
    return _here.world.everyone if group is None else group.ranks


def _start(
    kind: str, ranks: Ranks, part: Any, finish: Callable[[list[Any]], None], async_op: bool, *written: Tensor
) -> Any:
    for tensor in written:
        tensor.fill_(float("nan") if tensor.is_floating_point() else 85)
    work = _Work(_here.world.start(kind, ranks, part), finish)
    if async_op:
        return work
    work.wait()
    return None


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        _same_dtype(part, total)
        total += part
    return total


def _same_dtype(values: Tensor, room: Tensor) -> None:
    if values.dtype != room.dtype:
        raise RuntimeError(f"ranks bring {values.dtype} and {room.dtype} to one collective")


def _unchanged(now: Tensor, then: Tensor) -> None:
    if not torch.equal(now.view(torch.uint8), then.view(torch.uint8)):
        raise RuntimeError("what is sent was changed before the collective had ended")


def substitute(patch: Callable[[Any, str, Any], None]) -> None:
    """Put threads in the place of process groups, wherever ``ds_lowrank.comm`` uses these.

    Args:
        patch: sets an attribute of a module, and undoes it at the end of a test.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("ds_lowrank.comm") and getattr(module, "dist", None) is torch.distributed:
            patch(module, "dist", ThreadDist)
            if hasattr(module, "_all_gather"):
                patch(module, "_all_gather", ThreadDist.all_gather)
