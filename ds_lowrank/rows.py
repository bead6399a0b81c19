"""RowPlan: pieces <-> rows of A.

A step is independent per row of A (the tall view of a weight), so whoever holds whole rows can do the work. The plan
says which rows each rank computes and what has to move for it. It is made once, from the layout alone, and is the same
on all ranks.

    one rank holds the matrix        its rows are a view of the piece: no copy, no traffic
    A = W, cut by a boundary         a row belongs to the rank that holds its first element; only the rows that a
                                     boundary cuts mid-way move
    A = Wᵀ, cut by a boundary        a piece holds columns of A: rows of A are dealt out in proportion to the pieces,
                                     one all-to-all turns pieces into rows, another brings the updates back
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.comm import Comm
from ds_lowrank.layouts.base import LayoutError, Piece
from ds_lowrank.subspace.sides import Side, as_rows


@dataclass(frozen=True)
class Box:
    """Rows [top, bottom) × columns [left, right) of W."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def numel(self) -> int:
        """Elements."""
        return (self.bottom - self.top) * (self.right - self.left)

    def meet(self, other: Box) -> Box | None:
        """The common part, ``None`` when empty."""
        box = Box(
            max(self.top, other.top),
            min(self.bottom, other.bottom),
            max(self.left, other.left),
            min(self.right, other.right),
        )
        return box if box.top < box.bottom and box.left < box.right else None


def boxes_of(piece: Piece, columns: int) -> list[Box]:
    """A run of row-major elements as at most three boxes: the end of a row, whole rows, the start of a row."""
    boxes = []
    at = piece.start
    while at < piece.stop:
        row, column = divmod(at, columns)
        if column or piece.stop - at < columns:
            right = min(columns, column + piece.stop - at)
            boxes.append(Box(row, row + 1, column, right))
            at += right - column
        else:
            bottom = piece.stop // columns
            boxes.append(Box(row, bottom, 0, columns))
            at = bottom * columns
    return boxes


def view_of(flat: Tensor, piece: Piece, box: Box, columns: int) -> Tensor:
    """The 2-D view of ``box`` (inside ``piece``) in the piece's 1-D memory."""
    offset = flat.storage_offset() + box.top * columns + box.left - piece.start
    return flat.as_strided(box.shape, (columns, 1), offset)


@dataclass(frozen=True)
class Share:
    """What one rank computes of one matrix: the rows [start, stop) of A, in this order.

    Attributes:
        start, stop: the rows.
        view: the leading rows, as the box of W where they lie in this rank's own piece.
        buffer: the rows after them, as the box of W that has to be brought together from several pieces.
    """

    start: int
    stop: int
    view: Box | None
    buffer: Box | None

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.start


@dataclass(frozen=True)
class MatrixPlan:
    """One projected matrix: what it is, who holds and who computes which part of it.

    Attributes:
        name, shape, side, rank: parameter name, (m, n), side of the projection, r.
        phase, gap: refresh schedule.
        group: index of its parameter group.
        pieces: for each rank, the elements it holds.
        shares: for each rank, the rows of A it computes.
        owner: the rank that decomposes it.
    """

    name: str
    shape: tuple[int, int]
    side: Side
    rank: int
    phase: int
    gap: int
    group: int
    pieces: tuple[Piece | None, ...]
    shares: tuple[Share | None, ...]
    owner: int = -1

    @property
    def short(self) -> int:
        """Length of the projected dimension."""
        return self.shape[1] if self.side == "right" else self.shape[0]

    @property
    def computing(self) -> list[int]:
        """Ranks that compute rows of it."""
        return [k for k, share in enumerate(self.shares) if share is not None]

    @property
    def cut(self) -> bool:
        """Whether more than one rank holds elements of it: then, and only then, something moves."""
        return sum(piece is not None for piece in self.pieces) > 1


def plan_shares(
    shape: tuple[int, int], side: Side, pieces: Sequence[Piece | None], name: str
) -> tuple[Share | None, ...]:
    """Decide which rows of A each rank computes.

    Raises:
        LayoutError: the pieces leave a gap, overlap, or are not in rank order.
    """
    m, n = shape
    held = [p for p in pieces if p is not None]
    ends = [0, *(p.stop for p in held)]
    if [p.start for p in held] != ends[:-1] or ends[-1] != m * n:
        raise LayoutError(
            f"{name} {shape}: the pieces of the ranks do not cover it once and in order: "
            + ", ".join(f"rank {k} [{p.start}, {p.stop})" for k, p in enumerate(pieces) if p is not None)
        )
    if len(held) == 1:
        whole = Box(0, m, 0, n)
        long = m if side == "right" else n
        return tuple(None if p is None else Share(0, long, whole, None) for p in pieces)
    return tuple(
        None if p is None else (_rows_share(p, n) if side == "right" else _columns_share(p, m, n)) for p in pieces
    )


def _rows_share(piece: Piece, n: int) -> Share | None:
    """Rows of W whose first element lies in the piece; the last of them may end in another rank's."""
    start, stop = -(-piece.start // n), -(-piece.stop // n)
    whole = max(start, piece.stop // n)
    if start == stop:
        return None
    return Share(
        start,
        stop,
        Box(start, whole, 0, n) if start < whole else None,
        Box(whole, stop, 0, n) if whole < stop else None,
    )


def _columns_share(piece: Piece, m: int, n: int) -> Share | None:
    """Columns of W in proportion to the piece: boundaries at ⌊n · elements before / all elements⌋."""
    start, stop = piece.start * n // (m * n), piece.stop * n // (m * n)
    return Share(start, stop, None, Box(0, m, start, stop)) if start < stop else None


class Rows:
    """Moves gradients to where their rows are computed and updates back to where the weights lie.

    Args:
        comm: the collectives.
    """

    def __init__(self, comm: Comm):
        self._comm = comm
        self._rank = comm.ranks.rank

    def collect(
        self, plans: Sequence[MatrixPlan], piece_of: Callable[[str], Tensor], dtype: torch.dtype
    ) -> dict[str, list[Tensor]]:
        """Bring the rows of A together that this rank computes. Collective when one of ``plans`` is cut.

        Args:
            plans: the matrices of this call, the same on all ranks.
            piece_of: 1-D gradient of this rank's piece of the named parameter.
            dtype: dtype on the wire and of what arrives.

        Returns:
            name -> blocks of rows of A (rows × short each), the view first, then the buffer.
        """
        buffers = self._move(
            plans,
            source=lambda plan, rank: _piece_boxes(plan, rank),
            target=lambda plan, rank: _buffer_boxes(plan, rank),
            read=lambda plan, box: self._piece_view(plan, piece_of, box),
            dtype=dtype,
            purpose="gradient rows",
        )
        blocks: dict[str, list[Tensor]] = {}
        for plan in plans:
            share = plan.shares[self._rank]
            if share is None:
                continue
            parts = [] if share.view is None else [self._piece_view(plan, piece_of, share.view)]
            if share.buffer is not None:
                whole = torch.empty(share.buffer.shape, dtype=dtype, device=self._comm.ranks.device)
                for box, values in buffers[plan.name]:
                    _inside(whole, share.buffer, box).copy_(values.view(box.shape))
                parts.append(whole)
            blocks[plan.name] = [as_rows(part, plan.side) for part in parts]
        return blocks

    def deliver(
        self,
        plans: Sequence[MatrixPlan],
        updates: Mapping[str, Tensor],
        piece_of: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Add the updates of buffered rows to the weights of the pieces they came from. Collective as ``collect``.

        Args:
            plans: as given to :meth:`collect`.
            updates: name -> what is added to the buffered box, in W's orientation; a missing name adds nothing.
            piece_of: 1-D weights of this rank's piece of the named parameter.
            dtype: dtype on the wire.
        """

        def read(plan: MatrixPlan, box: Box) -> Tensor:
            share = plan.shares[self._rank]
            assert share is not None
            assert share.buffer is not None
            update = updates.get(plan.name)
            if update is None:
                return torch.zeros(box.shape, dtype=dtype, device=self._comm.ranks.device)
            return _inside(update, share.buffer, box)

        arrived = self._move(
            plans,
            source=lambda plan, rank: _buffer_boxes(plan, rank),
            target=lambda plan, rank: _piece_boxes(plan, rank),
            read=read,
            dtype=dtype,
            purpose="updates",
        )
        for plan in plans:
            for box, values in arrived.get(plan.name, []):
                weights = self._piece_view(plan, piece_of, box)
                weights.add_(values.view(box.shape).to(weights.device))

    def _piece_view(self, plan: MatrixPlan, piece_of: Callable[[str], Tensor], box: Box) -> Tensor:
        piece = plan.pieces[self._rank]
        assert piece is not None
        return view_of(piece_of(plan.name), piece, box, plan.shape[1])

    def _move(
        self,
        plans: Sequence[MatrixPlan],
        source: Callable[[MatrixPlan, int], list[Box]],
        target: Callable[[MatrixPlan, int], list[Box]],
        read: Callable[[MatrixPlan, Box], Tensor],
        dtype: torch.dtype,
        purpose: str,
    ) -> dict[str, list[tuple[Box, Tensor]]]:
        """Send every part of my ``source`` boxes to the ranks whose ``target`` boxes contain it."""
        moving = [p for p in plans if any(share is not None and share.buffer for share in p.shares)]
        if not moving:
            return {}
        everyone = range(self._comm.ranks.size)
        send = [[read(p, box) for p in moving for box in _meets(source(p, self._rank), target(p, k))] for k in everyone]
        coming = [[(p, box) for p in moving for box in _meets(source(p, k), target(p, self._rank))] for k in everyone]
        arrived = self._comm.exchange(send, [sum(b.numel for _, b in c) for c in coming], dtype, purpose)
        boxes: dict[str, list[tuple[Box, Tensor]]] = {}
        for parts, values in zip(coming, arrived):
            for (plan, box), part in zip(parts, values.split([b.numel for _, b in parts])):
                boxes.setdefault(plan.name, []).append((box, part))
        return boxes


def _piece_boxes(plan: MatrixPlan, rank: int) -> list[Box]:
    piece = plan.pieces[rank]
    return [] if piece is None else boxes_of(piece, plan.shape[1])


def _buffer_boxes(plan: MatrixPlan, rank: int) -> list[Box]:
    share = plan.shares[rank]
    return [] if share is None or share.buffer is None else [share.buffer]


def _meets(some: list[Box], others: list[Box]) -> list[Box]:
    return [box for a in some for b in others if (box := a.meet(b)) is not None]


def _inside(whole: Tensor, frame: Box, box: Box) -> Tensor:
    """The part ``box`` of a tensor that covers ``frame``."""
    return whole[box.top - frame.top : box.bottom - frame.top, box.left - frame.left : box.right - frame.left]
