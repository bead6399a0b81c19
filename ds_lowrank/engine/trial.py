"""A rule's first steps, looked at: what a rule of one's own gets wrong is said on all ranks, with its name.

Ranks that do not agree would wait for each other, and a tensor of another shape is broadcast without a word. Nothing is
looked at in later steps.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.rules import Hyper, Rule, Stack, Steps, Update

_RETURNS = "returns"
_Like = tuple[tuple[int, ...], torch.dtype]


class Trial:
    """Looks at a rule once for every kind of run.

    Args:
        comm: the collectives.
        rule: whose ``step`` it is.
    """

    def __init__(self, comm: Comm, rule: Rule):
        self._comm = comm
        self._rule = rule
        self._kinds: set[tuple[bool, ...]] = set()

    def is_new(self, run: Sequence[MatrixPlan]) -> bool:
        """Whether no run of this kind was looked at yet: what a rule may see differently is which ranks compute no row.

        The same on all ranks where the matrices are shared.
        """
        ranks = range(self._comm.ranks.size) if run[0].shared else ()
        kind = (run[0].shared, *(any(p.shares[k] is not None for p in run) for k in ranks))
        new = kind not in self._kinds
        self._kinds.add(kind)
        return new

    def stand_by(self, run: Sequence[MatrixPlan]) -> None:
        """What a rank does meanwhile that does not call the rule. Collective when the matrices are shared.

        Raises:
            ValueError: see :meth:`watch`.
        """
        self._agree(run, _RETURNS, None)

    def watch(
        self,
        run: Sequence[MatrixPlan],
        r: Tensor,
        opened: MutableMapping[str, Tensor],
        hyper: Hyper,
        stack: Stack,
    ) -> Steps:
        """``rule.step``, as a generator. Collective before each of its sums and at its end when matrices are shared.

        Raises:
            ValueError: on all ranks: it fails or gives back what it must not on one of them, or ranks yield other
                sums.
        """
        rows, kept = _like(r), {name: _like(tensor) for name, tensor in opened.items()}
        steps: Generator[Tensor, Tensor, Update] | None = None
        total: Tensor | None = None
        while True:
            partial: Any = None
            answer: Any = None
            failed: Exception | None = None
            try:
                if steps is not None:
                    assert total is not None
                    partial = steps.send(total)
                else:
                    answer = self._rule.step(r, opened, hyper, stack)
                    if isinstance(answer, Generator) and self._rule.sums:
                        steps = answer
                        partial = next(steps)
            except StopIteration as stop:
                answer, said = stop.value, _RETURNS
            except Exception as error:
                failed, said = error, _RETURNS
            else:
                said = _RETURNS if steps is None else _yielded(partial)
            fault = None
            if failed is not None:
                fault = f"raises {type(failed).__name__}: {failed}"
            elif said is _RETURNS:
                fault = self._fault(answer, rows) or _slot_fault(opened, kept)
            elif not isinstance(partial, Tensor):
                fault = f"yields {type(partial).__name__}, not a tensor"
            self._agree(run, said, fault, failed)
            if said is _RETURNS:
                return answer
            total = yield partial

    def _agree(self, run: Sequence[MatrixPlan], said: str, fault: str | None, cause: Exception | None = None) -> None:
        mine = (said, fault)
        told = self._comm.gather_objects(mine, "first step of a rule") if run[0].shared else [mine]
        what = f"rule {self._rule.name!r}, first step of {run[0].name} {run[0].shape}"
        for rank, (_, wrong) in enumerate(told):
            if wrong is not None:
                where = f" (rank {rank})" if len(told) > 1 else ""
                raise ValueError(f"{what}: it {wrong}{where}") from cause
        # Who does not call the rule has nothing to say to its sums, and such a rule has none.
        if len({word for word, _ in told}) > 1:
            each = ", ".join(f"{word} on rank {rank}" for rank, (word, _) in enumerate(told))
            raise ValueError(
                f"{what}: its ranks do not agree, it {each}: all of them make the same yields, those with no row too"
            )

    def _fault(self, update: Any, rows: _Like) -> str | None:
        """What is wrong with what the rule has returned, for R of this shape and dtype."""
        if isinstance(update, Generator):
            return "returns a generator without being one: write return (yield from ...), so that every rank takes part"
        if not isinstance(update, Update):
            return f"returns {type(update).__name__}, not an Update"
        (count, _), dtype = rows
        for name, wanted in (("low", rows), ("row_scale", ((count,), dtype))):
            value = getattr(update, name)
            if value is not None and (not isinstance(value, Tensor) or _like(value) != wanted):
                return f"returns {name} as {_told(value)}, not {_told_like(wanted)}"
        if update.row_scale is not None and not self._rule.reads_gradient:
            return "returns a row_scale and does not declare reads_gradient = True"
        if update.low is not None and not self._rule.lifts:
            return "returns low and declares lifts = False"
        return None


def _slot_fault(opened: Mapping[str, Tensor], kept: Mapping[str, _Like]) -> str | None:
    """What is wrong with the state that a rule has left."""
    if opened.keys() != kept.keys():
        return f"leaves {', '.join(opened) or 'nothing'} in its state, and declares {', '.join(kept) or 'no slot'}"
    for name, wanted in kept.items():
        if _like(opened[name])[0] != wanted[0]:
            return f"leaves {name} as {_told(opened[name])}, not {_told_like(wanted)}"
    return None


def _yielded(partial: Any) -> str:
    return f"yields {_told(partial)}"


def _like(tensor: Tensor) -> _Like:
    return tuple(tensor.shape), tensor.dtype


def _told(value: Any) -> str:
    return _told_like(_like(value)) if isinstance(value, Tensor) else type(value).__name__


def _told_like(like: _Like) -> str:
    return f"{like[0]} {str(like[1]).removeprefix('torch.')}"
