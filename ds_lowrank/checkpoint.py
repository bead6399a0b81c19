"""Starting from a checkpoint that any layout wrote, on any number of ranks."""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_lowrank.adamw8bit_states import EightBitFullRank
from ds_lowrank.adopt import count_of
from ds_lowrank.full_rank import MOMENTS, new_state
from ds_lowrank.layouts import LayoutError, Piece, local_tensors, write_parameter
from ds_lowrank.layouts.zero_files import optimizer_files, packed_state, tag_folder
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.param_groups import clean_name, named_weights
from ds_lowrank.pieces import DESCRIPTION_KEY
from ds_lowrank.plan import MatrixPlan
from ds_lowrank.refresh import MatrixState, tensor_of
from ds_lowrank.report import unwrap
from ds_lowrank.sources import Source, WholeSource, ZeroSource, load_file, read_piece
from ds_lowrank.targets import advise_naming
from ds_lowrank.torch_files import dcp_tensors, model_tensors

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


def open_checkpoint(folder: str | Path) -> Source:
    """A checkpoint of DeepSpeed, FSDP2, DDP or one process, by the Trainer, accelerate or ``engine.save_checkpoint``.

    Args:
        folder: of the checkpoint: ``checkpoint-1000`` of a Trainer, or what ``save_checkpoint`` was given (or the
            folder of a tag in it).

    Raises:
        FileNotFoundError: there is no such folder, or no weights in it.
        ValueError: a file is damaged, or files of some ranks are missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no checkpoint folder {folder}")
    tag = tag_folder(folder)
    if tag is not None:
        files = [load_file(path) for path in optimizer_files(tag)]
        if files and all(DESCRIPTION_KEY in packed_state(content)[1] for content in files):
            return ZeroSource(tag, files, model_tensors(folder, tag))
        return WholeSource(folder, "DeepSpeed with another optimizer", model_tensors(folder, tag), {})
    ranks = _ranks_that_wrote(folder)
    if (folder / "optimizer_0" / ".metadata").is_file():
        states = _by_parameter(dcp_tensors(folder / "optimizer_0"))
        return WholeSource(folder, "FSDP2", model_tensors(folder), states, ranks)
    for name, layout in (("optimizer.bin", "FSDP2 or accelerate"), ("optimizer.pt", "DDP or one process")):
        if (folder / name).is_file():
            return WholeSource(folder, layout, model_tensors(folder), _whole_states(folder / name), ranks)
    return WholeSource(folder, "weights only", model_tensors(folder), {}, ranks)


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
    try:
        source = open_checkpoint(folder) if isinstance(folder, (str, Path)) else folder
        named = named_weights(model)
        fault = _weights_fault(source, inner, named, strict) or _states_fault(source, inner)
    except (ValueError, OSError) as error:
        fault = str(error)
    for rank, found in enumerate(inner.comm.gather_objects(fault, "checkpoint")):
        if found:
            raise ValueError(f"the checkpoint cannot be continued (rank {rank}): {found}")
    _load_weights(source, inner, named)
    _load_full_rank(source, inner)
    states = {p.name: s for p in inner.plans if (s := _matrix_state(source, inner, p)) is not None}
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
    return loaded


def has_low_rank(folder: str | Path) -> bool:
    """Whether a checkpoint holds states of this optimizer; see :func:`open_checkpoint`."""
    return bool(open_checkpoint(folder).matrices)


# -- opening ----------------------------------------------------------------------------------------------------------


def _whole_states(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = load_file(path)
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise  # damaged
        # galore-torch keeps objects in its state.
        logger.warning("%s: its weights are used, its optimizer is not", error)
        return {}
    groups = content["param_groups"]
    ids = [key for group in groups for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [])]
    if len(names) != len(ids):
        names = [str(key) for key in ids]
    state = content["state"]
    return {
        clean_name(name): {k: v for k, v in state[key].items() if isinstance(v, Tensor)}
        for key, name in zip(ids, names)
        if key in state
    }


def _by_parameter(tensors: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``optimizer.state.<parameter>.<key>`` -> parameter -> key."""
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        start, _, rest = name.partition("state.")
        if start in ("", "optimizer.") and rest:
            parameter, _, key = rest.rpartition(".")
            states.setdefault(clean_name(parameter), {})[key] = tensor
    return states


def _ranks_that_wrote(folder: Path) -> int | None:
    """The Trainer leaves a file of random states for every rank."""
    found = len(list(folder.glob("rng_state_*.pth"))) or int((folder / "rng_state.pth").is_file())
    return found or None


def trainer_step(folder: str | Path) -> int | None:
    """Step of a Trainer's checkpoint; ``None`` where there is no ``trainer_state.json``."""
    path = Path(folder) / "trainer_state.json"
    return json.loads(path.read_text())["global_step"] if path.is_file() else None


# -- loading ----------------------------------------------------------------------------------------------------------


def _weights_fault(source: Source, optimizer: LowRankAdamW, others: Mapping[str, Tensor], strict: bool) -> str | None:
    saved = source.parameters()
    for member in optimizer.members:
        shape = saved.get(_alias(member.name, saved, others))
        if shape is None and strict:
            hint = ": give parameters as (name, parameter) pairs" if re.match(r"group\d+\.\d+$", member.name) else ""
            return f"it has no weights of {member.name} {member.shape}{hint}"
        if shape is not None and shape != member.shape:
            return f"{member.name} is {shape} in it and {member.shape} in this model"
    known = {m.name for m in optimizer.members}
    rest = [name for name in others if name not in known and _alias(name, known, others) not in known]
    absent = [n for n in rest if n not in saved and n not in source.others] if strict and rest else []
    if absent:
        return f"it has no {absent[0]}, which is frozen, or a buffer, in this model"
    return None


def _states_fault(source: Source, optimizer: LowRankAdamW) -> str | None:
    plans, formats = optimizer.plans, optimizer.formats
    here = {plan.name for plan in plans}
    foreign = [name for name in source.matrices if name not in here]
    if foreign:
        return f"it has a low-rank state of {foreign[0]}, which is not projected here: {advise_naming(foreign)}"
    for plan in plans:
        saved = source.matrices.get(plan.name)
        if saved is None:
            continue
        if saved.left != (plan.side == "left"):
            return f"{plan.name} {plan.shape} was projected on its other side: use the same proj_type"
        if (saved.long, saved.short, saved.rank) != (plan.long, plan.short, plan.rank):
            return (
                f"{plan.name} {plan.shape} was projected to rank {saved.rank} and is to rank {plan.rank} here: use the "
                "same rank and rank_pattern"
            )
        if saved.formats.names != formats.names:
            return f"{plan.name} {plan.shape} {formats.differ(*saved.formats.names)}"
    projected = {plan.parameter for plan in plans}
    moments = source.full_rank()
    for member in [m for m in optimizer.members if m.name not in projected and source.counter(m.name) is not None]:
        # Where no matrix has a state, the others may still have codes, which are not made numbers again.
        if formats.state_dtype != "int8" and source.moment_dtype(member.name) == torch.uint8:
            return f"{member.name} has 8-bit moments there: use state_dtype 'int8'"
        if moments.get(member.name, member.shape) != member.shape:
            return f"AdamW's moments of {member.name} are {moments[member.name]} in it and {member.shape} in this model"
        if count_of(source.counter(member.name)) is None:
            return f"AdamW's steps of {member.name} {member.shape} are {source.counter(member.name)}, no whole number"
    return None


def _alias(name: str, saved: Container[str], named: Mapping[str, Tensor]) -> str:
    """The name under which a checkpoint has a parameter: of tied ones it has one only."""
    if name in saved or name not in named:
        return name
    return next((other for other, p in named.items() if p is named[name] and other in saved), name)


def _load_weights(source: Source, optimizer: LowRankAdamW, named: Mapping[str, Tensor]) -> None:
    """Weights, frozen ones and buffers too: what the model computes with, and what the optimizer moves."""
    layout = optimizer.layout
    saved = source.parameters()
    pending: dict[str, Tensor] = {m.name: m.parameter for m in optimizer.members}
    trained = {id(p) for p in pending.values()}
    pending.update({n: p for n, p in named.items() if id(p) not in trained})
    for name, parameter in pending.items():
        known = _alias(name, saved, named)
        if known not in saved:
            if known in source.others:  # what DeepSpeed's optimizer does not know
                value = source.others[known].reshape(-1)
                write_parameter(parameter, lambda a, b, value=value: value[a:b], layout.ranks.rank)  # type: ignore[misc]
            continue
        write_parameter(parameter, partial(_weights, source, known), layout.ranks.rank)
        if name in layout.pieces:
            target = layout.weight(name)
            target.copy_(read_piece(source, known, "weight", layout.pieces[name], saved[known]))
            layout.store(name, target)


def _load_full_rank(source: Source, optimizer: LowRankAdamW) -> None:
    """AdamW's moments of what is not projected."""
    layout = optimizer.layout
    projected = {plan.parameter for plan in optimizer.plans}
    for key in [k for k in optimizer.state if isinstance(k, Tensor)]:
        del optimizer.state[key]
    if isinstance(optimizer.full_rank, EightBitFullRank):
        optimizer.full_rank.load(optimizer.state, source)
        return
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
            state.update(new_state(tensor, optimizer.formats.state_dtype))
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
        for key, rows in optimizer.formats.rows(plan.rank, plan.dtype).items():
            tensor, first = tensor_of(state, key), int(state["basis_row" if rows.of == "basis" else "row"])
            tensor.copy_(source.rows(plan.name, key, first, first + tensor.shape[0]))
    return state


def _weights(source: Source, name: str, start: int, stop: int) -> Tensor:
    return read_piece(source, name, "weight", Piece(start, stop), ())
