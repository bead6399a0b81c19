"""Starting from a checkpoint that any layout wrote, on any number of ranks."""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_lowrank.checkpoint.opening import open_checkpoint
from ds_lowrank.checkpoint.rank_files import FIRST_ROW
from ds_lowrank.checkpoint.sources import Source, cut_piece, read_piece
from ds_lowrank.engine.state import MatrixState, tensor_of
from ds_lowrank.full_rank.adamw import MOMENTS, new_state
from ds_lowrank.full_rank.adamw8bit_states import EightBitFullRank
from ds_lowrank.full_rank.dealt import DealtFullRank
from ds_lowrank.layouts import LayoutError, Piece, local_tensors, whole_shape, write_parameter
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.param_groups import named_weights
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.report import unwrap
from ds_lowrank.state_dict.adopt import count_of
from ds_lowrank.targets.patterns import advise_naming

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """What was started from.

    Attributes:
        layout, ranks: that wrote the checkpoint, as far as it says.
        matrices: projected matrices whose moments and subspaces go on.
        fresh: those that start anew, because the checkpoint has nothing for them.
    """

    layout: str
    ranks: int | None
    matrices: int
    fresh: int


@torch.no_grad()
def load_checkpoint(folder: str | Path | Source, model: nn.Module, optimizer: Any, *, strict: bool = True) -> Loaded:
    """Bring a model and its optimizer to where a checkpoint left off. Collective.

    Weights (the fp32 master copy where there is one), AdamW's moments and low-rank states; not the learning-rate
    schedule, random numbers and the position in the data, which belong to the training loop.

    Args:
        folder: see :func:`open_checkpoint`.
        model: as it trains: sharded, wrapped or in its engine.
        optimizer: a :class:`ds_lowrank.LowRankAdamW` or what accelerate or DeepSpeed wrapped it in.
        strict: refuse a checkpoint that lacks weights of the model.

    Raises:
        ValueError: on all ranks, when the checkpoint does not fit the model or the optimizer's options.
        FileNotFoundError: see :func:`open_checkpoint`.
    """
    inner = unwrap(optimizer)
    layout = inner.layout
    source: Any = None
    named: dict[str, Tensor] = {}
    fault: str | None = None
    try:
        source = open_checkpoint(folder) if isinstance(folder, (str, Path)) else folder
        named = named_weights(model)
        fault = _weights_fault(source, inner, named, strict) or _states_fault(source, inner, named)
        if fault is None:
            source.probe(layout.ranks.rank, layout.ranks.size)
    except (ValueError, OSError) as error:
        fault = str(error)
    _agree(inner, fault)
    # Nothing should fail from here on; if it does, all ranks end together all the same.
    states: dict[str, MatrixState] = {}
    for key in [k for k in inner.state if isinstance(k, Tensor)]:
        del inner.state[key]
    apart = inner.full_rank if isinstance(inner.full_rank, (EightBitFullRank, DealtFullRank)) else None
    try:
        _load_weights(source, inner, named)
        if apart is None:
            _load_full_rank(source, inner)
        states = {p.name: s for p in inner.plans if (s := _matrix_state(source, inner, p)) is not None}
    except (ValueError, OSError, RuntimeError) as error:
        fault = str(error)
    _agree(inner, fault)
    if apart is not None:
        apart.load(inner.state, source)  # collective
    inner.replace_states(states)
    mismatches = inner.comm.gather_objects(layout.mismatch(), "checkpoint")
    for rank, found in enumerate(mismatches):
        if found:
            raise LayoutError(f"rank {rank}, after loading: {found}")
    kept = sum(p.name in source.matrices for p in inner.plans)
    loaded = Loaded(source.layout, source.ranks, kept, len(inner.plans) - kept)
    if loaded.fresh and layout.ranks.rank == 0:
        logger.warning(
            "%s has no low-rank state for %d of %d matrices: their moments and subspaces start anew from its weights",
            source.folder,
            loaded.fresh,
            len(inner.plans),
        )
    frozen = _frozen_matrices(source, inner, named)
    if frozen and layout.ranks.rank == 0:
        logger.warning(
            "%s has low-rank states of %d matrices that are frozen here (%s, ...): they are left behind",
            source.folder,
            len(frozen),
            frozen[0],
        )
    return loaded


def _agree(optimizer: LowRankAdamW, fault: str | None) -> None:
    """Raise on all ranks what one of them has found. Collective."""
    for rank, found in enumerate(optimizer.comm.gather_objects(fault, "checkpoint")):
        if found:
            raise ValueError(f"the checkpoint cannot be continued (rank {rank}): {found}")


def _weights_fault(source: Source, optimizer: LowRankAdamW, others: Mapping[str, Tensor], strict: bool) -> str | None:
    for member in optimizer.members:
        shape = _saved_shape(source, member.name, others)
        if shape is None and strict:
            hint = ": give parameters as (name, parameter) pairs" if re.match(r"group\d+\.\d+$", member.name) else ""
            return f"it has no weights of {member.name} {member.shape}{hint}"
        if shape is not None and shape != member.shape:
            return f"{member.name} is {shape} in it and {member.shape} in this model"
    known = {m.name for m in optimizer.members}
    rest = [name for name in others if name not in known and _alias(name, known, others) not in known]
    for name in rest:
        shape = _saved_shape(source, name, others)
        if shape is None and strict:
            return f"it has no {name}, which is frozen, or a buffer, in this model"
        if shape is not None and shape != whole_shape(others[name]):
            return f"{name} is {shape} in it and {whole_shape(others[name])} in this model"
    return None


def _states_fault(source: Source, optimizer: LowRankAdamW, named: Mapping[str, Tensor]) -> str | None:
    plans, formats = optimizer.plans, optimizer.method.formats
    here = {plan.name for plan in plans}
    frozen = _frozen_matrices(source, optimizer, named)
    foreign = [name for name in source.matrices if name not in here and name not in frozen]
    if foreign:
        return f"it has a low-rank state of {foreign[0]}, which is not projected here: {advise_naming(foreign)}"
    for plan in plans:
        saved = source.matrices.get(plan.name)
        if saved is None:
            continue
        if saved.left != (plan.side == "left"):
            return f"{plan.name} {plan.shape} was projected on its other side: use the same proj_type"
        if (saved.long, saved.short, saved.rank) != (plan.long, plan.short, plan.r):
            return (
                f"{plan.name} {plan.shape} was projected to rank {saved.rank} and is to rank {plan.r} here: use the "
                "same rank and rank_pattern"
            )
        if fault := optimizer.method.states.fault(saved.states):
            return f"{plan.name} {plan.shape} {fault}"
    projected = {plan.parameter for plan in plans}
    moments = source.full_rank()
    for member in [m for m in optimizer.members if m.name in moments and m.name not in projected]:
        steps = source.counter(member.name)
        if steps is None:
            continue  # another optimizer's: nothing is taken
        # Where no matrix has a state, the others may still have codes, which are not made numbers again.
        if formats.state_dtype != "int8" and source.moment_dtype(member.name) == torch.uint8:
            return f"{member.name} has 8-bit moments there: use state_dtype 'int8'"
        if moments[member.name] != member.shape:
            return f"AdamW's moments of {member.name} are {moments[member.name]} in it and {member.shape} in this model"
        if count_of(steps) is None:
            return f"AdamW's steps of {member.name} {member.shape} are {steps}, no whole number"
    return None


def _frozen_matrices(source: Source, optimizer: LowRankAdamW, named: Mapping[str, Tensor]) -> list[str]:
    """Matrices with a state in a checkpoint whose parameters are frozen here and in no group: they need none."""
    members = {m.name for m in optimizer.members}
    still = {name for name, p in named.items() if not p.requires_grad and name not in members}
    return [name for name, saved in source.matrices.items() if saved.parameter in still]


def _alias(name: str, saved: Container[str], named: Mapping[str, Tensor]) -> str:
    """The name under which a checkpoint has a parameter: of tied ones it has one only."""
    if name in saved or name not in named:
        return name
    return next((other for other, p in named.items() if p is named[name] and other in saved), name)


def _saved_shape(source: Source, name: str, named: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Of a weight or a buffer, whether or not the optimizer that saved it knew of it."""
    saved = source.parameters()
    known = _alias(name, saved, named)
    if known in saved:
        return saved[known]
    known = _alias(name, source.others, named)
    return tuple(source.others[known].shape) if known in source.others else None


def _load_weights(source: Source, optimizer: LowRankAdamW, named: Mapping[str, Tensor]) -> None:
    """Weights, frozen ones and buffers too: what the model computes with, and what the optimizer moves."""
    layout = optimizer.layout
    saved = source.parameters()
    pending: dict[str, Tensor] = {m.name: m.parameter for m in optimizer.members}
    trained = {id(p) for p in pending.values()}
    pending.update({n: p for n, p in named.items() if id(p) not in trained})
    for name, parameter in pending.items():
        known = _alias(name, saved, named)
        read = partial(_weights, source, known)
        if known not in saved:  # frozen when it was saved, or a buffer: DeepSpeed's optimizer does not know it
            known = _alias(name, source.others, named)
            if known not in source.others:
                continue
            read = partial(_elements, source.others[known].reshape(-1))
        write_parameter(parameter, read, layout.ranks.rank)
        if name in layout.pieces:
            target = layout.weight(name)
            target.copy_(cut_piece(read, layout.pieces[name], whole_shape(parameter)))
            layout.store(name, target)


def _load_full_rank(source: Source, optimizer: LowRankAdamW) -> None:
    """AdamW's moments of what is not projected."""
    layout = optimizer.layout
    projected = {plan.parameter for plan in optimizer.plans}
    shapes = {m.name: m.shape for m in optimizer.members}
    for name in shapes:
        here = name in layout.pieces
        if name in projected or not (here or layout.by_parameter):
            continue
        steps = source.counter(name)
        if steps is None:
            continue
        tensor, offset = layout.place(name)
        state = optimizer.state[tensor]
        if not state:
            state.update(new_state(tensor, optimizer.method.formats.state_dtype))
        # A flat buffer has one counter for all that lies in it.
        state["step"].fill_(max(float(state["step"]), steps))
        for moment in MOMENTS if here else ():  # DTensors have a state on ranks that hold nothing, too
            found = read_piece(source, name, moment, layout.pieces[name], shapes[name])
            target = local_tensors([state[moment]])[0]
            if target.is_contiguous():
                target.view(-1)[offset : offset + found.numel()].copy_(found)
            else:  # as its parameter lies, which has all of the tensor
                target.copy_(found.view(target.shape))


def _matrix_state(source: Source, optimizer: LowRankAdamW, plan: MatrixPlan) -> MatrixState | None:
    """What this rank keeps of one matrix, from the checkpoint or fresh."""
    state = optimizer.new_state(plan)
    if state is None or plan.name not in source.matrices:
        return state
    numbers = source.numbers(plan.name)
    state["step"], state["refreshes"] = int(numbers["step"]), int(numbers["refreshes"])
    for key in ("indices", "overlaps"):
        if key in state:
            tensor_of(state, key).copy_(numbers[key])
    if "row" in state:
        for key, rows in optimizer.method.states.tensors(plan.r, plan.dtype).items():
            at = FIRST_ROW[rows.axis]
            tensor, first = tensor_of(state, key), 0 if at is None else int(state[at])
            tensor.copy_(source.rows(plan.name, key, first, first + tensor.shape[0]))
    return state


def _elements(flat: Tensor, start: int, stop: int) -> Tensor:
    return flat[start:stop]


def _weights(source: Source, name: str, start: int, stop: int) -> Tensor:
    return read_piece(source, name, "weight", Piece(start, stop), ())
