"""Sums of projected gradients: where they were made, and where their rows are stepped.

Rows of R, and of the averaged gradients of matrices that are due, go to the ranks that compute them by an all-to-all,
and are added up there in the order of the ranks and in the dtype that is computed with: the same bits wherever a sum is
needed twice, and no rounding between two additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.state import number_of
from ds_lowrank.engine.step import States
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.states.rounding import Place, copy_stochastic_, rounding_key


class Sums:
    """Adds projected gradients up.

    Args:
        comm: the collectives.
        wire: parameter -> dtype in which its gradient would travel.
        narrow: whether sums are bf16, rounded stochastically.
        seed: of the rounding.
        plans_of: parameter -> its matrices, in the order in which they travel.
    """

    def __init__(
        self,
        comm: Comm,
        wire: Callable[[str], torch.dtype],
        narrow: bool,
        seed: int,
        plans_of: Mapping[str, Sequence[MatrixPlan]],
    ):
        self._comm, self._wire, self._narrow, self._seed = comm, wire, narrow, seed
        self._rank = comm.ranks.rank
        self._group = comm.ranks.shard_group
        self._place_of = {p.name: k for k, p in enumerate(p for plans in plans_of.values() for p in plans)}
        self._whole: dict[str, Tensor] = {}  # long × r, of this rank's own gradients
        self._rows: dict[str, Tensor] = {}  # rows that this rank computes × r, of all ranks' gradients
        self._leaving: list[Pending[None]] = []
        self._steps: dict[str, int] = {}
        self._pass = 0
        self.factor: Tensor | None = None  # on all of them

    def clear(self) -> None:
        """Begin anew."""
        self.wait()
        self._whole.clear()
        self._rows.clear()
        self.factor = None

    def begin(self, states: States, number: int) -> None:
        """A backward pass begins.

        Args:
            states: of the matrices.
            number: of the pass in its step, from 1.
        """
        if self.factor is not None:
            raise RuntimeError("a backward pass after the gradients were clipped: call step() or zero_grad() before")
        self.wait()
        self._pass = number
        self._steps = {name: number_of(states[name], "step") for name in self._place_of if name in states}

    def add(self, plan: MatrixPlan, product: Tensor) -> None:
        """Add R of this rank's own gradient.

        Args:
            plan: of the matrix.
            product: long × r, in the dtype that is computed with; may be kept.
        """
        if self._comm.ranks.size == 1:
            self.add_rows(plan, product)
        else:
            self._accumulate(self._whole, plan, product, f"{self._rank}")

    def add_rows(self, plan: MatrixPlan, product: Tensor) -> None:
        """Add rows of R that this rank computes, of the averaged gradient: rows × r."""
        self._accumulate(self._rows, plan, product, "rows")

    def _accumulate(self, sums: dict[str, Tensor], plan: MatrixPlan, product: Tensor, what: str) -> None:
        before = sums.get(plan.name)
        if not self._narrow or plan.dtype != torch.float32:
            sums[plan.name] = product if before is None else before.add_(product)
            return
        if before is None:
            before = sums[plan.name] = torch.empty_like(product, dtype=torch.bfloat16)
        else:
            product.add_(before)
        share = plan.shares[self._rank]
        first = share.start * plan.r if what == "rows" and share is not None else 0
        key = rounding_key(self._seed, f"{plan.name}\0{what}\0{self._pass}", self._steps.get(plan.name, 0))
        copy_stochastic_(before, product, Place(key, first, (plan.r, 1)))

    def send(self, plans: Sequence[MatrixPlan]) -> None:
        """Bring R of some matrices to the ranks that compute its rows. Collective; it arrives meanwhile."""
        for pending in self._leaving[:-1]:  # one bucket travels while the next is filled
            pending.wait()
        del self._leaving[:-1]
        for dtype, part in self._by_dtype(plans):
            arriving = self._to_rows(part, self._whole, [p.r for p in part], dtype, "projected gradients")
            for plan in part:
                self._whole.pop(plan.name, None)

            def keep(part: Sequence[MatrixPlan] = part, arriving: Pending[dict[str, Tensor]] = arriving) -> None:
                for plan, rows in zip(part, map(arriving.wait().get, (p.name for p in part))):
                    if rows is not None:
                        self.add_rows(plan, rows)

            self._leaving.append(Pending(keep))

    def average(self, plans: Sequence[MatrixPlan], gradients: Mapping[str, Tensor]) -> dict[str, list[Tensor]]:
        """Averaged gradients, by the rows that this rank computes. Collective.

        Args:
            plans: the same on all ranks.
            gradients: name -> this rank's own, long × short; what is missing counts as zero.

        Returns:
            name -> one block of rows × short; none where this rank computes no row.
        """
        if self._comm.ranks.size == 1:
            return {p.name: [gradients[p.name]] if p.name in gradients else [] for p in plans}
        found: dict[str, list[Tensor]] = {p.name: [] for p in plans}
        for dtype, part in self._by_dtype(plans):
            arrived = self._to_rows(part, gradients, [p.short for p in part], dtype, "whole gradients").wait()
            found.update({name: [rows] for name, rows in arrived.items()})
        return found

    def _by_dtype(self, plans: Iterable[MatrixPlan]) -> list[tuple[torch.dtype, list[MatrixPlan]]]:
        """Matrices whose numbers travel in one dtype and are added up in one, in the same order on all ranks."""
        found: dict[tuple[torch.dtype, torch.dtype], list[MatrixPlan]] = {}
        for plan in plans:
            wire = self._wire(plan.parameter)
            found.setdefault((wire if wire.itemsize < plan.dtype.itemsize else plan.dtype, plan.dtype), []).append(plan)
        return [(wire, part) for (wire, _), part in found.items()]

    def _to_rows(
        self,
        plans: Sequence[MatrixPlan],
        mine: Mapping[str, Tensor],
        widths: Sequence[int],
        dtype: torch.dtype,
        purpose: str,
    ) -> Pending[dict[str, Tensor]]:
        """Means over the ranks, of the rows that this rank computes: name -> rows × width, in what is computed with."""
        everyone, size = range(self._comm.ranks.size), self._comm.ranks.size
        send: list[list[Tensor]] = [[] for _ in everyone]
        for k in self._group:
            for plan, width in zip(plans, widths):
                share = plan.shares[k]
                if share is not None:
                    whole = mine.get(plan.name)
                    send[k].append(
                        torch.zeros(share.rows, width, dtype=dtype, device=self._comm.ranks.device)
                        if whole is None
                        else whole[share.start : share.stop]
                    )
        counts = [p.rows_of(self._rank) * width for p, width in zip(plans, widths)]
        exchange = self._comm.exchange(send, [sum(counts) if k in self._group else 0 for k in everyone], dtype, purpose)
        work = plans[0].dtype

        def means() -> dict[str, Tensor]:
            total: Tensor | None = None
            for k, values in enumerate(exchange.wait()):
                if k in self._group:
                    total = values.to(work, copy=True) if total is None else total.add_(values)
            assert total is not None
            total = self._comm.add_replicas(total, dtype, purpose).div_(size)
            parts = zip(plans, widths, counts, total.split(counts))
            return {p.name: part.view(-1, width) for p, width, count, part in parts if count}

        return Pending(means)

    def wait(self) -> None:
        """Wait for all that comes."""
        for pending in self._leaving:
            pending.wait()
        self._leaving.clear()

    def norm_squared(self) -> Tensor:
        """Σ ‖R‖², of all ranks, when nothing is left to be sent. Collective."""
        total = torch.zeros((), dtype=torch.float64, device=self._comm.ranks.device)
        for rows in self._rows.values():
            total += torch.linalg.vector_norm(rows, dtype=torch.float64).square()
        total = self._comm.all_reduce(total, "norms").wait()
        return total if self.factor is None else total * self.factor.double().square()

    def scale_(self, factor: Tensor) -> None:
        """Multiply all sums by a number."""
        self.factor = factor if self.factor is None else self.factor * factor

    def take(self, plans: Sequence[MatrixPlan]) -> dict[str, Tensor | None]:
        """The sums of matrices: name -> rows × r, ``None`` where this rank computes no row.

        On one process what has no gradient is missing; on several it counts as zero.
        """
        found: dict[str, Tensor | None] = {}
        for plan in plans:
            rows = self._rows.pop(plan.name, None)
            if rows is not None:
                found[plan.name] = rows
            elif self._comm.ranks.size > 1:
                count = plan.rows_of(self._rank)
                found[plan.name] = (
                    torch.zeros(count, plan.r, dtype=plan.dtype, device=self._comm.ranks.device) if count else None
                )
        return found
