"""From the layout to the plan of every projected matrix: made once, the same on all ranks, checked across ranks.

A step is independent per row of A (the tall view of a weight), so whoever holds whole rows can do the work. The plan
says which rows each rank computes and what has to move for it.

    one rank holds the matrix        its rows are a view of what it holds: no copy, no traffic
    rows of A lie on several ranks   each computes the rows it holds; a row that a boundary cuts belongs to the rank
                                     that holds its first element, and only such rows move
    columns of A lie on several      rows of A are dealt out in proportion to what the ranks hold: one all-to-all turns
                                     columns into rows, another brings the updates back
    every rank holds the matrix      rows of A are dealt out evenly, the new weights are all-gathered

Where ranks project their own gradients, every rank has a part in every matrix, whoever holds it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.layouts.base import Layout, LayoutError, Piece, is_replicated
from ds_lowrank.plan.geometry import Box, Part, part_of
from ds_lowrank.plan.specs import MatrixSpec
from ds_lowrank.subspace.schedule import assign_owners, phases, refresh_cost, waves
from ds_lowrank.subspace.sides import Side, projected_side


@dataclass(frozen=True)
class Share:
    """What one rank computes of one matrix: the rows [start, stop) of A, in this order.

    Attributes:
        start, stop: the rows.
        view: the leading rows, as the box of W where they lie in what this rank holds.
        buffer: the rows after them, as the box of W that has to be brought together from several ranks.
    """

    start: int
    stop: int
    view: Box | None
    buffer: Box | None

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


Slices = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class MatrixPlan:
    """One projected matrix: what it is, who holds and who computes which part of it.

    Attributes:
        name, parameter, shape, side, r: name, parameter's name, (m, n), side of the projection, rank of the subspace.
        index: which of the matrices stacked in the parameter; ``None``: the parameter is one matrix.
        group, unit: index of its parameter group; which matrices step in the same call of ``step()``.
        gap, phase, wave: refresh schedule; the matrices of a wave are refreshed side by side.
        weight_dtype, dtype: of the weights, and of states and products.
        gradient_dtype: in which the gradient was computed.
        parts: for each rank, the elements it holds.
        shares: for each rank, the rows of A it computes.
        slices: for each rank, the rows of a new basis that the owner sends it: together, all of them in each copy.
        basis_sharded: whether a rank keeps its slice only (slices are joined ahead of each use), or all of the basis.
        copy: for each rank, which copy of the model it is in (HSDP).
        replicated: every rank holds the whole matrix, and takes over the rows that others have computed.
        projected: every rank projects its own gradient of the whole matrix, with all of the basis.
        owner: the rank that decomposes it.
    """

    name: str
    parameter: str
    index: int | None
    shape: tuple[int, int]
    side: Side
    r: int
    group: int
    unit: int
    gap: int
    phase: int
    wave: int
    weight_dtype: torch.dtype
    dtype: torch.dtype
    gradient_dtype: torch.dtype
    parts: tuple[Part | None, ...]
    shares: tuple[Share | None, ...]
    slices: tuple[tuple[int, int] | None, ...]
    basis_sharded: bool
    copy: tuple[int, ...]
    replicated: bool
    projected: bool = False
    owner: int = -1

    @cached_property
    def short(self) -> int:
        """Length of the projected dimension."""
        return self.shape[1] if self.side == "right" else self.shape[0]

    @cached_property
    def long(self) -> int:
        """Length of the other dimension: rows of A."""
        return self.shape[0] if self.side == "right" else self.shape[1]

    @property
    def side_to_decompose(self) -> int:
        """Side of the matrix that a refresh decomposes: the shorter one, whichever is projected."""
        return min(self.shape)

    @property
    def gathers(self) -> bool:
        """Whether a refresh takes the owner the rows of A, because the longer side is projected: its Gram is larger."""
        return self.long < self.short

    @cached_property
    def computing(self) -> list[int]:
        """Ranks that compute rows of it."""
        return [k for k, share in enumerate(self.shares) if share is not None]

    @cached_property
    def fewest(self) -> int:
        """How many ranks of a copy of the model compute rows of it, in the copy where these are fewest."""
        return min(sum(self.copy[k] == c for k in self.computing) for c in set(self.copy))

    @cached_property
    def few(self) -> bool:
        """Whether some ranks of a copy of the model have no use for its basis."""
        return self.fewest < self.copy.count(self.copy[0]) and not self.projected

    @cached_property
    def lifted_everywhere(self) -> bool:
        """Whether every rank holds the whole matrix and its basis, so that directions travel and not weights."""
        return self.projected and self.replicated

    @cached_property
    def shared(self) -> bool:
        """Whether more than one rank has a part in it: then, and only then, its steps may communicate."""
        return (self.projected and len(self.parts) > 1) or sum(part is not None for part in self.parts) > 1

    @cached_property
    def moves(self) -> bool:
        """Whether rows have to be brought together from several ranks before they can be computed."""
        return any(share is not None and share.buffer is not None for share in self.shares)

    def kept(self, rank: int) -> int:
        """How many rows of the basis a rank keeps."""
        rows = self.slices[rank]
        return 0 if rows is None else rows[1] - rows[0] if self.basis_sharded else self.short

    def rows_of(self, rank: int) -> int:
        """How many rows of A a rank computes."""
        share = self.shares[rank]
        return 0 if share is None else share.rows

    @cached_property
    def contributors(self) -> list[int]:
        """The ranks whose rows make up the matrix once: those that compute it in the owner's copy of the model."""
        return [k for k in self.computing if self.copy[k] == self.copy[self.owner]]


def work_dtype(parameter_dtype: torch.dtype) -> torch.dtype:
    """Dtype of states and products for weights of ``parameter_dtype``: float64 for float64, else float32."""
    return torch.float64 if parameter_dtype == torch.float64 else torch.float32


def make_plan(
    specs: Sequence[MatrixSpec],
    layout: Layout,
    comm: Comm,
    *,
    gradient_dtype: torch.dtype | None,
    stagger: bool,
    wave_size: int,
    shard_projection: bool,
    options: str,
    left_out: Collection[str] = (),
    projected: bool = False,
) -> list[MatrixPlan]:
    """Plan every projected matrix. Collective.

    Args:
        specs: the matrices in the model's parameter order.
        layout: this rank's pieces.
        comm: the collectives.
        gradient_dtype: in which gradients are computed; ``None``: the layout says it.
        stagger, wave_size: see :func:`ds_lowrank.subspace.schedule.phases`.
        shard_projection: whether ranks that share a matrix keep a part of its basis each, or all of it.
        options: every other option that the ranks have to agree on.
        left_out: parameters that the framework does not train, and that have a place in the schedule all the same.
        projected: whether ranks project their own gradients.

    Returns:
        The plans, in the order of ``specs``, but for what is left out.

    Raises:
        LayoutError: on all ranks alike, when the weights are not where the layout says, the pieces do not cover a
            matrix once, or the ranks disagree about the model or the options.
    """
    fingerprint = hashlib.sha256(
        repr((list(specs), stagger, wave_size, shard_projection, options, sorted(left_out))).encode()
    ).hexdigest()
    answers = comm.gather_objects((layout.mismatch(), fingerprint, dict(layout.pieces), layout.checksums("weights")))
    for rank, (mismatch, *_) in enumerate(answers):
        if mismatch:
            raise LayoutError(f"rank {rank}: {mismatch}")
    differing = [rank for rank, answer in enumerate(answers) if answer[1] != answers[0][1]]
    if differing:
        raise LayoutError(
            f"ranks {differing} project other matrices, or with other options, than rank 0: build the model and the "
            "optimizer the same way on every rank"
        )
    check_equal([answer[3] for answer in answers], "weights", "load or initialise the same weights on every rank")
    return plan_matrices(
        specs,
        [answer[2] for answer in answers],
        copy=comm.ranks.copy,
        replicated=lambda name: is_replicated(layout, name),
        dtype=layout.dtype,
        gradient_dtype=layout.gradient_dtype if gradient_dtype is None else lambda name: gradient_dtype,
        unit=layout.unit,
        stagger=stagger,
        wave_size=wave_size,
        shard_projection=shard_projection,
        left_out=left_out,
        projected=projected,
    )


def plan_matrices(
    specs: Sequence[MatrixSpec],
    pieces: Sequence[Mapping[str, Piece]],
    *,
    copy: tuple[int, ...],
    replicated: bool | Callable[[str], bool],
    dtype: Callable[[str], torch.dtype],
    gradient_dtype: Callable[[str], torch.dtype],
    unit: Callable[[str], int],
    stagger: bool,
    wave_size: int,
    shard_projection: bool,
    left_out: Collection[str] = (),
    projected: bool = False,
) -> list[MatrixPlan]:
    """Plan every projected matrix from what each rank holds: the same numbers in a run and ahead of one.

    Args:
        specs: the matrices in the model's parameter order.
        pieces: for each rank, parameter name -> what it holds.
        copy: for each rank, which copy of the model it is in.
        replicated: whether every rank holds everything, or one parameter, whole.
        dtype, gradient_dtype, unit: of a parameter, see :class:`ds_lowrank.layouts.Layout`.
        stagger, wave_size, shard_projection, left_out, projected: see :func:`make_plan`.

    Raises:
        LayoutError: the pieces do not cover a matrix once and in order.
    """
    schedule = _schedule(specs, stagger, wave_size)
    plans = []
    # On many ranks most of the work is in matrices that are cut as another one was.
    known: dict[Any, tuple[tuple[Part | None, ...], tuple[Share | None, ...], Slices]] = {}
    for spec, (phase, wave) in zip(specs, schedule):
        if spec.parameter in left_out:
            continue
        side = projected_side(spec.shape, spec.proj_type)
        short = spec.shape[1] if side == "right" else spec.shape[0]
        held = tuple(p.get(spec.parameter) for p in pieces)
        whole = replicated(spec.parameter) if callable(replicated) else replicated
        key = (spec.parameter_shape, spec.index, spec.shape, side, held, whole)
        if key not in known:
            found = tuple(part_of(piece, spec.parameter_shape, spec.index, spec.name) for piece in held)
            dealing = plan_shares(spec.shape, side, found, spec.name, copy=copy, replicated=whole)
            known[key] = (found, dealing, _slices(dealing, copy, short))
        parts, shares, slices = known[key]
        # Whoever computes no row keeps none of a basis, and has to be given all of it where it projects.
        slicing = shard_projection or (projected and None in shares)
        cut = any(rows not in (None, (0, short)) for rows in slices) or (projected and None in shares)
        weight_dtype = dtype(spec.parameter)
        plans.append(
            MatrixPlan(
                name=spec.name,
                parameter=spec.parameter,
                index=spec.index,
                shape=spec.shape,
                side=side,
                r=spec.rank,
                group=spec.group,
                unit=unit(spec.parameter),
                gap=spec.gap,
                phase=phase,
                wave=wave,
                weight_dtype=weight_dtype,
                dtype=work_dtype(weight_dtype),
                gradient_dtype=gradient_dtype(spec.parameter),
                parts=parts,
                shares=shares,
                slices=slices,
                basis_sharded=slicing and cut,
                copy=copy,
                replicated=whole,
                projected=projected,
            )
        )
    return _with_owners(plans)


def check_equal(checksums: Sequence[dict[tuple[str, Any], Any] | None], what: str, remedy: str) -> None:
    """Refuse ranks that were promised to hold the same.

    Args:
        checksums: of every rank, by parameter name and what of it the rank holds; ``None`` without such a promise.
        what: ``weights`` or ``gradients``.
        remedy: what to do about it.

    Raises:
        LayoutError: naming the first parameter that differs.
    """
    first: dict[tuple[str, Any], tuple[int, Any]] = {}
    for rank, found in enumerate(checksums):
        for key, value in (found or {}).items():
            before, known = first.setdefault(key, (rank, value))
            if known != value:
                raise LayoutError(f"the {what} of {key[0]} differ between rank {before} and rank {rank}: {remedy}")


def _schedule(specs: Sequence[MatrixSpec], stagger: bool, wave_size: int) -> list[tuple[int, int]]:
    """Phase and wave of every matrix; those with a period of their own are staggered among themselves."""
    result = [(0, 0)] * len(specs)
    for gap in {s.gap for s in specs}:
        matrices = [j for j, s in enumerate(specs) if s.gap == gap]
        sides = [projected_side(specs[j].shape, specs[j].proj_type) for j in matrices]
        shapes = [specs[j].shape if side == "right" else specs[j].shape[::-1] for j, side in zip(matrices, sides)]
        costs = [refresh_cost(*shape) for shape in shapes]
        for j, phase, wave in zip(matrices, phases(costs, gap, wave_size, stagger), waves(costs, wave_size)):
            result[j] = (phase, wave)
    return result


def _with_owners(plans: Sequence[MatrixPlan]) -> list[MatrixPlan]:
    """Give every matrix its owner: shared out within a wave of matrices that step together."""
    together: dict[tuple[int, int, int], list[int]] = {}
    for j, plan in enumerate(plans):
        together.setdefault((plan.unit, plan.gap, plan.wave), []).append(j)
    owned = list(plans)
    for (_, _, wave), matrices in together.items():
        costs = [float(plans[j].side_to_decompose) ** 3 for j in matrices]
        candidates = [plans[j].computing for j in matrices]
        for j, owner in zip(matrices, assign_owners(costs, candidates, len(plans[0].copy), first=wave)):
            owned[j] = dataclasses.replace(plans[j], owner=owner)
    return owned


def plan_shares(
    shape: tuple[int, int],
    side: Side,
    parts: Sequence[Part | None],
    name: str,
    *,
    copy: Sequence[int] | None = None,
    replicated: bool = False,
) -> tuple[Share | None, ...]:
    """Decide which rows of A each rank computes.

    Args:
        shape: (m, n).
        side: of the projection.
        parts: what each rank holds.
        name: for errors.
        copy: which copy of the model each rank is in; default: all in one.
        replicated: every rank holds everything, the rows are dealt out evenly.

    Raises:
        LayoutError: the parts of a copy leave a gap, overlap, or are not in rank order.
    """
    m, n = shape
    copy = copy or [0] * len(parts)
    if replicated:
        size, long = len(parts), m if side == "right" else n
        cuts = [long * k // size for k in range(size + 1)]
        spans = itertools.pairwise(cuts)
        return tuple(Share(a, b, _rows_box(shape, side, a, b), None) if a < b else None for a, b in spans)
    shares: list[Share | None] = [None] * len(parts)
    for c in set(copy):
        ranks = [k for k in range(len(parts)) if copy[k] == c and parts[k] is not None]
        held = [parts[k] for k in ranks]
        for k, share in zip(ranks, _shares_of_copy(shape, side, [p for p in held if p is not None], ranks, name)):
            shares[k] = share
    return tuple(shares)


def _shares_of_copy(
    shape: tuple[int, int], side: Side, parts: Sequence[Part], ranks: Sequence[int], name: str
) -> list[Share | None]:
    m, n = shape
    blocks = all(p.run is None for p in parts)
    spans = [(p.boxes[0].left, p.boxes[0].right) if blocks else p.run or (0, 0) for p in parts]
    ends = [0, *(stop for _, stop in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != (n if blocks else m * n):
        raise LayoutError(
            f"{name} {shape}: the pieces of the ranks do not cover it once and in order: "
            + ", ".join(f"rank {k} [{a}, {b})" for k, (a, b) in zip(ranks, spans))
        )
    if len(parts) == 1:
        return [Share(0, m if side == "right" else n, Box(0, m, 0, n), None)]
    if blocks and side == "left":
        return [Share(left, right, Box(0, m, left, right), None) for left, right in spans]
    if not blocks and side == "right":
        return [_rows_share(start, stop, n) for start, stop in spans]
    # The ranks hold columns of A: rows in proportion to what each holds, boundaries at ⌊long · before / all⌋.
    long, total = (m, n) if blocks else (n, m * n)
    cuts = [long * end // total for end in ends]
    return [Share(a, b, None, _rows_box(shape, side, a, b)) if a < b else None for a, b in itertools.pairwise(cuts)]


def _rows_box(shape: tuple[int, int], side: Side, start: int, stop: int) -> Box:
    """The box of W that is the rows [start, stop) of A."""
    return Box(start, stop, 0, shape[1]) if side == "right" else Box(0, shape[0], start, stop)


def _rows_share(start: int, stop: int, n: int) -> Share | None:
    """Rows of W whose first element lies in the run [start, stop); the last of them may end on another rank."""
    top, bottom = -(-start // n), -(-stop // n)
    whole = max(top, stop // n)
    if top == bottom:
        return None
    return Share(
        top,
        bottom,
        Box(top, whole, 0, n) if top < whole else None,
        Box(whole, bottom, 0, n) if whole < bottom else None,
    )


def _slices(shares: Sequence[Share | None], copy: Sequence[int], short: int) -> Slices:
    """Rows of the basis in equal parts for the ranks that compute, within each copy of the model."""
    slices: list[tuple[int, int] | None] = [None] * len(shares)
    for c in set(copy):
        ranks = [k for k, share in enumerate(shares) if share is not None and copy[k] == c]
        for place, k in enumerate(ranks):
            chunk = -(-short // len(ranks))
            slices[k] = (min(place * chunk, short), min((place + 1) * chunk, short))
    return tuple(slices)
