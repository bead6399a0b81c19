"""8-bit moments of parameters that are not projected, as they are saved and loaded.

An entry of a parameter has ``step`` (float32 number), ``exp_avg_codes`` and ``exp_avg_sq_codes`` (uint8, the shape of
the parameter; DTensors cut as it is) and ``exp_avg_scale`` and ``exp_avg_sq_scale`` (float32, a number for every block
of the flattened parameter, whole on every rank: a block may be on two).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ds_lowrank.checkpoint.sources import Source, read_piece
from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.full_rank.adamw import MOMENTS, Rounding, held_part
from ds_lowrank.full_rank.adamw8bit import FORMATS, AdamW8bit, State
from ds_lowrank.layouts import Layout, Member, ParameterLayout, Piece, local_tensors
from ds_lowrank.state_dict.adopt import count_of, moments_fault, refuse_together, tensor_name, wholes
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY
from ds_lowrank.states.blocks import count

_CODES = tuple(form.keys(quantity)[0] for quantity, form in FORMATS.items())
_SCALES = tuple(form.keys(quantity)[1] for quantity, form in FORMATS.items())


class EightBitFullRank:
    """Parameters that are not projected, with 8-bit moments; see :class:`ds_lowrank.full_rank.adamw.FullRank`.

    Collective.

    Args:
        layout, comm, members, rounding: see :class:`ds_lowrank.full_rank.adamw8bit.AdamW8bit`.

    Attributes:
        adam: makes the steps.
    """

    def __init__(self, layout: Layout, comm: Comm, members: Sequence[Member], rounding: Rounding | None):
        self.adam = AdamW8bit(layout, comm, members, rounding)

    def ensure(self, states: MutableMapping[Any, Any]) -> None:  # noqa: D102
        self.adam.ensure(states.setdefault(EIGHT_BIT_KEY, {}))

    def step(  # noqa: D102
        self, names: Sequence[str], group: Mapping[str, Any], states: MutableMapping[Any, Any]
    ) -> Sequence[Pending[None]]:
        self.adam.step(names, group, states[EIGHT_BIT_KEY])
        return ()

    def collect(self, states: Mapping[Any, Any], takers: Sequence[int] | None = None) -> dict[str, dict[str, Tensor]]:
        """Entries by parameter, where groups hold the model's own. Collective where they are sharded."""
        adam, layout = self.adam, cast(ParameterLayout, self.adam.layout)
        entries = {}
        for name, shape in adam.shapes.items():
            state = states[EIGHT_BIT_KEY][name]
            entry = entries[name] = {"step": torch.tensor(float(state["step"]))}
            local = local_tensors([layout.place(name)[0]])[0].shape
            dim = layout.shard_dim(name)
            for key in _CODES:
                codes = state[key].view(local)
                entry[key] = codes if dim is None else layout.distribute(codes, shape, dim)
            entry.update(zip(_SCALES, _whole_scales(adam, name, [state[key] for key in _SCALES])))
        return entries

    def adopt(self, states: MutableMapping[Any, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """States of this rank from what a framework has loaded. Collective.

        Args:
            states: the optimizer's. What another format kept there on tensors of the groups is rounded, and goes.
            entries: by parameter, as :meth:`collect` makes them, or with moments that are numbers, which are rounded.

        Raises:
            ValueError: on all ranks, when something does not fit.
        """
        adam, loaded = self.adam, states.get(EIGHT_BIT_KEY, {})
        layout = cast(ParameterLayout, adam.layout)
        flats = {tensor: state for tensor, state in states.items() if isinstance(tensor, Tensor)}
        wide = {
            name: (tensor, state)
            for tensor, state in flats.items()
            if state != {}
            for name in adam.layout.names_in(tensor)
            if name in adam.shapes and name not in loaded and name not in entries
        }
        coded = {name for name, entry in entries.items() if all(key in entry for key in _CODES)}
        narrow = [name for name in adam.shapes if name in wide or (name in entries and name not in coded)]
        self._agree(loaded, entries, wide, coded)
        for tensor in flats:
            del states[tensor]
        adopted = {name: adam.new_state(name) for name in adam.shapes if adam.keeps(name)}
        values: dict[str, list[Tensor]] = {}
        for name, own in loaded.items():
            _fill(adopted[name], {key: own[key] for key in adopted[name]})
        for name, entry in entries.items():
            adopted[name]["step"] = count_of(entry["step"])
            if name in coded:
                _fill(adopted[name], {key: held_part(layout, name, entry[key]) for key in _CODES})
                _fill_scales(adam, name, adopted[name], {key: entry[key] for key in _SCALES}, 0)
                continue
            numbers = [held_part(layout, name, entry[key]) for key in MOMENTS]
            if adam.runs[name].numel:
                values[name] = numbers
        for name, (tensor, state) in wide.items():
            if name in adopted:
                adopted[name]["step"] = count_of(state["step"])
            if adam.runs[name].numel:
                _, offset = adam.layout.place(name)
                flat = [state[key].to(tensor.device).reshape(-1) for key in MOMENTS]
                values[name] = [moment[offset : offset + adam.runs[name].numel] for moment in flat]
        adam.encode(adopted, values, narrow)
        states[EIGHT_BIT_KEY] = adopted

    def _agree(
        self,
        loaded: Mapping[str, State],
        entries: Mapping[str, Mapping[str, Any]],
        wide: Mapping[str, tuple[Tensor, Any]],
        coded: set[str],
    ) -> None:
        adam = self.adam
        faults = [_state_fault(adam, name, state) for name, state in loaded.items()]
        faults += [_entry_fault(adam, name, entry) for name, entry in entries.items()]
        for tensor, state in {id(tensor): (tensor, state) for tensor, state in wide.values()}.values():
            faults.append(moments_fault(tensor_name(adam.layout.names_in(tensor)), tensor, state, MOMENTS))
        found = [fault for fault in faults if fault]
        alike = dict.fromkeys(wide, "moments as numbers")
        for name, entry in entries.items() if not found else ():
            keys = (*_CODES, *_SCALES) if name in coded else MOMENTS
            steps = f", {count_of(entry['step'])} steps" if adam.layout.replicated else ""
            alike[name] = f"{keys[0]}{'' if wholes(entry, keys) == {True} else ', sharded'}{steps}"
        refuse_together(adam.comm, found, alike)

    def load(self, states: MutableMapping[Any, Any], source: Source) -> None:
        """States of this rank from a checkpoint of any layout; what it has nothing of starts anew. Collective."""
        adam = self.adam
        made = states[EIGHT_BIT_KEY] = {name: adam.new_state(name) for name in adam.shapes if adam.keeps(name)}
        values: dict[str, list[Tensor]] = {}
        narrow = []
        for name, shape in adam.shapes.items():
            steps = source.counter(name)
            if steps is None:
                continue
            coded = source.moment_dtype(name) == torch.uint8
            if not coded:
                narrow.append(name)
            if name in made:
                made[name]["step"] = int(steps)
            if not adam.runs[name].numel:
                continue
            piece = adam.layout.pieces[name]
            if coded:
                _fill(made[name], {key: read_piece(source, name, key, piece, shape) for key in _CODES})
                _, blocks = adam.runs[name].used()
                first, stop = int(blocks[0]), int(blocks[-1]) + 1
                scales = {key: read_piece(source, name, key, Piece(first, stop), shape) for key in _SCALES}
                _fill_scales(adam, name, made[name], scales, first)
            else:
                device = adam.layout.weight(name).device
                values[name] = [read_piece(source, name, key, piece, shape).to(device) for key in MOMENTS]
        adam.encode(made, values, narrow)


def _whole_scales(adam: AdamW8bit, name: str, scales: Sequence[Tensor]) -> list[Tensor]:
    if len(adam.comm.ranks.shard_group) == 1 or adam.layout.replicated:
        return list(scales)
    slots, blocks = adam.runs[name].used()
    device = adam.comm.ranks.device
    whole = torch.zeros(len(scales), count(torch.Size(adam.shapes[name]).numel()), dtype=torch.int32, device=device)
    for row, kept in zip(whole, scales):
        row[blocks.to(device)] = kept[slots.to(kept.device)].view(torch.int32).to(device)
    found = adam.comm.maximum(whole, "checkpoint").wait().view(torch.float32)
    return [row.to(kept.device) for row, kept in zip(found, scales)]


def _state_fault(adam: AdamW8bit, name: str, state: State) -> str | None:
    if name not in adam.shapes or not adam.keeps(name):
        return f"it has {name!r}, of which this rank has nothing that is not projected"
    if not isinstance(state, Mapping):
        return f"the state of {name} {adam.shapes[name]} is of type {type(state).__name__}, not a mapping"
    expected = adam.new_state(name)
    for key, fresh in expected.items():
        if key not in state:
            return f"{name} {adam.shapes[name]} has no {key}"
        if isinstance(fresh, Tensor):
            if fault := _tensor_fault(f"{key} of {name} {adam.shapes[name]}", state[key], fresh.shape, fresh.dtype):
                return fault
        elif count_of(state[key]) is None:
            return f"{key} of {name} {adam.shapes[name]} is {state[key]!r}, not a whole number >= 0"
    if state["start"] != expected["start"]:
        return f"of {name} {adam.shapes[name]} it has what begins at {state['start']}, not at {expected['start']}"
    return None


def _entry_fault(adam: AdamW8bit, name: str, entry: Mapping[str, Any]) -> str | None:
    shape = adam.shapes.get(name)
    if shape is None:
        return f"it has {name!r}, which is no parameter here that is not projected"
    expected = {key: (torch.Size(shape), torch.uint8) for key in _CODES}
    expected.update({key: (torch.Size([count(torch.Size(shape).numel())]), torch.float32) for key in _SCALES})
    if not any(key in entry for key in expected):
        return moments_fault(name, adam.layout.place(name)[0], entry, MOMENTS)
    for key in ("step", *expected):
        if key not in entry:
            return f"{name} {shape} has no {key}"
    if count_of(entry["step"]) is None:
        return f"step of {name} {shape} is {entry['step']!r}, not a whole number >= 0"
    faults = (_tensor_fault(f"{key} of {name} {shape}", entry[key], *wanted) for key, wanted in expected.items())
    return next((fault for fault in faults if fault), None)


def _tensor_fault(what: str, found: Any, shape: torch.Size, dtype: torch.dtype) -> str | None:
    if isinstance(found, Tensor) and (found.shape, found.dtype) == (shape, dtype):
        return None
    is_like = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else repr(found)
    return f"{what} is {is_like}, not {tuple(shape)} {dtype}"


def _fill(state: State, found: Mapping[str, Any]) -> None:
    for key, value in found.items():
        if isinstance(state[key], Tensor):
            state[key].copy_(value)
        else:
            state[key] = int(value)


def _fill_scales(adam: AdamW8bit, name: str, state: State, scales: Mapping[str, Tensor], first: int) -> None:
    """From the scales of consecutive blocks, ``first`` the number of the first."""
    slots, blocks = adam.runs[name].used()
    for key, found in scales.items():
        target = state[key]
        target[slots.to(target.device)] = found[(blocks - first).to(found.device)].to(target.device)
