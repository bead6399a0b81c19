"""Which matrices step together, and where their states lie.

Small matrices cost more in calls and kernel launches than in arithmetic. Rules are row-local, so matrices of one group
and rank are one tall matrix to them: a batch's rows are stepped in one call, on states that lie one below the other in
one tensor a key, of which each matrix's state has its rows. How the model is batched depends on the plans alone, and is
the same on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.engine.state import MatrixState, tensor_of
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.states.formats import RowTensor
from ds_lowrank.states.layout import StateLayout

# Numbers that travel together: enough to hide latencies, little beside a model that needs sharding.
BATCH_NUMBERS = 1 << 24
# Numbers of projected gradients and bases that are stepped at once: enough to hide a call, little beside a large one.
STACK_NUMBERS = 1 << 22


def waves_of(plans: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
    """Due matrices in portions that are refreshed side by side: at a first step everything is due."""
    portions: dict[tuple[int, int], list[MatrixPlan]] = {}
    for plan in plans:
        portions.setdefault((plan.wave, plan.gap), []).append(plan)
    return [portions[key] for key in sorted(portions)]


def batches_of(plans: Iterable[MatrixPlan]) -> list[list[MatrixPlan]]:
    """All matrices in batches of one unit, group, dtype and r: the shared ones first, in the model's order.

    What is shared is the same on all ranks; what is not differs, and so comes apart from it.
    """
    open_: dict[tuple[object, ...], tuple[list[MatrixPlan], list[int]]] = {}
    batches: list[list[MatrixPlan]] = []
    for plan in sorted(plans, key=lambda p: not p.shared):
        travelling = plan.shape[0] * plan.shape[1] // (1 if plan.replicated else plan.copy.count(plan.copy[0]))
        cost = (travelling if plan.moves or plan.replicated else 0, (plan.long + plan.short) * plan.r)
        kind = (plan.shared, plan.unit, plan.group, plan.dtype, plan.weight_dtype, plan.r)
        batch, numbers = open_.get(kind, ([], [0, 0]))
        if not batch or numbers[0] + cost[0] > BATCH_NUMBERS or numbers[1] + cost[1] > STACK_NUMBERS:
            batch, numbers = open_[kind] = ([], [0, 0])
            batches.append(batch)
        batch.append(plan)
        numbers[0] += cost[0]
        numbers[1] += cost[1]
    return batches


class Batches:
    """The batches of a model, and their states on this rank.

    Args:
        plans: of all projected matrices.
        rank: this one.
        kept: what methods keep, and how.
    """

    def __init__(self, plans: Sequence[MatrixPlan], rank: int, kept: StateLayout):
        self._rank = rank
        self._kept = kept
        # name -> (batch, place in it)
        self._at = {p.name: (b, k) for b, batch in enumerate(batches_of(plans)) for k, p in enumerate(batch)}
        self._whole: dict[int, _Stacked] = {}
        # Keys of what is cut as the rows of A, and of what is one a matrix, for matrices of one r and dtype.
        self._keys: dict[tuple[int, torch.dtype], tuple[list[str], dict[str, Tensor]]] = {}

    def forget(self) -> None:
        """Let go of states that others have taken the place of."""
        self._whole.clear()

    def group(self, plans: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
        """Some of the matrices, batch by batch."""
        found: dict[int, list[MatrixPlan]] = {}
        for plan in plans:
            found.setdefault(self._at[plan.name][0], []).append(plan)
        return [found[b] for b in sorted(found)]

    def runs(self, batch: Sequence[MatrixPlan], states: Mapping[str, MatrixState]) -> list[list[MatrixPlan]]:
        """Those of one batch that lie one below the other and have made as many steps: the same on all ranks."""
        runs = [[batch[0]]]
        for before, plan in itertools.pairwise(batch):
            together = self._at[plan.name][1] == self._at[before.name][1] + 1
            if together and states[plan.name]["step"] == states[before.name]["step"]:
                runs[-1].append(plan)
            else:
                runs.append([plan])
        return runs

    def kept(
        self, run: Sequence[MatrixPlan], here: Sequence[MatrixPlan], states: Mapping[str, MatrixState]
    ) -> dict[str, Tensor]:
        """What is kept of a run, key by key: its rows of A on this rank, and for one a matrix, all of its matrices.

        Args:
            run: see :meth:`runs`.
            here: those of which this rank computes rows.
            states: name -> state.

        Returns:
            Tensors that share the states' memory, but for those of one a matrix, of several: see :meth:`put`.
        """
        first = run[0]
        kind = (first.r, first.dtype)
        keys = self._keys.get(kind)
        if keys is None:
            tensors = self._kept.tensors(*kind)
            keys = self._keys[kind] = ([k for k, t in tensors.items() if t.axis == "rows"], self._single(tensors))
        rows, single = keys
        if len(here) == 1:
            state = states[here[0].name]
            found: dict[str, Any] = {key: state[key] for key in rows}
        elif here and rows:
            found = self._rows_of(here, rows, states)
        else:
            tensors = self._kept.tensors(*kind)
            found = {key: torch.zeros(0, tensors[key].width, dtype=tensors[key].dtype) for key in rows}
        for key, none in single.items():
            if len(run) == 1 and key in states[first.name]:
                found[key] = states[first.name][key]
                continue
            of = [states[p.name].get(key, none) for p in run]
            home = next((t.device for t in of if isinstance(t, Tensor) and t is not none), none.device)
            found[key] = torch.cat([t.to(home) for t in of if isinstance(t, Tensor)])
        return found

    @staticmethod
    def _single(tensors: Mapping[str, RowTensor]) -> dict[str, Tensor]:
        """What is one a matrix, as it is before the first step."""
        single = {key: tensor for key, tensor in tensors.items() if tensor.axis == "matrix"}
        return {key: torch.full((1, t.width), t.fill, dtype=t.dtype) for key, t in single.items()}

    def put(self, run: Sequence[MatrixPlan], states: Mapping[str, MatrixState], kept: Mapping[str, Tensor]) -> None:
        """Keep what of a run is one a matrix."""
        for key in self._keys[run[0].r, run[0].dtype][1]:
            for k, plan in enumerate(run):
                if key in states[plan.name] and kept[key] is not states[plan.name][key]:
                    tensor_of(states[plan.name], key).copy_(kept[key][k : k + 1])

    def _rows_of(
        self, here: Sequence[MatrixPlan], keys: Sequence[str], states: Mapping[str, MatrixState]
    ) -> dict[str, Tensor]:
        b = self._at[here[0].name][0]
        whole = self._whole.get(b)
        if whole is None or not whole.holds(here, states):
            members = [name for name, (of, _) in self._at.items() if of == b and keys[0] in states.get(name, {})]
            whole = self._whole[b] = _Stacked(members, keys, states)
        return whole.slice(here)


class _Stacked:
    """States of a batch's matrices, one below the other.

    Args:
        names: of those of which rows are computed here, in the batch's order.
        keys: of tensors that are cut as the rows of A.
        states: whose tensors become views.
    """

    def __init__(self, names: Sequence[str], keys: Sequence[str], states: Mapping[str, MatrixState]):
        self._spans: dict[str, tuple[int, int]] = {}
        self._views: dict[str, list[tuple[str, Tensor]]] = {name: [] for name in names}
        at = 0
        for name in names:
            count = len(tensor_of(states[name], keys[0]))
            self._spans[name] = (at, at + count)
            at += count
        self._whole: dict[str, Tensor] = {}
        for key in keys:
            whole = self._whole[key] = torch.cat([tensor_of(states[name], key) for name in names])
            for name in names:
                view = states[name][key] = whole[slice(*self._spans[name])]
                self._views[name].append((key, view))

    def holds(self, here: Sequence[MatrixPlan], states: Mapping[str, MatrixState]) -> bool:
        """Whether these states are still the views that were made: a load puts others in their place."""
        return all(
            plan.name in self._views and all(states[plan.name][key] is view for key, view in self._views[plan.name])
            for plan in here
        )

    def slice(self, here: Sequence[MatrixPlan]) -> dict[str, Tensor]:
        """The rows of matrices that lie one below the other."""
        start, stop = self._spans[here[0].name][0], self._spans[here[-1].name][1]
        return {key: whole[start:stop] for key, whole in self._whole.items()}
