"""One step of projected matrices: rows in, refresh, direction, lift, updates out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending, done
from ds_lowrank.engine.bases import Bases
from ds_lowrank.engine.refresh import HISTORY, MatrixState, Refresher, tensor_of
from ds_lowrank.engine.rows import Blocks, RowExchange
from ds_lowrank.kernels.moments import kept_direction_
from ds_lowrank.layouts.base import Layout
from ds_lowrank.methods import Method, saved_layout
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan, Share
from ds_lowrank.states.rounding import Place, rounding_key
from ds_lowrank.subspace.project import drop_rounding_, lift_, project, round_
from ds_lowrank.subspace.schedule import is_due
from ds_lowrank.subspace.sides import Side, as_rows

# Hyper-parameters of the parameter groups that step now, by the group's index.
Groups = Mapping[int, Mapping[str, Any]]

# Numbers that travel together: enough to hide latencies, little beside a model that needs sharding.
BATCH_NUMBERS = 1 << 24

# Numbers in a matrix's state that say where its tensors belong.
_ORIGIN = ("left", "row", "basis_row")


class LowRankStep:
    """Steps projected matrices.

    Args:
        layout: where weights and gradients lie.
        comm: the collectives.
        refresher: gives new bases.
        method: what is computed, and how states are kept.
        rounding_seed: of stochastic rounding of bf16 weights; ``None``: they are rounded to nearest.
    """

    def __init__(
        self, layout: Layout, comm: Comm, refresher: Refresher, method: Method, rounding_seed: int | None = None
    ):
        self._rounding_seed = rounding_seed
        self._layout = layout
        self._method = method
        self._formats = method.formats
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._rows = RowExchange(comm)
        self._bases = Bases(comm, method.formats.basis)
        self._refresher = refresher
        self._missing: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # what is being stepped; copies where the layout has no view
        # Sums of projected gradients, see accumulate(); None where this rank computes no row.
        self._projected: dict[str, Tensor | None] = {}

    def new_state(self, plan: MatrixPlan) -> MatrixState | None:
        """State of one matrix on this rank, ``None`` where this rank has no part in it.

        Keys: ``step`` (steps made; 0 until the first non-zero gradient), ``refreshes``; where rows are computed also
        ``exp_avg``, ``exp_avg_sq`` (rows × r), ``basis`` (kept rows × r) under the keys and in the dtypes of their
        formats, on the device of the weights, ``indices`` (r, int32), and where these lie in the whole: ``left`` (1
        where A = Wᵀ), ``row`` (the first of A), ``basis_row`` (the first of the basis). Of a shared matrix every rank
        keeps the first two. The owner keeps ``overlaps`` (float32, the last ``HISTORY`` overlaps with the basis before,
        newest last, -1: none).
        """
        share = plan.shares[self._rank]
        if share is None and not plan.shared:
            return None
        state: MatrixState = {"step": 0, "refreshes": 0}
        if share is not None:
            home = self._home(plan)
            for key, rows in self._method.states.tensors(plan.r, plan.dtype).items():
                count = plan.kept(self._rank) if rows.axis == "basis" else share.rows
                state[key] = torch.full((count, rows.width), rows.fill, dtype=rows.dtype, device=home)
            state["indices"] = torch.full((plan.r,), -1, dtype=torch.int32)
            kept = plan.slices[self._rank] if plan.basis_sharded else None
            state.update(left=int(plan.side == "left"), row=share.start, basis_row=0 if kept is None else kept[0])
        if plan.owner == self._rank:
            state["overlaps"] = torch.full((HISTORY,), -1.0)
        return state

    def fit_state(self, plan: MatrixPlan, state: MatrixState) -> str | None:
        """Bring a loaded state of one matrix to the weights' device; returns what does not fit, if anything."""
        expected = self.new_state(plan) or {}
        saved = saved_layout({key: value.dtype for key, value in state.items() if isinstance(value, Tensor)})
        if saved is not None and (fault := self._method.states.fault(saved)):
            return f"{plan.name} {plan.shape} {fault}"
        for key in _ORIGIN:
            if key in state and key in expected and (isinstance(state[key], Tensor) or state[key] != expected[key]):
                return (
                    f"{plan.name} {plan.shape} holds {key} {state[key]} where this rank needs {expected[key]}: it is "
                    "another rank's state, or another side was projected"
                )
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

    def run(self, plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState], groups: Groups) -> None:
        """Step matrices. Collective when one of them is shared.

        Args:
            plans: all projected matrices that step in this call, in the model's order.
            states: name -> state, see :meth:`new_state`.
            groups: their hyper-parameters: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``scale``.
        """
        self._weights.clear()  # of a step that failed
        # On one process and under DDP, which gives all ranks the same gradients, a missing one means no step, as in
        # torch's optimizers. Where a model is sharded it counts as zero, as DeepSpeed delivers it: ranks may differ in
        # what has one, and the collectives must not.
        plans = [
            p for p in plans if (p.shared and not p.replicated) or p.name in self._projected or self._has_gradient(p)
        ]
        due = [p for p in plans if p.name in states and self.is_due(p, states)]
        waiting = {p.name for p in due}
        for wave in waves_of(due):
            self.refresh_and_step(wave, states, groups)
        rest = [p for p in plans if p.name in states and p.name not in waiting]
        # What is shared is the same on all ranks; what is not differs, and so comes apart from it.
        parts: dict[tuple[bool, bool], list[MatrixPlan]] = {}
        for plan in rest:
            parts.setdefault((plan.shared, plan.name in self._projected), []).append(plan)
        for key in sorted(parts, reverse=True):
            self._step_in_batches(parts[key], states, groups)
        self._missing.clear()

    def accumulate(self, plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState]) -> None:
        """Project the gradients of a micro-step and add them to what the next step uses instead of a gradient.

        Collective when one of ``plans`` is shared. A projection is linear: the sum of projections is the projection of
        the sum, as long as the basis stays.

        Args:
            plans: matrices of one parameter that are not due for a refresh.
            states: see :meth:`run`.
        """
        plans = [p for p in plans if p.name in states]
        rows = self._rows.collect(plans, self._gradient).wait()
        for plan, basis in zip(plans, self._bases.stream(plans, states)):
            product = None if basis is None else self._project(plan, states[plan.name], rows[plan.name], basis)
            before = self._projected.get(plan.name)
            self._projected[plan.name] = product if before is None or product is None else before.add_(product)

    @property
    def accumulating(self) -> bool:
        """Whether there are accumulated projections."""
        return bool(self._projected)

    def forget(self) -> None:
        """Drop accumulated projections."""
        self._projected.clear()

    def is_due(self, plan: MatrixPlan, states: Mapping[str, MatrixState]) -> bool:
        """Whether a matrix refreshes its subspace before its next step."""
        return is_due(int(states[plan.name]["step"]), plan.phase, plan.gap)

    def refresh_and_step(self, plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState], groups: Groups) -> None:
        """Refresh a wave of matrices that are due, and step them. Collective when one of them is shared.

        Args:
            plans: see :meth:`run`; the shared ones are the same on all ranks.
            states, groups: see :meth:`run`.
        """
        for dtype in sorted({p.dtype for p in plans}, key=str):  # the same order on all ranks
            wave = [p for p in plans if p.dtype == dtype]
            rows = self._rows.collect(wave, self._gradient).wait()
            self._refresher.run(wave, rows, states)
            # A matrix whose gradient has always been zero has no basis: no step.
            based = [p for p in wave if states[p.name]["refreshes"]]
            stream = self._bases.stream(_shared_first(based), states)
            self._step_batch(_shared_first(based), rows, stream, states, groups).wait()
        self._store()

    def _step_in_batches(self, plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState], groups: Groups) -> None:
        """Step matrices that have a basis; while one batch is computed, the rows of the next are on their way."""
        plans = [p for p in plans if states[p.name]["refreshes"]]
        batches = list(batches_of(plans))
        collected = [p for p in plans if p.name not in self._projected]
        bases = self._bases.stream([p for batch in batches for p in batch], states)
        coming = self._rows.collect(batches[0], self._gradient) if collected else done({})
        leaving: Pending[None] = done(None)
        for i, batch in enumerate(batches):
            rows = coming.wait()
            if collected and i + 1 < len(batches):
                coming = self._rows.collect(batches[i + 1], self._gradient)
            left = leaving
            leaving = self._step_batch(batch, rows, bases, states, groups)
            left.wait()
        leaving.wait()
        self._store()

    def _step_batch(
        self,
        plans: Sequence[MatrixPlan],
        rows: Blocks,
        bases: Iterator[Tensor | None],
        states: Mapping[str, MatrixState],
        groups: Groups,
    ) -> Pending[None]:
        updates: dict[str, Tensor] = {}
        for plan, basis in zip(plans, bases):
            state = states[plan.name]
            state["step"] = int(state["step"]) + 1
            gradient = self._projected.pop(plan.name, None)
            if basis is not None:
                if gradient is None:
                    gradient = self._project(plan, state, rows.pop(plan.name), basis)
                self._step_matrix(plan, state, gradient, basis, groups[plan.group], updates)
        return self._rows.deliver(
            plans,
            lambda plan: updates[plan.name],
            self._weight,
            lambda plan, weights, update, box: _apply(
                weights,
                update,
                plan.dtype,
                _keep(groups[plan.group]),
                self._place(plan, states[plan.name], box, "right"),
            ),
        )

    def _step_matrix(
        self,
        plan: MatrixPlan,
        state: MatrixState,
        gradient: Tensor,
        basis: Tensor,
        group: Mapping[str, Any],
        updates: dict[str, Tensor],
    ) -> None:
        """Step the rows of A that this rank computes: a view of them in place, buffered ones into ``updates``.

        ``gradient`` is R, rows × r; overwritten.
        """
        share, part = plan.shares[self._rank], plan.parts[self._rank]
        assert share is not None
        direction = self._direction(state, gradient, group)
        step_size = float(group["lr"]) * group["scale"]
        whole_rows = share.rows - _buffered_rows(plan, share)
        if share.view is not None:
            assert part is not None
            weights = as_rows(part.view(self._weight(plan), share.view), plan.side)
            place = self._place(plan, state, share.view, plan.side)
            self._lift_view(weights, direction[:whole_rows], basis, step_size, _keep(group), place)
        if share.buffer is not None:
            update = torch.empty(share.buffer.shape, dtype=plan.dtype, device=self._device)
            lift_(as_rows(update, plan.side), direction[whole_rows:], basis, step_size, keep=0.0)
            updates[plan.name] = update

    def _project(self, plan: MatrixPlan, state: MatrixState, blocks: Sequence[Tensor], basis: Tensor) -> Tensor:
        """R from the blocks of the gradient's rows."""
        indices = tensor_of(state, "indices")
        filled_up = int(indices[0]) >= 0 > int(indices[-1])  # a basis of a gradient that had too few directions
        products = []
        for block in blocks:
            block = block.to(self._device)
            products.append(project(block, basis))
            if filled_up:
                drop_rounding_(products[-1], block, indices < 0, plan.gradient_dtype)
        return products[0] if len(products) == 1 else torch.cat(products)

    def _direction(self, state: MatrixState, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """N, computed where the moments lie."""
        home = state[self._formats.exp_avg.keys("exp_avg")[0]]
        assert isinstance(home, Tensor)
        gradient = gradient.to(home.device)
        direction = kept_direction_(self._formats, state, gradient, int(state["step"]), group["betas"], group["eps"])
        return direction.to(self._device)

    def _place(self, plan: MatrixPlan, state: MatrixState, box: Box, side: Side) -> Place | None:
        """Where the rows that ``side`` makes of a box are in W, for stochastic rounding."""
        if self._rounding_seed is None or plan.weight_dtype != torch.bfloat16:
            return None
        n = plan.shape[1]
        key = rounding_key(self._rounding_seed, plan.name, int(state["step"]))
        return Place(key, box.top * n + box.left, (n, 1) if side == "right" else (1, n))

    def _lift_view(
        self, a: Tensor, direction: Tensor, basis: Tensor, step_size: float, keep: float, place: Place | None
    ) -> None:
        if a.device == basis.device:
            lift_(a, direction, basis, step_size, keep, place)
        else:  # offloaded weights visit the device one matrix at a time
            visiting = a.to(basis.device)
            lift_(visiting, direction, basis, step_size, keep, place)
            a.copy_(visiting)

    def _has_gradient(self, plan: MatrixPlan) -> bool:
        return plan.parts[self._rank] is not None and self._layout.grad(plan.parameter) is not None

    def _gradient(self, plan: MatrixPlan) -> Tensor:
        grad = self._layout.grad(plan.parameter)
        if grad is not None:
            return grad
        if plan.parameter not in self._missing:
            self._missing[plan.parameter] = torch.zeros_like(self._layout.weight(plan.parameter))
        return self._missing[plan.parameter]

    def _weight(self, plan: MatrixPlan) -> Tensor:
        # Where it is a copy, all of a parameter's matrices are written into the same one.
        if plan.parameter not in self._weights:
            self._weights[plan.parameter] = self._layout.weight(plan.parameter)
        return self._weights[plan.parameter]

    def _store(self) -> None:
        for name, weights in self._weights.items():
            self._layout.store(name, weights)
        self._weights.clear()

    def _home(self, plan: MatrixPlan) -> torch.device:
        """Where states lie: with the weights, which may be offloaded."""
        held = plan.parameter in self._layout.pieces
        return self._layout.weight(plan.parameter).device if held else self._device


def waves_of(plans: Sequence[MatrixPlan]) -> list[list[MatrixPlan]]:
    """Due matrices in portions that are refreshed side by side: at a first step everything is due."""
    portions: dict[tuple[int, int], list[MatrixPlan]] = {}
    for plan in plans:
        portions.setdefault((plan.wave, plan.gap), []).append(plan)
    return [portions[key] for key in sorted(portions)]


def batches_of(plans: Sequence[MatrixPlan]) -> Iterator[list[MatrixPlan]]:
    """Consecutive matrices of one dtype whose rows travel together."""
    batch: list[MatrixPlan] = []
    numbers = 0
    for plan in plans:
        travelling = plan.shape[0] * plan.shape[1] // (1 if plan.replicated else plan.copy.count(plan.copy[0]))
        cost = travelling if plan.moves or plan.replicated else 0
        if batch and (numbers + cost > BATCH_NUMBERS or plan.dtype != batch[0].dtype):
            yield batch
            batch, numbers = [], 0
        batch.append(plan)
        numbers += cost
    if batch:
        yield batch


def _shared_first(plans: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """What is shared is the same on all ranks only if it does not alternate with what is not."""
    return [p for p in plans if p.shared] + [p for p in plans if not p.shared]


def _keep(group: Mapping[str, Any]) -> float:
    return 1.0 - float(group["lr"]) * group["weight_decay"]


def _apply(weights: Tensor, update: Tensor, dtype: torch.dtype, keep: float, place: Place | None) -> None:
    """W ← keep · W + update, rounded once, as ``lift_`` does where rows lie."""
    if weights.dtype == dtype:
        weights.mul_(keep).add_(update.to(weights.device)) if keep != 1.0 else weights.add_(update.to(weights.device))
    else:
        round_(weights, weights.to(dtype).mul_(keep).add_(update.to(weights.device)), place)


def _buffered_rows(plan: MatrixPlan, share: Share) -> int:
    if share.buffer is None:
        return 0
    height, width = share.buffer.shape
    return height if plan.side == "right" else width
