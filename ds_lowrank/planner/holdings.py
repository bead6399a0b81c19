"""What every rank has of a projected matrix, one number a rank: a plan computes over all ranks at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.plan.matrices import MatrixPlan


@dataclass(frozen=True)
class Holding:
    """One projected matrix on every rank; int64 tensors of one number a rank, N of them.

    Attributes:
        plan: the matrix.
        computes: 1 where the rank computes rows of A, else 0.
        rows: of A, computed.
        view, buffer: elements of them that lie where they are computed, and that are brought together.
        blocks: boxes that they lie in: 0, 1 or 2.
        part: elements that the rank holds.
        kept: rows of the basis.
        owns: 1 where the rank decomposes it, else 0.
        contributes: 1 where the rank's rows go into the Gram, else 0.
    """

    plan: MatrixPlan
    computes: Tensor
    rows: Tensor
    view: Tensor
    buffer: Tensor
    blocks: Tensor
    part: Tensor
    kept: Tensor
    owns: Tensor
    contributes: Tensor


def holdings(plans: Sequence[MatrixPlan]) -> list[Holding]:
    """The plans' numbers by rank. Matrices that are cut alike share their tensors."""
    known: dict[tuple[Any, ...], dict[str, Tensor]] = {}
    found = []
    for plan in plans:
        # Tuples of one identity are what plan_matrices gives to matrices that are cut alike.
        key = (id(plan.shares), id(plan.parts), plan.basis_sharded, plan.short)
        if key not in known:
            known[key] = _numbers(plan)
        owns = torch.zeros(len(plan.copy), dtype=torch.int64)
        owns[plan.owner] = 1
        contributes = torch.zeros_like(owns)
        contributes[plan.contributors] = 1
        found.append(Holding(plan, owns=owns, contributes=contributes, **known[key]))
    return found


def _numbers(plan: MatrixPlan) -> dict[str, Tensor]:
    shares = plan.shares
    views = [0 if s is None or s.view is None else s.view.numel for s in shares]
    buffers = [0 if s is None or s.buffer is None else s.buffer.numel for s in shares]
    numbers = {
        "computes": [int(s is not None) for s in shares],
        "rows": [0 if s is None else s.rows for s in shares],
        "view": views,
        "buffer": buffers,
        "blocks": [(v > 0) + (b > 0) for v, b in zip(views, buffers)],
        "part": [0 if p is None else p.numel for p in plan.parts],
        "kept": [plan.kept(k) for k in range(len(shares))],
    }
    return {what: torch.tensor(of, dtype=torch.int64) for what, of in numbers.items()}
