"""What a rank keeps of a matrix: made, and compared with what was loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_lowrank.methods import state_fault
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.states.layout import StateLayout

# What a rank keeps of one matrix; numbers and tensors only, so that weights_only=True loads it.
MatrixState = dict[str, int | Tensor]
HISTORY = 16  # overlaps that a matrix's state remembers

# Numbers in a matrix's state that say where its tensors belong.
_ORIGIN = ("left", "row", "basis_row")


class NewStates:
    """Makes states.

    Args:
        rank: this one.
        kept: what methods keep, and how.
        home: where the state of a matrix lies.
    """

    def __init__(self, rank: int, kept: StateLayout, home: Callable[[MatrixPlan], torch.device]):
        self._rank = rank
        self._kept = kept
        self._home = home

    def new(self, plan: MatrixPlan) -> MatrixState | None:
        """State of one matrix on this rank, ``None`` where this rank has no part in it.

        Keys: ``step`` (steps made; 0 until the first non-zero gradient), ``refreshes``; where rows are computed also
        what the method keeps (see :class:`ds_lowrank.states.layout.StateLayout`), on the device of the weights,
        ``indices`` (r, int32), and where these lie in the whole: ``left`` (1 where A = Wᵀ), ``row`` (the first of A),
        ``basis_row`` (the first of the basis). Of a shared matrix every rank keeps the first two. The owner keeps
        ``overlaps`` (float32, the last ``HISTORY`` overlaps with the basis before, newest last, -1: none).
        """
        share = plan.shares[self._rank]
        if share is None and not plan.shared:
            return None
        state: MatrixState = {"step": 0, "refreshes": 0}
        if share is not None:
            home = self._home(plan)
            counts = {"rows": share.rows, "basis": plan.kept(self._rank), "matrix": 1}
            for key, kept in self._kept.tensors(plan.r, plan.dtype).items():
                size = (counts[kept.axis], kept.width)
                state[key] = torch.full(size, kept.fill, dtype=kept.dtype, device=home)
            state["indices"] = torch.full((plan.r,), -1, dtype=torch.int32)
            slice_ = plan.slices[self._rank] if plan.basis_sharded else None
            state.update(left=int(plan.side == "left"), row=share.start, basis_row=0 if slice_ is None else slice_[0])
        elif plan.projected:  # which of the basis' directions are none of a gradient's
            state["indices"] = torch.full((plan.r,), -1, dtype=torch.int32)
        if plan.owner == self._rank:
            state["overlaps"] = torch.full((HISTORY,), -1.0)
        return state

    def fit(self, plan: MatrixPlan, state: MatrixState) -> str | None:
        """Bring a loaded state of one matrix to the weights' device; returns what does not fit, if anything."""
        expected = self.new(plan) or {}
        if fault := state_fault(self._kept, state):
            return f"{plan.name} {plan.shape} {fault}"
        for key in _ORIGIN:
            if key in state and key in expected and (isinstance(state[key], Tensor) or state[key] != expected[key]):
                return (
                    f"{plan.name} {plan.shape} holds {key} {state[key]} where this rank needs {expected[key]}: it is "
                    "another rank's state, or another side was projected"
                )
        if plan.shares[self._rank] is None:  # only a rank that projects needs them: a run may begin to, or cease
            if "indices" in expected:
                state.setdefault("indices", expected["indices"])
            else:
                state.pop("indices", None)
        if state.keys() != expected.keys():
            return f"{plan.name} {plan.shape} has {sorted(state)} where this run keeps {sorted(expected)}"
        for key, value in expected.items():
            found = state[key]
            if isinstance(value, Tensor):
                if not isinstance(found, Tensor) or (found.shape, found.dtype) != (value.shape, value.dtype):
                    is_like = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else repr(found)
                    return f"{key} of {plan.name} {plan.shape} is {is_like}, not {tuple(value.shape)} {value.dtype}"
                state[key] = found.to(value.device)
        return None


def number_of(state: MatrixState, key: str) -> int:
    """The whole number that a state has under ``key``."""
    value = state[key]
    assert isinstance(value, int)
    return value


def tensor_of(state: MatrixState, key: str) -> Tensor:
    """The tensor that a state has under ``key``."""
    value = state[key]
    assert isinstance(value, Tensor)
    return value
