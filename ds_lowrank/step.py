"""One step of the projected matrices of one parameter group: rows in, refresh, direction, lift, updates out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm import Comm
from ds_lowrank.layouts.base import Layout
from ds_lowrank.refresh import MatrixState, Refresher
from ds_lowrank.rows import MatrixPlan, Rows, Share, view_of
from ds_lowrank.rules.adamw import adamw_direction_
from ds_lowrank.subspace.project import lift_, project
from ds_lowrank.subspace.sides import as_rows


def work_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and products for weights of ``parameter_dtype``: float64 for float64, else float32."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


class LowRankStep:
    """Steps projected matrices.

    Args:
        layout: where weights and gradients lie.
        comm: the collectives.
        refresher: gives new bases.
    """

    def __init__(self, layout: Layout, comm: Comm, refresher: Refresher):
        self._layout = layout
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._rows = Rows(comm)
        self._refresher = refresher

    def new_state(self, plan: MatrixPlan, dtype: torch.dtype) -> MatrixState | None:
        """State of one matrix on this rank, ``None`` where this rank has no part in it.

        Keys: ``step`` (steps made; 0 until the first non-zero gradient), ``refreshes``; where rows are computed also
        ``exp_avg``, ``exp_avg_sq`` (rows × r), ``basis`` (short × r) in ``dtype`` and ``indices`` (r, int32), on the
        device of the weights. Where a matrix is cut, every rank keeps the two numbers.
        """
        share = plan.shares[self._rank]
        if share is None and not plan.cut:
            return None
        state: MatrixState = {"step": 0, "refreshes": 0}
        if share is not None:
            device = self._layout.weight(plan.name).device
            for key, rows in (("exp_avg", share.rows), ("exp_avg_sq", share.rows), ("basis", plan.short)):
                state[key] = torch.zeros(rows, plan.rank, dtype=dtype, device=device)
            state["indices"] = torch.full((plan.rank,), -1, dtype=torch.int32)
        return state

    def fit_state(self, plan: MatrixPlan, state: MatrixState, dtype: torch.dtype) -> str | None:
        """Bring a loaded state of one matrix to the weights' device; returns what does not fit, if anything."""
        expected = self.new_state(plan, dtype) or {}
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

    def run(
        self,
        plans: Sequence[MatrixPlan],
        states: Mapping[str, MatrixState],
        group: Mapping[str, Any],
        dtype: torch.dtype,
    ) -> None:
        """Step the matrices of one parameter group. Collective when one of them is cut.

        Args:
            plans: all projected matrices of the group, in the model's order.
            states: name -> state, see :meth:`new_state`.
            group: hyper-parameters: ``lr``, ``betas``, ``eps``, ``weight_decay``, ``scale``.
            dtype: of states and products.
        """
        # A missing gradient can only be seen where the matrix is whole: sharding frameworks deliver zeros instead.
        plans = [p for p in plans if p.cut or self._has_gradient(p)]
        blocks = self._rows.collect(plans, self._gradient, dtype)
        self._refresher.run(plans, blocks, states, dtype)
        born = [p for p in plans if p.name in states and states[p.name]["refreshes"]]
        updates: dict[str, Tensor] = {}
        for plan in born:
            state = states[plan.name]
            state["step"] = int(state["step"]) + 1
            self._step_matrix(plan, state, blocks.pop(plan.name, []), group, updates)
        self._rows.deliver(plans, updates, self._layout.weight, dtype)

    def _has_gradient(self, plan: MatrixPlan) -> bool:
        return plan.pieces[self._rank] is not None and self._layout.grad(plan.name) is not None

    def _gradient(self, name: str) -> Tensor:
        grad = self._layout.grad(name)
        if grad is None:
            raise RuntimeError(
                f"{name} has no gradient in this step but the parameter is cut over ranks: the framework has to "
                "deliver a gradient (zeros) for every sharded parameter"
            )
        return grad

    def _step_matrix(
        self,
        plan: MatrixPlan,
        state: MatrixState,
        blocks: Sequence[Tensor],
        group: Mapping[str, Any],
        updates: dict[str, Tensor],
    ) -> None:
        keep = 1.0 - group["lr"] * group["weight_decay"]
        piece = plan.pieces[self._rank]
        if plan.cut and piece is not None and keep != 1.0:
            # The elements of a cut row lie on several ranks: each decays what it holds, then updates are added.
            self._layout.weight(plan.name).mul_(keep)
            keep = 1.0
        share = plan.shares[self._rank]
        if share is None:
            return
        basis = state["basis"]
        assert isinstance(basis, Tensor)
        on_device = basis.to(self._device)
        direction = self._direction(state, blocks, on_device, group).to(self._device)
        step_size = group["lr"] * group["scale"]
        whole_rows = share.rows - _buffered_rows(plan, share)
        if share.view is not None:
            assert piece is not None
            weights = view_of(self._layout.weight(plan.name), piece, share.view, plan.shape[1])
            self._lift_view(as_rows(weights, plan.side), direction[:whole_rows], on_device, step_size, keep)
        if share.buffer is not None:
            update = torch.empty(share.buffer.shape, dtype=basis.dtype, device=self._device)
            lift_(as_rows(update, plan.side), direction[whole_rows:], on_device, step_size, keep=0.0)
            updates[plan.name] = update

    def _direction(
        self, state: MatrixState, blocks: Sequence[Tensor], basis: Tensor, group: Mapping[str, Any]
    ) -> Tensor:
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        assert isinstance(exp_avg, Tensor)
        assert isinstance(exp_avg_sq, Tensor)
        products = [project(block.to(self._device), basis).to(exp_avg.device) for block in blocks]
        gradient = products[0] if len(products) == 1 else torch.cat(products)
        return adamw_direction_(gradient, exp_avg, exp_avg_sq, int(state["step"]), group["betas"], group["eps"])

    def _lift_view(self, a: Tensor, direction: Tensor, basis: Tensor, step_size: float, keep: float) -> None:
        if a.device == basis.device:
            lift_(a, direction, basis, step_size, keep)
        else:  # offloaded weights visit the device one matrix at a time
            visiting = a.to(basis.device)
            lift_(visiting, direction, basis, step_size, keep)
            a.copy_(visiting)


def _buffered_rows(plan: MatrixPlan, share: Share) -> int:
    if share.buffer is None:
        return 0
    height, width = share.buffer.shape
    return height if plan.side == "right" else width
