"""What a selection has to know of gradients, on the rank that draws: Grams to their owners, one number from everybody.

Nobody gathers a full gradient but where the longer side is projected, whose Gram is larger than the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.subspace.project import gram, row_squares

# name -> blocks of rows of A's gradient on this rank.
Rows = Mapping[str, Sequence[Tensor]]
# name -> |∇A_i|² of every row of the same blocks.
Squares = MutableMapping[str, list[Tensor]]


class Evidence:
    """Adds up evidence of the matrices of a wave.

    Args:
        comm: the collectives.
        gram_dtype: float32 or float64.
    """

    def __init__(self, comm: Comm, gram_dtype: torch.dtype):
        self._comm = comm
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._dtype = gram_dtype

    def local(self, plan: MatrixPlan, rows: Rows) -> Tensor:
        """Of a matrix that lies here whole: its Gram, or its gradient (long × short) where rows are gathered."""
        return self._rows(plan, rows) if plan.gathers else self._gram(plan, rows)

    def shared(self, plans: Sequence[MatrixPlan], rows: Rows) -> dict[str, Pending[Tensor]]:
        """The same of shared matrices, on their owners. Collective.

        Args:
            plans: of one dtype; the same on all ranks.
            rows: of this rank.

        Returns:
            name -> evidence of those that are owned here, on its way.
        """
        return {
            **self._sum_grams([p for p in plans if not p.gathers], rows),
            **self._gather_rows([p for p in plans if p.gathers], rows),
        }

    def alive(self, plans: Sequence[MatrixPlan], rows: Rows, squares: Squares | None = None) -> set[str]:
        """Names of the matrices whose gradient is finite and not zero. Collective when one of them is shared.

        Args:
            plans: the shared ones are the same on all ranks.
            rows: of this rank.
            squares: gets |∇A_i|² of every row, where who steps will want them: the gradient is read once for both.
        """
        found: set[str] = set()
        for shared in (True, False):
            asked = [p for p in plans if p.shared is shared]
            if not asked:
                continue
            sizes = [sum(self._sizes(plan, rows.get(plan.name, ()), squares)) for plan in asked]
            if shared:
                summed = torch.tensor(sizes, dtype=torch.float64, device=self._device)
                sizes = self._comm.all_reduce(summed, "refresh verdicts").wait().tolist()
            found.update(p.name for p, size in zip(asked, sizes) if 0.0 < size < float("inf"))
        if squares is not None:
            for plan in plans:
                if plan.name not in found:
                    squares.pop(plan.name, None)
        return found

    def _sizes(self, plan: MatrixPlan, blocks: Sequence[Tensor], squares: Squares | None) -> list[float]:
        """Of each block a number that is zero, finite or not as its largest is."""
        if squares is None:
            return [_extent(block) for block in blocks]
        own = squares[plan.name] = [row_squares(block, plan.dtype) for block in blocks]
        sizes = [float(part.sum()) for part in own]
        # What is not zero or infinite may have a square that is.
        return [size if 0.0 < size < float("inf") else _extent(b) for size, b in zip(sizes, blocks)]

    def _gram(self, plan: MatrixPlan, rows: Rows) -> Tensor:
        parts = [gram(block.to(self._device), self._dtype) for block in rows[plan.name]]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def _rows(self, plan: MatrixPlan, rows: Rows) -> Tensor:
        return torch.cat([block.to(self._device, plan.dtype) for block in rows[plan.name]])

    def _sum_grams(self, plans: Sequence[MatrixPlan], rows: Rows) -> dict[str, Pending[Tensor]]:
        """Grams of whole matrices: the parts of the ranks in the owner's copy of the model."""
        totals: dict[str, Pending[Tensor]] = {}
        group = self._comm.ranks.shard_group
        few = []
        before: Pending[Tensor] | None = None
        for plan in plans:
            if len(plan.contributors) != len(group):
                few.append(plan)
            elif plan.owner in group:  # other copies of the model have the same gradient and leave it to this one
                summing = self._comm.reduce(self._gram(plan, rows), plan.owner, "Gram matrices")
                if plan.owner == self._rank:
                    totals[plan.name] = summing
                # One is computed while another travels: what is not owned here is freed as soon as it has left.
                if before is not None:
                    before.wait()
                before = summing
        if few:
            totals.update(self._exchange_grams(few, rows))
        return totals

    def _exchange_grams(self, plans: Sequence[MatrixPlan], rows: Rows) -> dict[str, Pending[Tensor]]:
        """The same where few ranks hold a matrix: only they send. Summed in rank order."""
        everyone = range(self._comm.ranks.size)
        mine = {p.name: self._gram(p, rows) for p in plans if self._rank in p.contributors}
        send = [[mine[p.name] for p in plans if p.owner == k and self._rank in p.contributors] for k in everyone]
        owned = [p for p in plans if p.owner == self._rank]
        coming = [[p for p in owned if k in p.contributors] for k in everyone]
        arriving = self._comm.exchange(send, [sum(p.short**2 for p in c) for c in coming], self._dtype, "Gram matrices")

        def sums() -> dict[str, Tensor]:
            found: dict[str, Tensor] = {}
            for parts, values in zip(coming, arriving.wait()):
                for plan, part in zip(parts, values.split([p.short**2 for p in parts])):
                    square = part.view(plan.short, plan.short)
                    found[plan.name] = found[plan.name].add_(square) if plan.name in found else square.clone()
            return found

        return _one_by_one(owned, Pending(sums))

    def _gather_rows(self, plans: Sequence[MatrixPlan], rows: Rows) -> dict[str, Pending[Tensor]]:
        """Gradients of whole matrices, on their owners: rows from the ranks in the owner's copy, in rank order."""
        if not plans:
            return {}
        everyone, rank = range(self._comm.ranks.size), self._rank
        mine = {p.name: self._rows(p, rows).reshape(-1) for p in plans if rank in p.contributors}
        send = [[mine[p.name] for p in plans if p.owner == k and rank in p.contributors] for k in everyone]
        owned = [p for p in plans if p.owner == rank]
        coming = [[p for p in owned if k in p.contributors] for k in everyone]
        sizes = [[p.rows_of(k) * p.short for p in c] for k, c in zip(everyone, coming)]
        arriving = self._comm.exchange(send, [sum(s) for s in sizes], plans[0].dtype, "gathered gradients")

        def gathered() -> dict[str, Tensor]:
            found: dict[str, list[Tensor]] = {p.name: [] for p in owned}
            for plans_of, counts, values in zip(coming, sizes, arriving.wait()):
                for plan, part in zip(plans_of, values.split(counts)):
                    found[plan.name].append(part.view(-1, plan.short))
            return {name: torch.cat(parts) for name, parts in found.items()}

        return _one_by_one(owned, Pending(gathered))


def _extent(block: Tensor) -> float:
    """Sum of the magnitudes of the largest and the smallest number, NaN as soon as one is, without a copy.

    torch's infinity norm takes 20 times as long on a CPU.
    """
    if not block.numel():
        return 0.0
    lying = block if block.is_contiguous() else block.mT
    if lying.is_contiguous():
        extremes = torch.aminmax(lying)
        return abs(float(extremes.min)) + abs(float(extremes.max))
    return abs(float(block.amin())) + abs(float(block.amax()))


def _one_by_one(owned: Sequence[MatrixPlan], together: Pending[dict[str, Tensor]]) -> dict[str, Pending[Tensor]]:
    """What arrives together, taken out one by one, so that it is freed when it has been used."""
    if not owned:
        together.wait()  # its part is done when what it sends has left
    return {p.name: Pending(lambda name=p.name: together.wait().pop(name)) for p in owned}  # type: ignore[misc]


def gram_dtype_on(option: str, device: torch.device) -> torch.dtype:
    """Dtype of Gram matrices for the option ``gram_dtype``; ``auto``: float64 on a CPU, float32 elsewhere."""
    wide = option == "float64" or (option == "auto" and device.type == "cpu")
    return torch.float64 if wide else torch.float32
