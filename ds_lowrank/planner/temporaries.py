"""What the low-rank step holds for a moment on one rank: read off step.py, rows.py, bases.py and refresh.py.

A step needs the projection of one matrix and its basis. Where rows move, three batches of them are on their way at
once: the next one's gradients, this one's updates, and the updates of the one before. A refresh needs the rows of a
wave, the Grams that this rank owns, and what one decomposition takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_lowrank.plan import MatrixPlan
from ds_lowrank.planner.formats import rows_bytes
from ds_lowrank.step import batches_of, waves_of
from ds_lowrank.subspace.project import widened_rows


@dataclass(frozen=True)
class Temporaries:
    """Bytes on one rank in one call of ``step()``.

    Attributes:
        step: without a refresh.
        refresh: in the largest wave of a step where everything is due, as in the first. Matrices that are not due take
            what ``step`` says, at another moment of the call.
        solver: of that, the workspace of ``eigh``, which is allocated outside torch on a CPU.
    """

    step: int
    refresh: int
    solver: int


def temporaries(
    plans: Sequence[MatrixPlan],
    rank: int,
    *,
    state_dtype: str,
    basis_dtype: str,
    gram_width: int,
    offload: bool = False,
) -> Temporaries:
    """What stepping ``plans``, all of one call of ``step()``, holds on ``rank``.

    Args:
        plans: in the model's order.
        rank: of the ranks.
        state_dtype, basis_dtype: formats of moments and bases.
        gram_width: bytes of a number of a Gram.
        offload: whether weights, gradients and states lie on the CPU and visit the device one matrix at a time.
    """
    kept = [p for p in plans if p.shared or p.shares[rank] is not None]
    formats = (state_dtype, basis_dtype, offload)
    step = 0
    for shared in (True, False):
        batches = [_Batch(b, rank, formats) for b in batches_of([p for p in kept if p.shared is shared])]
        step = max(step, _pipeline(batches))
    waves = [_wave(wave, rank, formats, gram_width) for wave in waves_of(kept)]
    refresh, solver = max(waves, default=(0, 0))
    return Temporaries(step, refresh, solver)


class _Batch:
    """Bytes of matrices whose rows travel together.

    Attributes:
        buffered: rows of A that are brought here; as many updates leave.
        leaving: what is held here of matrices whose rows move, and so leaves; as many updates arrive.
        handed: weights that are handed round (DDP): this rank's, and everybody's.
        matrix: what one matrix needs, the one that needs most.
    """

    def __init__(self, plans: Sequence[MatrixPlan], rank: int, formats: tuple[str, str, bool]):
        self.buffered = self.leaving = 0
        for p in plans:
            share, part, width = p.shares[rank], p.parts[rank], p.dtype.itemsize
            if share is not None and share.buffer is not None:
                self.buffered += share.buffer.numel * width
            if p.moves and part is not None:
                view = share.view.numel if share is not None and share.view is not None else 0
                self.leaving += (part.numel - view) * width
        self.handed = _handed(plans, rank)
        self.matrix = max((_matrix(p, rank, formats) for p in plans), default=0)

    @property
    def moving(self) -> int:
        """In one exchange: what is sent and what is received."""
        return self.buffered + self.leaving


def _handed(plans: Sequence[MatrixPlan], rank: int) -> int:
    dealt = [p for p in plans if p.dealt]
    if not dealt:
        return 0
    ranks = len(dealt[0].copy)
    sizes = [
        sum(s.view.numel * p.weight_dtype.itemsize for p in dealt if (s := p.shares[k]) is not None and s.view)
        for k in range(ranks)
    ]
    padded = max(sizes) if sizes[rank] < max(sizes) else 0
    return sizes[rank] + padded + max(sizes) * ranks


def _pipeline(batches: Sequence[_Batch]) -> int:
    """The most that is alive while batches are stepped one after the other."""
    highest = 0
    for i, batch in enumerate(batches):
        coming = batches[i + 1].moving if i + 1 < len(batches) else 0
        left = batches[i - 1].moving + batches[i - 1].handed if i else 0
        highest = max(
            highest,
            batch.moving + left,  # its rows are on their way
            2 * batch.buffered + left,  # and are put together
            batch.buffered + coming + left + batch.matrix,  # a row block goes as its update comes
            batch.buffered + batch.moving + coming + left + batch.handed,  # updates leave
        )
    return highest


def _matrix(plan: MatrixPlan, rank: int, formats: tuple[str, str, bool]) -> int:
    """The product, the basis, and what narrow formats are widened to, of one matrix."""
    share = plan.shares[rank]
    if share is None:
        return 0
    state_dtype, basis_dtype, offload = formats
    width = plan.dtype.itemsize
    product = share.rows * plan.rank * width
    blocks = 2 if share.view is not None and share.buffer is not None else 1
    basis = plan.short * plan.rank * width
    gathered = rows_bytes(plan.short, plan.rank, basis_dtype)
    joining = basis if basis_dtype != "fp32" or offload else 0
    if plan.spread:
        # The basis before is held until this one is joined, and the next is on its way.
        joining = basis + gathered + basis + gathered
    moments = 0 if state_dtype == "fp32" or offload else 2 * product  # widened where they lie
    cast = 0
    if plan.weight_dtype.itemsize < width and share.view is not None:
        # Gradients are widened for the product, weights for the lift: some rows at a time.
        cast = min(share.view.numel, widened_rows(plan.short) * plan.short) * width
    if offload and share.view is not None:
        cast += 2 * share.view.numel * plan.weight_dtype.itemsize
    return product * blocks + joining + moments + cast


def _wave(plans: Sequence[MatrixPlan], rank: int, formats: tuple[str, str, bool], g: int) -> tuple[int, int]:
    """A refresh of matrices side by side and their step; of it the solver's workspace."""
    batch = _Batch(plans, rank, formats)
    square = {p.name: p.short**2 * g for p in plans}
    owned = [p for p in plans if p.shared and p.owner == rank]
    mine = [p for p in plans if p.shared and rank in p.witnesses]
    ranks = len(plans[0].copy)
    all_ranks = [p for p in mine if len(p.witnesses) == ranks]
    few = [p for p in mine if len(p.witnesses) != ranks]
    alone = [p for p in plans if not p.shared and p.shares[rank] is not None]
    # Of Grams that all ranks add up those owned here stay, one is on its way and one is computed.
    grams = sum(square[p.name] for p in owned if p in all_ranks)
    passing = 2 * max((square[p.name] for p in all_ranks), default=0)
    # Where few ranks share a matrix, all parts are made, joined for sending, received, and added up.
    made = sum(square[p.name] for p in few)
    received = sum(square[p.name] * len(p.witnesses) for p in owned if p in few)
    summed = sum(square[p.name] for p in owned if p in few)
    narrow = max(
        (min(widened_rows(p.short), p.long) * p.short * g for p in [*mine, *alone] if g != p.dtype.itemsize), default=0
    )
    second = max((square[p.name] for p in [*mine, *alone] if _blocks(p, rank) == 2), default=0)
    computing = grams + passing + 2 * made + received + narrow + second
    decomposed = [*owned, *alone]
    largest = max(decomposed, key=lambda p: p.short, default=None)
    solver = deciding = 0
    if largest is not None:
        s = square[largest.name]
        solver = 2 * s  # syevd: 1 + 6 n + 2 n²
        # Eigenvectors, their copy in descending order, a mask of what is finite; the Gram itself is among `grams`.
        deciding = grams + summed + received + 2 * s + largest.short**2 + solver
        deciding += s if largest in alone else 0
    bases = sum(p.short * p.rank * p.dtype.itemsize for p in owned)
    kept = sum(p.kept(rank) * p.rank * p.dtype.itemsize for p in plans if p.shared and p.shares[rank] is not None)
    collecting = max(batch.moving, 2 * batch.buffered)
    stepping = batch.buffered + max(batch.matrix, batch.moving + batch.handed) + batch.buffered
    refreshing = batch.buffered + max(computing, deciding + bases, 2 * bases + 2 * kept)
    highest = max(collecting, stepping, refreshing)
    at_solver = highest == refreshing and deciding + bases >= max(computing, 2 * bases + 2 * kept)
    return highest, solver if at_solver else 0


def _blocks(plan: MatrixPlan, rank: int) -> int:
    share = plan.shares[rank]
    return 0 if share is None else (share.view is not None) + (share.buffer is not None)
