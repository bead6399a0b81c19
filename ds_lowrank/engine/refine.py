"""A basis that moves in every step: sums over the rows of A to those who keep rows of the basis.

Every rank that computes has the whole basis for a moment, and adds S = ∇Aᵀ R (short × r) over its rows of A. The rows
of S travel to the ranks that keep these rows of the basis, and Rᵀ R and ‖∇A‖² are summed for all: what a selection
then does is row-local in the basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.state import MatrixState
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.rules import Hyper
from ds_lowrank.selections import Sketch
from ds_lowrank.subspace.project import energy, gram, widened_rows


@dataclass
class Refining:
    """Sketches on their way.

    Attributes:
        plans: of the run.
        bases: name -> B (short × r), where rows are computed.
        sketched: name -> this rank's rows of S.
        sums: Rᵀ R and ‖∇A‖² of every matrix, flat, one behind the other.
    """

    plans: Sequence[MatrixPlan]
    bases: Mapping[str, Tensor | None]
    sketched: Pending[dict[str, Tensor]]
    sums: Pending[Tensor]


class Refiner:
    """Lets a selection step the bases of matrices whose gradients have just been projected.

    Args:
        comm: the collectives.
        method: what is computed, and how states are kept.
    """

    def __init__(self, comm: Comm, method: Method):
        self._comm = comm
        self._method = method
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device

    def start(
        self,
        plans: Sequence[MatrixPlan],
        products: Mapping[str, Tensor],
        rows: Mapping[str, Sequence[Tensor]],
        bases: Mapping[str, Tensor | None],
    ) -> Refining:
        """Send sketches off. Collective when the matrices are shared.

        Args:
            plans: of one run.
            products: name -> R, rows × r, of those of which rows are computed here; read at once.
            rows: name -> blocks of rows of ∇A.
            bases: name -> B.
        """
        first = plans[0]
        size = first.r**2 + 1
        sums = torch.zeros(len(plans) * size, dtype=first.dtype, device=self._device)
        sketches: dict[str, Tensor] = {}
        for plan, part in zip(plans, sums.split(size)):
            if plan.name in products:
                product = products[plan.name]
                sketch = sketches[plan.name] = product.new_zeros(plan.short, plan.r)
                at = 0
                for block in rows[plan.name]:
                    here = block.to(self._device)
                    for some in here.split(widened_rows(plan.short)) if here.dtype != product.dtype else (here,):
                        sketch.addmm_(some.to(product.dtype).mT, product[at : at + len(some)])
                        at += len(some)
                    part[-1] += energy(here, product.dtype)
                part[:-1].view(plan.r, plan.r).copy_(product.mT @ product)
        if not first.shared:
            return Refining(plans, bases, Pending(lambda: sketches), Pending(lambda: sums))
        return Refining(plans, bases, self._distribute(plans, sketches), self._comm.all_reduce(sums, "sketches"))

    def finish(self, refining: Refining, states: Mapping[str, MatrixState], hyper: Hyper) -> None:
        """Step the rows of the bases that are kept here, when their sketches have come."""
        sketched, sums = refining.sketched.wait(), refining.sums.wait()
        selection, layout = self._method.selection, self._method.states
        size = refining.plans[0].r ** 2 + 1
        own = dataclasses.replace(hyper, options=self._method.selection_options)
        for plan, part in zip(refining.plans, sums.split(size)):
            whole, state = refining.bases[plan.name], states[plan.name]
            if whole is None:
                continue
            kept = plan.slices[self._rank] if plan.basis_sharded else (0, plan.short)
            assert kept is not None
            # BᵀB is nearly I: in float32 what it has beside that, which draws the basis back, would be rounding alone.
            squares = gram(whole, torch.float64)
            sketch = Sketch(sketched[plan.name], part[:-1].view(plan.r, plan.r), squares, part[-1])
            opened = {
                slot.name: layout.read(state, slot.name, plan.r, plan.dtype).to(self._device)  # may be offloaded
                for slot in selection.slots
            }
            rows = selection.refine(whole[slice(*kept)].clone(), sketch, opened, own)
            layout.write_(state, "basis", rows)
            for name, value in opened.items():
                layout.write_(state, name, value)

    def _distribute(self, plans: Sequence[MatrixPlan], sketches: Mapping[str, Tensor]) -> Pending[dict[str, Tensor]]:
        """S, added up over the ranks of a copy of the model, in rank order: on each the rows that it keeps."""
        everyone, group = range(self._comm.ranks.size), self._comm.ranks.shard_group

        def span(plan: MatrixPlan, rank: int) -> tuple[int, int]:
            rows = plan.slices[rank]
            return (0, 0) if rows is None else rows if plan.basis_sharded else (0, plan.short)

        send = [
            [sketches[p.name][slice(*span(p, k))] for p in plans if p.name in sketches] if k in group else []
            for k in everyone
        ]
        mine = {p.name: span(p, self._rank) for p in plans}
        coming = [[p for p in plans if k in group and p.shares[k] is not None] for k in everyone]
        sizes = [[(mine[p.name][1] - mine[p.name][0]) * p.r for p in of] for of in coming]
        arriving = self._comm.exchange(send, [sum(s) for s in sizes], plans[0].dtype, "sketches")

        def sums() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for of, size, values in zip(coming, sizes, arriving.wait()):
                for plan, part in zip(of, values.split(size)):
                    square = part.view(-1, plan.r)
                    found[plan.name] = found[plan.name].add_(square) if plan.name in found else square.clone()
            return found

        return Pending(sums)
