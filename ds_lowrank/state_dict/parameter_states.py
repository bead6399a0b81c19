"""Low-rank states as frameworks save them: by parameter, as whole tensors or as DTensors of them.

A rank keeps the rows that it computes, which need not be cut as ``torch.chunk`` cuts, and what cannot be described by a
DTensor ends up in the wrong rank's moments without a word. States are therefore brought into equal chunks for saving,
or whole onto the ranks that save, and back to where they are computed after a load. Most often nothing moves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.engine.state import HISTORY, MatrixState, tensor_of
from ds_lowrank.layouts import ParameterLayout, local_tensors
from ds_lowrank.methods import state_fault
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.state_dict.adopt import counters_fault, wholes
from ds_lowrank.states.formats import RowTensor
from ds_lowrank.states.layout import Axis, StateLayout
from ds_lowrank.states.packing import pack

CONSOLIDATE = (
    "under DDP every rank keeps a part of the states: call optimizer.consolidate_state_dict() on all ranks, "
    "then state_dict() on rank 0 (consolidate_state_dict(None): on every rank)"
)
NUMBERS = ("step", "refreshes", "left", "indices", "overlaps")

# For each rank the rows [start, stop) that it has.
Spans = list[tuple[int, int] | None]


class ParameterStates:
    """Turns the states of matrices into entries of a ``state_dict``, by parameter, and back.

    An entry has every slot that is kept, whole, under the keys of its format (as the rows of A: long × width, of the
    basis: short × width, or 1 × width where there is one a matrix), and
    ``indices`` (r, int32), ``overlaps`` (``HISTORY``, float32), ``step``, ``refreshes`` and ``left`` (int64 numbers as
    tensors). Those of stacked matrices have one more dimension in front.

    Args:
        layout: how the parameters lie.
        comm: the collectives.
        plans: of all projected matrices.
        new_state: see :class:`ds_lowrank.engine.state.NewStates`.
        kept: what a state keeps, and how.
    """

    def __init__(
        self,
        layout: ParameterLayout,
        comm: Comm,
        plans: Sequence[MatrixPlan],
        new_state: Callable[[MatrixPlan], MatrixState | None],
        kept: StateLayout,
    ):
        self._layout = layout
        self._comm = comm
        self._rank = comm.ranks.rank
        self._new_state = new_state
        self._kept_as = kept
        self._plans: dict[str, list[MatrixPlan]] = {}
        for plan in plans:
            self._plans.setdefault(plan.parameter, []).append(plan)

    def collect(
        self, states: Mapping[str, MatrixState], takers: Sequence[int] | None = None
    ) -> dict[str, dict[str, Tensor]]:
        """Entries by parameter. Collective.

        Args:
            states: name of a matrix -> what this rank keeps of it.
            takers: ranks that get every tensor whole, on the CPU; the others get nothing. ``None``: every rank gets
                its chunk, as DTensors where the layout has them.
        """
        mine = {p.name: self._numbers(p, states) for plans in self._plans.values() for p in plans if self._owns(p)}
        known: dict[str, list[Any]] = {}
        for table in self._comm.gather_objects(mine, "checkpoint"):
            known.update(table)
        found = {}
        for parameter, plans in self._plans.items():
            entry = self._entry(parameter, plans, states, known, takers)
            if takers is None or self._rank in takers:
                found[parameter] = entry
        return found

    def adopt(self, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, MatrixState]:
        """States of this rank from entries by parameter. Collective.

        Args:
            entries: as :meth:`collect` makes them; tensors that are whole on every rank will do under every layout.

        Raises:
            ValueError: on all ranks, when an entry does not fit its parameter.
        """
        faults = [fault for name, entry in entries.items() if (fault := self._fault(name, entry))]
        # What is sharded is brought into place together, so all ranks must have it so.
        mine = {} if faults else {n: wholes(entry, self._tensors(self._plans[n][0])) for n, entry in entries.items()}
        answers = self._comm.gather_objects((faults[:1], mine), "checkpoint")
        for rank, (faults, theirs) in enumerate(answers):
            if not faults and not answers[0][0] and theirs != answers[0][1]:
                name = min(n for n in {**theirs, **answers[0][1]} if theirs.get(n) != answers[0][1].get(n))
                faults = [f"of {name} it has {_kind(theirs.get(name))}, and rank 0 {_kind(answers[0][1].get(name))}"]
            if faults:
                raise ValueError(f"the loaded optimizer state does not fit this run (rank {rank}): {faults[0]}")
        states: dict[str, MatrixState] = {}
        for parameter in self._plans:
            if parameter in entries:
                states.update(self._states(self._plans[parameter], entries[parameter]))
        return states

    # -- saving ---------------------------------------------------------------------------------------------------

    def _owns(self, plan: MatrixPlan) -> bool:
        return plan.owner == self._rank

    def _numbers(self, plan: MatrixPlan, states: Mapping[str, MatrixState]) -> list[Any]:
        state = states[plan.name]
        indices, overlaps = tensor_of(state, "indices").tolist(), tensor_of(state, "overlaps").tolist()
        return [state["step"], state["refreshes"], int(plan.side == "left"), indices, overlaps]

    def _entry(
        self,
        parameter: str,
        plans: Sequence[MatrixPlan],
        states: Mapping[str, MatrixState],
        known: Mapping[str, list[Any]],
        takers: Sequence[int] | None,
    ) -> dict[str, Tensor]:
        stacked = plans[0].index is not None
        apart = takers is None and stacked and self._layout.shard_dim(parameter) == 0
        device = self._home(plans[0], states) if takers is None else torch.device("cpu")
        # Experts that are dealt out whole are one chunk of the stack on each rank.
        local = [p for p in plans if p.shares[self._rank] is not None] if apart else plans
        tensors = self._tensors(plans[0])
        rows: dict[str, list[Tensor]] = {key: [] for key in tensors}
        for plan in local:
            held = self._held(plan, states.get(plan.name, {}))
            if not apart:
                held = self._move(plan, held, self._kept(plan), self._wanted(plan, takers))
            for key in tensors:
                rows[key].append(held[key].to(device))
        entry: dict[str, Tensor] = {}
        for key, kept in tensors.items():
            whole = (len(plans),) * stacked + (self._length(plans[0], key), kept.width)
            if apart and not local:
                part = torch.zeros(0, *whole[1:], dtype=kept.dtype, device=device)
            else:
                part = torch.stack(rows[key]) if stacked else rows[key][0]
            if takers is None:
                if self._layout.shard_dim(parameter) is not None and part.storage_offset():
                    part = part.clone()  # a DTensor of such a view cannot be deep-copied
                part = self._layout.distribute(part, whole, int(stacked and not apart))
            entry[key] = part
        for place, key in enumerate(NUMBERS):
            dtype = {"indices": torch.int32, "overlaps": torch.float32}.get(key, torch.int64)
            values = [known[p.name][place] for p in plans]
            entry[key] = torch.tensor(values if stacked else values[0], dtype=dtype, device=device)
        return entry

    def _home(self, plan: MatrixPlan, states: Mapping[str, MatrixState]) -> torch.device:
        for key in self._tensors(plan):
            found = states.get(plan.name, {}).get(key)
            if isinstance(found, Tensor):
                return found.device
        return self._layout.place(plan.parameter)[0].device

    def _held(self, plan: MatrixPlan, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """What this rank contributes: its rows, of a basis that it keeps whole its slice of rows only, and what there
        is one of a matrix if it is the first rank that has it.
        """
        tensors = self._tensors(plan)
        if "row" not in state:
            return {key: torch.zeros(0, kept.width, dtype=kept.dtype) for key, kept in tensors.items()}
        held = {key: state[key] for key in tensors}
        mine = plan.slices[self._rank]
        if not plan.basis_sharded and mine is not None:
            held.update({key: held[key][slice(*mine)] for key in self._keys(plan, "basis")})
        if self._givers(plan)[self._rank] is None:
            held.update({key: held[key][:0] for key in self._keys(plan, "matrix")})
        return held

    def _tensors(self, plan: MatrixPlan) -> dict[str, RowTensor]:
        return self._kept_as.tensors(plan.r, plan.dtype)

    def _keys(self, plan: MatrixPlan, axis: Axis) -> list[str]:
        return [key for key, tensor in self._tensors(plan).items() if tensor.axis == axis]

    def _length(self, plan: MatrixPlan, key: str) -> int:
        return self._kept_as.length(key, plan.r, plan.dtype, plan.long, plan.short)

    def _givers(self, plan: MatrixPlan) -> Spans:
        """Of what there is one a matrix: in each copy of the model the first rank that computes rows of it."""
        seen: set[int] = set()
        found: Spans = [None] * len(plan.copy)
        for rank in plan.computing:
            if plan.copy[rank] not in seen:
                seen.add(plan.copy[rank])
                found[rank] = (0, 1)
        return found

    def _kept(self, plan: MatrixPlan) -> dict[str, Spans]:
        rows: Spans = [None if share is None else (share.start, share.stop) for share in plan.shares]
        spans = {"rows": rows, "basis": list(plan.slices), "matrix": self._givers(plan)}
        return {key: spans[kept.axis] for key, kept in self._tensors(plan).items()}

    def _wanted(self, plan: MatrixPlan, takers: Sequence[int] | None) -> dict[str, Spans]:
        lengths = {key: self._length(plan, key) for key in self._tensors(plan)}
        if takers is None:
            return {key: self._chunks(n) for key, n in lengths.items()}
        return {key: [(0, n) if k in takers else None for k in range(len(plan.copy))] for key, n in lengths.items()}

    def _chunks(self, length: int) -> Spans:
        """As ``torch.chunk`` cuts, within each copy of the model; whole where the layout cuts nothing."""
        copy = self._comm.ranks.copy
        if self._layout.replicated or len(copy) == 1:
            return [(0, length)] * len(copy)
        chunk = -(-length // copy.count(copy[0]))
        places = [copy[:k].count(copy[k]) for k in range(len(copy))]
        return [(min(p * chunk, length), min((p + 1) * chunk, length)) for p in places]

    def _move(
        self, plan: MatrixPlan, held: Mapping[str, Tensor], have: Mapping[str, Spans], want: Mapping[str, Spans]
    ) -> dict[str, Tensor]:
        """Rows of one matrix from where they are to where they are wanted, within each copy of the model."""
        if all(_same(have[key], want[key]) for key in have):
            return dict(held)
        tensors = self._tensors(plan)
        everyone, copy, rank = range(len(plan.copy)), plan.copy, self._rank

        def common(source: int, target: int, key: str) -> tuple[int, int]:
            a, b = have[key][source], want[key][target]
            if a is None or b is None or copy[source] != copy[target]:
                return 0, 0
            return max(a[0], b[0]), max(min(a[1], b[1]), max(a[0], b[0]))

        send = []
        for target in everyone:
            parts = []
            for key in tensors:
                start, stop = common(rank, target, key)
                if start < stop:
                    first = have[key][rank][0]  # type: ignore[index]
                    parts.append(pack([held[key][start - first : stop - first]]))
            send.append(parts)
        spans = [[(key, *common(source, rank, key)) for key in tensors] for source in everyone]
        sizes = [[(stop - start) * tensors[key].bytes for key, start, stop in found] for found in spans]
        arrived = self._comm.exchange(send, [sum(s) for s in sizes], torch.uint8, "checkpoint").wait()
        moved: dict[str, Tensor] = {}
        for key, kept in tensors.items():
            span = want[key][rank] or (0, 0)
            moved[key] = torch.zeros(span[1] - span[0], kept.bytes, dtype=torch.uint8, device=self._comm.ranks.device)
        for found, size, values in zip(spans, sizes, arrived):
            for (key, start, stop), part in zip(found, values.split(size)):
                if start < stop:
                    first = want[key][rank][0]  # type: ignore[index]
                    moved[key][start - first : stop - first] = part.view(stop - start, tensors[key].bytes)
        return {key: raw.view(tensors[key].dtype) for key, raw in moved.items()}

    # -- loading --------------------------------------------------------------------------------------------------

    def _fault(self, parameter: str, entry: Mapping[str, Any]) -> str | None:
        if parameter not in self._plans:
            return f"it has {parameter!r}, which is no projected parameter here"
        plans = self._plans[parameter]
        first, stacked = plans[0], plans[0].index is not None
        tensors = self._tensors(first)
        if fault := state_fault(self._kept_as, entry):
            return f"{parameter} {first.shape} {fault}"
        missing = [key for key in (*tensors, *NUMBERS) if not isinstance(entry.get(key), Tensor)]
        if missing:
            return f"{parameter} {first.shape} has no {missing[0]}"
        numbers = dict(zip(NUMBERS, local_tensors([entry[key] for key in NUMBERS])))
        for key, value in numbers.items():
            expected = (len(plans),) * stacked + {"indices": (first.r,), "overlaps": (HISTORY,)}.get(key, ())
            if tuple(value.shape) != expected:
                return f"{key} of {parameter} {first.shape} is of shape {tuple(value.shape)}, not {expected}"
        if bool((numbers["left"] != int(first.side == "left")).any()):
            return f"{parameter} {first.shape} was projected on its other side: resume with the same proj_type"
        for plan in plans:
            counters = {key: numbers[key][plan.index] if stacked else numbers[key] for key in ("step", "refreshes")}
            if fault := counters_fault(f"{plan.name} {plan.shape}", counters):
                return fault
        for key, kept in tensors.items():
            expected = (len(plans),) * stacked + (self._length(first, key), kept.width)
            if tuple(entry[key].shape) != expected or entry[key].dtype != kept.dtype:
                return (
                    f"{key} of {parameter} {first.shape} is {tuple(entry[key].shape)} {entry[key].dtype}, "
                    f"not {expected} {kept.dtype}: resume with the same rank, proj_type and precision"
                )
        if len(wholes(entry, tensors)) > 1:
            return f"{parameter} {first.shape} has tensors that are whole on every rank, and others that are sharded"
        return None

    def _states(self, plans: Sequence[MatrixPlan], entry: Mapping[str, Tensor]) -> dict[str, MatrixState]:
        stacked = plans[0].index is not None
        apart = stacked and self._layout.shard_dim(plans[0].parameter) == 0
        here = [p.name for p in plans if p.shares[self._rank] is not None]
        tensors = self._tensors(plans[0])
        rows = {key: self._layout.local(entry[key], int(stacked and not apart)) for key in tensors}
        whole = all(is_whole for _, is_whole in rows.values())
        states: dict[str, MatrixState] = {}
        for plan in plans:
            state = self._new_state(plan)
            place = here.index(plan.name) if apart and not whole and plan.name in here else plan.index
            # Of experts that are dealt out whole this rank has its own; all else is there in part on every rank.
            if plan.name in here or not apart:
                local = {key: tensor[place] if stacked else tensor for key, (tensor, _) in rows.items()}
                if whole:
                    local = {key: _rows(local[key], span[self._rank]) for key, span in self._needed(plan).items()}
                elif not apart:
                    local = self._move(plan, local, self._wanted(plan, None), self._needed(plan))
                for key in tensors:
                    if state is not None and key in state:
                        tensor_of(state, key).copy_(local[key])
            if state is not None:
                for key in NUMBERS:
                    value = entry[key][plan.index] if stacked else entry[key]
                    if key in ("step", "refreshes"):
                        state[key] = int(value)
                    elif key != "left" and key in state:
                        tensor_of(state, key).copy_(value)
                states[plan.name] = state
        return states

    def _needed(self, plan: MatrixPlan) -> dict[str, Spans]:
        """Where rows are used: a basis that is not sharded is needed whole, and what there is one of by all."""
        kept = self._kept(plan)
        if not plan.basis_sharded:
            whole: Spans = [None if rows is None else (0, plan.short) for rows in plan.slices]
            kept.update(dict.fromkeys(self._keys(plan, "basis"), whole))
        one: Spans = [None if share is None else (0, 1) for share in plan.shares]
        kept.update(dict.fromkeys(self._keys(plan, "matrix"), one))
        return kept


def _kind(found: set[bool] | None) -> str:
    return "nothing" if found is None else "whole tensors" if found == {True} else "sharded tensors"


def _same(a: Spans, b: Spans) -> bool:
    return all((x or (0, 0)) == (y or (0, 0)) or (_empty(x) and _empty(y)) for x, y in zip(a, b))


def _empty(span: tuple[int, int] | None) -> bool:
    return span is None or span[0] >= span[1]


def _rows(whole: Tensor, span: tuple[int, int] | None) -> Tensor:
    return whole[0:0] if span is None else whole[slice(*span)]
