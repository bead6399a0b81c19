"""What the low-rank step holds for a moment on each rank: read off engine/.

A step needs the projections of a batch's matrices and their bases. Where rows move, three batches are on their way at
once: the next one's gradients, this one's updates, and the updates of the one before. A refresh needs the rows of a
wave, the Grams that this rank owns, and what one decomposition takes; of a selection that draws from its key alone
there are no Grams, and where bases are not kept each is made anew for every use.

All is computed for all ranks at once: a tensor here is int64 and has one number a rank, N of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.engine.batches import batches_of, waves_of
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.planner.holdings import Holding
from ds_lowrank.selections import Selection
from ds_lowrank.states.layout import BASIS, StateLayout
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
    held: Sequence[Holding],
    *,
    method: Method,
    gram_width: int,
    offload: bool = False,
    device: str = "cuda",
    projected: bool = False,
) -> Temporaries:
    """What stepping matrices, all of one call of ``step()``, holds on every rank.

    Args:
        held: the matrices in the model's order; not empty.
        method: rule, selection and what they keep.
        gram_width: bytes of a number of a Gram.
        offload: whether weights, gradients and states lie on the CPU and visit the device one matrix at a time.
        device: on which it is computed.
        projected: whether R is there already, and no gradient moves.
    """
    new_bases = not method.selection.stored and not method.keeps_drawn(device)
    by_name = {h.plan.name: h for h in held}
    ranks = len(held[0].plan.copy)
    nothing = torch.zeros(ranks, dtype=torch.int64)
    batches = [[by_name[p.name] for p in batch] for batch in batches_of(h.plan for h in held)]
    moved = [batch for batch in batches if batch[0].plan.shared]
    alone = (_Batch(batch, method, offload, new_bases) for batch in batches if not batch[0].plan.shared)
    pipeline = _pipeline([_Batch(batch, method, offload, new_bases) for batch in moved], projected)
    step = _most([pipeline, *(batch.stepping + batch.bases for batch in alone)], nothing)
    refresh = solver = nothing
    for wave in waves_of([h.plan for h in held]):
        due = {p.name for p in wave}
        # What one rank holds alone steps later, with all that is not due.
        parts = [part for batch in moved if (part := [h for h in batch if h.plan.name in due])]
        stepping = [_Batch(part, method, offload, new_bases) for part in parts]
        highest, work = _wave([by_name[p.name] for p in wave], stepping, gram_width, method.selection)
        higher = (highest > refresh) | ((highest == refresh) & (work > solver))
        refresh, solver = torch.where(higher, highest, refresh), torch.where(higher, work, solver)
    return Temporaries(step.tolist(), refresh.tolist(), solver.tolist())


def _most(numbers: Iterable[Tensor], least: Tensor) -> Tensor:
    """The largest on each rank, ``least`` where there is none."""
    for found in numbers:
        least = torch.maximum(least, found)
    return least


class _Batch:
    """Bytes of matrices whose rows and bases travel together, and that step together.

    Attributes:
        buffered: rows of A that are brought here; as many updates leave.
        leaving: what is held here of matrices whose rows move, and so leaves; as many updates arrive.
        handed: weights that are handed round (DDP): this rank's, and everybody's.
        gathered: of bases that lie in slices, on their way.
        bases: whole ones, beside what is kept of them.
        stepping: all their products, what narrow formats are widened to, and of one of them at a time what is widened
            or brought here some rows at a time.
    """

    def __init__(self, held: Sequence[Holding], method: Method, offload: bool, new_bases: bool):
        nothing = torch.zeros_like(held[0].rows)
        self.buffered = self.leaving = self.gathered = self.bases = self.stepping = some = nothing
        for h in held:
            plan = h.plan
            width = plan.dtype.itemsize
            self.buffered = self.buffered + h.buffer * width
            if plan.moves:
                self.leaving = self.leaving + (h.part - h.view) * width
            gathered, whole = _basis(plan, method, offload, new_bases)
            self.gathered, self.bases = self.gathered + h.computes * gathered, self.bases + h.computes * whole
            # Narrow slots are widened where they lie. What is refined has a sum ∇Aᵀ R of the rows here, and a part of
            # that of all.
            numbers = plan.r * (1 + method.rule.copies) + (0 if offload else widened(method.states, plan.r))
            self.stepping = self.stepping + h.rows * numbers * width
            if method.selection.evidence == "sketch":
                self.stepping = self.stepping + h.computes * (2 * plan.short * plan.r * width)
            if plan.weight_dtype.itemsize < width:
                # Gradients are widened for the product, weights for the lift: some rows at a time.
                rows = h.view.clamp(max=widened_rows(plan.short) * plan.short) * width
                some = torch.maximum(some, h.computes * rows)
            if offload:
                some = torch.maximum(some, h.computes * (2 * h.view * plan.weight_dtype.itemsize))
        self.stepping = self.stepping + some
        self.handed = _handed(held, nothing)

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


def _pipeline(batches: Sequence[_Batch], projected: bool = False) -> Tensor:
    """The most that is alive while batches are stepped one after the other; 0 without any."""
    highest = torch.zeros((), dtype=torch.int64)
    for i, batch in enumerate(batches):
        coming = batches[i + 1].moving if i + 1 < len(batches) and not projected else 0
        before = batches[i - 1].bases if i else 0
        left = batches[i - 1].moving + batches[i - 1].handed if i else 0
        # Bases are there until those of the next batch are joined, which are on their way by then.
        bases = batch.bases + (batches[i + 1].gathered if i + 1 < len(batches) else 0)
        arriving = 0 if projected else batch.moving
        there = 0 if projected else batch.buffered
        highest = _most(
            (
                arriving + left + before + batch.gathered,  # its rows are on their way
                2 * there + left + before + batch.gathered,  # and are put together
                there + left + before + batch.gathered + batch.bases,  # its bases are joined
                batch.buffered + coming + left + bases + batch.stepping,  # a row block goes as its update comes
                batch.buffered + batch.moving + coming + left + bases + batch.handed,  # updates leave
            ),
            highest,
        )
    return highest


def widened(kept: StateLayout, r: int) -> int:
    """Numbers a row of A that a step reads from a narrow format."""
    return sum(
        kept.width(name, r)
        for name, slot in kept.slots.items()
        if slot.axis == "rows" and kept.format(name).name != "fp32"
    )


def _basis(plan: MatrixPlan, method: Method, offload: bool, new: bool) -> tuple[int, int]:
    """Bytes of a basis that is on its way, and of a whole one beside what is kept of it, on a rank that uses it."""
    basis = plan.short * plan.r * plan.dtype.itemsize
    if not method.selection.stored:
        return 0, basis if new else 0  # made in every step
    stored = method.states.format(BASIS.name)
    if plan.basis_sharded:
        return stored.bytes(plan.short, plan.r, plan.dtype), basis
    return 0, basis if stored.name != "fp32" or offload else 0


def refreshing(held: Sequence[Holding], gram_width: int, selection: Selection) -> tuple[Tensor, Tensor]:
    """A refresh of matrices side by side whose gradients' rows are there already, and of it the solver's workspace."""
    return _wave(held, [], gram_width, selection)


def _wave(held: Sequence[Holding], parts: Sequence[_Batch], g: int, selection: Selection) -> tuple[Tensor, Tensor]:
    """A refresh of matrices side by side and their step, part by part; of it the solver's workspace."""
    nothing = torch.zeros_like(held[0].rows)
    buffered = sum((part.buffered for part in parts), start=nothing)
    moving = sum((part.moving for part in parts), start=nothing)
    # Of Grams that all ranks add up those owned here stay, one is on its way and one is computed.
    grams, passing = nothing, nothing
    # Where few ranks share a matrix, and of gathered rows, all parts are made, joined for sending, received, and put
    # together.
    made, received, summed = nothing, nothing, nothing
    narrow, second = nothing, nothing  # a block of rows widened; the Gram of a second block
    owned, alone = nothing, nothing  # the longest side of what is decomposed here
    framed = nothing  # of gathered rows: in the Gram's dtype, as QR overwrites them, and their frame
    bases, kept = nothing, nothing
    alone_drawn = nothing  # the largest basis that is drawn where it is used
    for h in held:
        plan = h.plan
        square = plan.side_to_decompose**2 * g
        here = h.contributes if plan.shared else h.computes
        drawn = plan.short * plan.r * plan.dtype.itemsize
        if selection.stored and plan.shared:
            bases = bases + h.owns * drawn
            kept = kept + h.computes * h.kept * (plan.r * plan.dtype.itemsize)
        if selection.evidence != "gram":
            # Drawn from a key: nothing is added up, sent or decomposed before.
            alone_drawn = _most([h.computes * drawn * (not plan.shared)], alone_drawn)
            continue
        if plan.shared:
            owned = _most([h.owns * plan.side_to_decompose], owned)
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
    collecting = torch.maximum(moving, 2 * buffered)
    # What is updated takes the place of rows that have gone.
    after = nothing
    for part in parts:
        most = _most([part.gathered, part.moving + part.handed], part.stepping)
        after = torch.maximum(after, buffered + part.bases + most)
    others = torch.maximum(computing, 2 * bases + 2 * kept + alone_drawn)
    refreshing = buffered + torch.maximum(deciding + bases, others)
    highest = torch.maximum(torch.maximum(collecting, after), refreshing)
    at_solver = (highest == refreshing) & (deciding + bases >= others)
    return highest, solver * at_solver
