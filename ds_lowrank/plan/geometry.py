"""Where the elements of a matrix lie in what a rank holds of it: integers and views, nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ds_lowrank.layouts.base import LayoutError, Piece


@dataclass(frozen=True)
class Box:
    """Rows [top, bottom) × columns [left, right) of W."""

    top: int
    bottom: int
    left: int
    right: int

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @cached_property
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


@dataclass(frozen=True)
class Part:
    """What one rank holds of one matrix W (m × n), and where in the 1-D memory of its piece of the parameter.

    Attributes:
        boxes: the elements, in the order of memory.
        origin: where in memory element (0, 0) of W is, or would be.
        stride: how far apart two rows of W lie in memory.
        run: the first and the last-plus-one of the row-major elements, where they are consecutive; ``None`` for a
            block of columns.
    """

    boxes: tuple[Box, ...]
    origin: int
    stride: int
    run: tuple[int, int] | None

    @property
    def numel(self) -> int:
        """Elements."""
        return sum(box.numel for box in self.boxes)

    def view(self, flat: Tensor, box: Box) -> Tensor:
        """The 2-D view of ``box``, a part of one of ``boxes``, in the 1-D memory ``flat`` of the piece."""
        offset = flat.storage_offset() + self.origin + box.top * self.stride + box.left
        return flat.as_strided(box.shape, (self.stride, 1), offset)


def matrix_shape(shape: tuple[int, ...], stacked: bool) -> tuple[int, int]:
    """(m, n) of the matrix, or of each of the stacked matrices, that a parameter of ``shape`` holds."""
    m, *rest = shape[1:] if stacked else shape
    return m, math.prod(rest)


def boxes_of(start: int, stop: int, columns: int) -> tuple[Box, ...]:
    """A run of row-major elements as at most three boxes: the end of a row, whole rows, the start of a row."""
    boxes = []
    at = start
    while at < stop:
        row, column = divmod(at, columns)
        if column or stop - at < columns:
            right = min(columns, column + stop - at)
            boxes.append(Box(row, row + 1, column, right))
            at += right - column
        else:
            bottom = stop // columns
            boxes.append(Box(row, bottom, 0, columns))
            at = bottom * columns
    return tuple(boxes)


def part_of(piece: Piece | None, shape: tuple[int, ...], index: int | None, name: str) -> Part | None:
    """The part of one matrix that a piece of its parameter holds.

    Args:
        piece: what the rank holds of the parameter.
        shape: the parameter's shape.
        index: which of the matrices stacked along the first dimension; ``None``: the parameter is one matrix, its
            trailing dimensions folded into columns.
        name: for the error.

    Returns:
        The part, ``None`` when the piece holds nothing of it.

    Raises:
        LayoutError: the parameter is sharded along a dimension that is folded into the columns.
    """
    if piece is None or piece.start >= piece.stop:
        return None
    m, n = matrix_shape(shape, index is not None)
    at = 0 if index is None else index
    if piece.dim is None:
        first = at * m * n
        start, stop = max(piece.start, first) - first, min(piece.stop, first + m * n) - first
        return Part(boxes_of(start, stop, n), first - piece.start, n, (start, stop)) if start < stop else None
    stacked = index is not None
    if piece.dim == 1 and stacked:  # the same rows of every stacked matrix
        rows = piece.stop - piece.start
        start, stop = piece.start * n, piece.stop * n
        return Part((Box(piece.start, piece.stop, 0, n),), at * rows * n - start, n, (start, stop))
    if piece.dim == (2 if stacked else 1):  # a block of columns
        inner = math.prod(shape[piece.dim + 1 :])
        left, right = piece.start * inner, piece.stop * inner
        return Part((Box(0, m, left, right),), at * m * (right - left) - left, right - left, None)
    raise LayoutError(
        f"{name} {shape} is sharded along dimension {piece.dim}, which is folded into the columns of its matrix: shard "
        f"it along dimension 0{' or 1' if stacked else ''}"
    )
