"""What the low-rank step holds for a moment on each rank: read off engine/.

A step needs the projection of one matrix and its basis. Where rows move, three batches of them are on their way at
once: the next one's gradients, this one's updates, and the updates of the one before. A refresh needs the rows of a
wave, the Grams that this rank owns, and what one decomposition takes.

All is computed for all ranks at once: a tensor here is int64 and has one number a rank, N of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.engine.batches import batches_of, waves_of
from ds_lowrank.planner.formats import rows_bytes
from ds_lowrank.planner.holdings import Holding
from ds_lowrank.subspace.project import widened_rows


@dataclass(frozen=True)
class Temporaries:
    """Bytes on every rank in one call of ``step()``.

    Attributes:
        step: without a refresh.
        refresh: in the largest wave of a step where everything is due, as in the first. Matrices that are not due take
            what ``step`` says, at another moment of the call.
        solver: of that, the workspace of ``eigh``, which is allocated outside torch on a CPU.
    """

    step: list[int]
    refresh: list[int]
    solver: list[int]


def temporaries(
    held: Sequence[Holding], *, state_dtype: str, basis_dtype: str, gram_width: int, offload: bool = False
) -> Temporaries:
    """What stepping matrices, all of one call of ``step()``, holds on every rank.

    Args:
        held: the matrices in the model's order; not empty.
        state_dtype, basis_dtype: formats of moments and bases.
        gram_width: bytes of a number of a Gram.
        offload: whether weights, gradients and states lie on the CPU and visit the device one matrix at a time.
    """
    formats = (state_dtype, basis_dtype, offload)
    by_name = {h.plan.name: h for h in held}
    matrix = {name: _matrix(h, formats) for name, h in by_name.items()}
    ranks = len(held[0].plan.copy)
    nothing = torch.zeros(ranks, dtype=torch.int64)
    shared = [h.plan for h in held if h.plan.shared]
    batches = [_Batch([by_name[p.name] for p in batch], matrix) for batch in batches_of(shared)]
    # Of what one rank holds no row moves: how it is batched makes no difference.
    step = _most([_pipeline(batches), *(matrix[h.plan.name] for h in held if not h.plan.shared)], nothing)
    refresh = solver = nothing
    for wave in waves_of([h.plan for h in held]):
        highest, work = _wave([by_name[p.name] for p in wave], matrix, gram_width)
        higher = (highest > refresh) | ((highest == refresh) & (work > solver))
        refresh, solver = torch.where(higher, highest, refresh), torch.where(higher, work, solver)
    return Temporaries(step.tolist(), refresh.tolist(), solver.tolist())


def _most(numbers: Iterable[Tensor], least: Tensor) -> Tensor:
    """The largest on each rank, ``least`` where there is none."""
    for found in numbers:
        least = torch.maximum(least, found)
    return least


class _Batch:
    """Bytes of matrices whose rows travel together.

    Attributes:
        buffered: rows of A that are brought here; as many updates leave.
        leaving: what is held here of matrices whose rows move, and so leaves; as many updates arrive.
        handed: weights that are handed round (DDP): this rank's, and everybody's.
        matrix: what one matrix needs, the one that needs most.
    """

    def __init__(self, held: Sequence[Holding], matrix: dict[str, Tensor]):
        nothing = torch.zeros_like(held[0].rows)
        self.buffered = self.leaving = nothing
        for h in held:
            width = h.plan.dtype.itemsize
            self.buffered = self.buffered + h.buffer * width
            if h.plan.moves:
                self.leaving = self.leaving + (h.part - h.view) * width
        self.handed = _handed(held, nothing)
        self.matrix = _most((matrix[h.plan.name] for h in held), nothing)

    @property
    def moving(self) -> Tensor:
        """In one exchange: what is sent and what is received."""
        return self.buffered + self.leaving


def _handed(held: Sequence[Holding], nothing: Tensor) -> Tensor:
    replicated = [h for h in held if h.plan.replicated]
    if not replicated:
        return nothing
    sizes = sum((h.view * h.plan.weight_dtype.itemsize for h in replicated), start=nothing)
    most = int(sizes.max())
    return sizes + (sizes < most) * most + most * len(nothing)


def _pipeline(batches: Sequence[_Batch]) -> Tensor:
    """The most that is alive while batches are stepped one after the other; 0 without any."""
    highest = torch.zeros((), dtype=torch.int64)
    for i, batch in enumerate(batches):
        coming = batches[i + 1].moving if i + 1 < len(batches) else 0
        left = batches[i - 1].moving + batches[i - 1].handed if i else 0
        highest = _most(
            (
                batch.moving + left,  # its rows are on their way
                2 * batch.buffered + left,  # and are put together
                batch.buffered + coming + left + batch.matrix,  # a row block goes as its update comes
                batch.buffered + batch.moving + coming + left + batch.handed,  # updates leave
            ),
            highest,
        )
    return highest


def _matrix(h: Holding, formats: tuple[str, str, bool]) -> Tensor:
    """The product, the basis, and what narrow formats are widened to, of one matrix."""
    plan = h.plan
    state_dtype, basis_dtype, offload = formats
    width = plan.dtype.itemsize
    product = h.rows * plan.r * width
    blocks = torch.where(h.blocks == 2, 2, 1)
    basis = plan.short * plan.r * width
    gathered = rows_bytes(plan.short, plan.r, basis_dtype)
    joining = basis if basis_dtype != "fp32" or offload else 0
    if plan.basis_sharded:
        # The basis before is held until this one is joined, and the next is on its way.
        joining = basis + gathered + basis + gathered
    # Narrow moments are widened where they lie.
    moments = 0 if state_dtype == "fp32" or offload else 2
    needed = product * (blocks + moments) + joining
    if plan.weight_dtype.itemsize < width:
        # Gradients are widened for the product, weights for the lift: some rows at a time.
        needed = needed + h.view.clamp(max=widened_rows(plan.short) * plan.short) * width
    if offload:
        needed = needed + 2 * h.view * plan.weight_dtype.itemsize
    return needed * h.computes


def _wave(held: Sequence[Holding], matrix: dict[str, Tensor], g: int) -> tuple[Tensor, Tensor]:
    """A refresh of matrices side by side and their step; of it the solver's workspace."""
    batch = _Batch(held, matrix)
    nothing = torch.zeros_like(batch.buffered)
    # Of Grams that all ranks add up those owned here stay, one is on its way and one is computed.
    grams, passing = nothing, nothing
    # Where few ranks share a matrix, and of gathered rows, all parts are made, joined for sending, received, and put
    # together.
    made, received, summed = nothing, nothing, nothing
    narrow, second = nothing, nothing  # a block of rows widened; the Gram of a second block
    owned, alone = nothing, nothing  # the longest side of what is decomposed here
    framed = nothing  # of gathered rows: in the Gram's dtype, as QR overwrites them, and their frame
    bases, kept = nothing, nothing
    for h in held:
        plan = h.plan
        square = plan.side_to_decompose**2 * g
        here = h.contributes if plan.shared else h.computes
        if plan.shared:
            owned = _most([h.owns * plan.side_to_decompose], owned)
            bases = bases + h.owns * (plan.short * plan.r * plan.dtype.itemsize)
            kept = kept + h.computes * h.kept * (plan.r * plan.dtype.itemsize)
        else:
            alone = _most([here * plan.side_to_decompose], alone)
        if plan.gathers:
            whole = plan.long * plan.short * plan.dtype.itemsize
            made = made + here * h.rows * (plan.short * plan.dtype.itemsize)
            received = received + (h.owns * whole if plan.shared else 0)
            summed = summed + (h.owns * whole if plan.shared else 0)
            framed = _most([(h.owns if plan.shared else here) * (3 * plan.long * plan.short * g)], framed)
            continue
        if g != plan.dtype.itemsize:
            narrow = _most([here * (min(widened_rows(plan.short), plan.long) * plan.short * g)], narrow)
        second = _most([here * (h.blocks == 2) * square], second)
        if not plan.shared:
            continue
        if len(plan.contributors) == len(plan.copy):
            grams = grams + h.owns * square
            passing = _most([here * (2 * square)], passing)
        else:
            made = made + here * square
            received = received + h.owns * (square * len(plan.contributors))
            summed = summed + h.owns * square
    computing = grams + passing + 2 * made + received + narrow + second
    largest = torch.maximum(owned, alone)
    s = largest**2 * g
    solver = 2 * s  # syevd: 1 + 6 n + 2 n²
    # Eigenvectors, their copy in descending order, a mask of what is finite; the Gram itself is among `grams`.
    deciding = grams + summed + received + framed + 2 * s + largest**2 + solver + (alone > owned) * s
    deciding = deciding * (largest > 0)
    collecting = torch.maximum(batch.moving, 2 * batch.buffered)
    stepping = batch.buffered + torch.maximum(batch.matrix, batch.moving + batch.handed) + batch.buffered
    others = torch.maximum(computing, 2 * bases + 2 * kept)
    refreshing = batch.buffered + torch.maximum(deciding + bases, others)
    highest = torch.maximum(torch.maximum(collecting, stepping), refreshing)
    at_solver = (highest == refreshing) & (deciding + bases >= others)
    return highest, solver * at_solver
