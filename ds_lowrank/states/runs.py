"""Blocks of a flattened parameter, of which a rank may hold any elements.

Blocks are counted from the parameter's first element, whoever holds it. What a rank holds are runs of elements, and a
run may begin or end within a block: such a block's scale is the largest number in all of its parts, so whoever has one
of them needs to hear of the others. All other blocks are one rank's own affair.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.states.blocks import BLOCK


@dataclass(frozen=True)
class Runs:
    """Equal runs of a flattened parameter, equally far apart, one after the other in a rank's memory.

    Each run has a row of slots, one for every block that it touches: what is kept once a block is kept by slot, and two
    runs that touch one block keep it twice.

    Attributes:
        first: place of the first run's first element in the parameter.
        width: elements a run.
        count: runs.
        stride: elements of the parameter from one run's beginning to the next one's.
        slots: slots a run; those behind its last block are not used.
    """

    first: int = 0
    width: int = 0
    count: int = 0
    stride: int = 0
    slots: int = 0

    @property
    def numel(self) -> int:
        """Elements in all runs."""
        return self.width * self.count

    @property
    def aligned(self) -> bool:
        """Whether all runs begin at the same place of a block."""
        return self.count == 1 or self.stride % BLOCK == 0

    def parts(self, most: int) -> Iterator[tuple[int, int, Runs]]:
        """Cut where no block is cut that was not before.

        Args:
            most: elements a part, a multiple of ``BLOCK``; runs of more are cut only where there is one.

        Yields:
            Elements before the part, slots before it, and the part.
        """
        if self.count == 1:
            at = 0
            while at < self.width:
                stop = min(self.width, (self.first + at + most) // BLOCK * BLOCK - self.first)
                before = (self.first + at) // BLOCK - self.first // BLOCK
                yield at, before, runs_from(self.first + at, stop - at)
                at = stop
            return
        step = max(1, most // max(1, self.width))
        for run in range(0, self.count, step):
            number = min(step, self.count - run)
            first = self.first + run * self.stride
            yield run * self.width, run * self.slots, Runs(first, self.width, number, self.stride, self.slots)

    def to_blocks(self, values: Tensor) -> Tensor:
        """Elements, 1-D, by slot: (count · slots) × ``BLOCK``, zero where a block's element is in no run."""
        rows, wide = values.view(self.count, self.width), self.slots * BLOCK
        if not self.aligned:
            padded = rows.new_zeros(self.count, wide).scatter_(1, self._columns(values.device), rows)
        elif wide == self.width:
            padded = rows
        else:
            offset = self.first % BLOCK
            padded = torch.nn.functional.pad(rows, (offset, wide - offset - self.width))
        return padded.reshape(-1, BLOCK)

    def from_blocks(self, blocks: Tensor) -> Tensor:
        """Inverse of :meth:`to_blocks`: 1-D."""
        padded = blocks.reshape(self.count, self.slots * BLOCK)
        if not self.aligned:
            return padded.gather(1, self._columns(blocks.device)).view(-1)
        offset = self.first % BLOCK
        return padded[:, offset : offset + self.width].reshape(-1)

    def _columns(self, device: torch.device) -> Tensor:
        starts = self.first + torch.arange(self.count, device=device) * self.stride
        return (starts % BLOCK)[:, None] + torch.arange(self.width, device=device)

    def used(self) -> tuple[Tensor, Tensor]:
        """Slots in use, ascending, and the block that each is for, int64."""
        starts = self.first + torch.arange(self.count) * self.stride
        first, last = starts // BLOCK, (starts + self.width - 1) // BLOCK
        blocks = first[:, None] + torch.arange(self.slots)
        inside = (blocks <= last[:, None]).view(-1)
        return inside.nonzero()[:, 0], blocks.view(-1)[inside]

    def edges(self) -> tuple[Tensor, Tensor]:
        """Slots of the blocks in which a run begins or ends, once a run, and those blocks, int64."""
        starts = self.first + torch.arange(self.count) * self.stride
        first, last = starts // BLOCK, (starts + self.width - 1) // BLOCK
        slots = torch.arange(self.count) * self.slots
        two = last != first
        return torch.cat([slots, (slots + last - first)[two]]), torch.cat([first, last[two]])


def runs_from(first: int, width: int, count: int = 1, stride: int = 0) -> Runs:
    """Runs with as many slots as the longest row of them needs; none where they are empty."""
    if not width * count:
        return Runs()
    # Where runs begin at different places of a block, the worst of them.
    offset = first % BLOCK if count == 1 or stride % BLOCK == 0 else BLOCK - 1
    return Runs(first, width, count, stride, (offset + width - 1) // BLOCK + 1)


def runs_of(start: int, stop: int, dim: int | None, shape: Sequence[int]) -> Runs:
    """Runs of a piece of a parameter.

    Args:
        start, stop, dim: see :class:`ds_lowrank.layouts.Piece`.
        shape: of the whole parameter.
    """
    if dim is None:
        return runs_from(start, stop - start)
    inner = math.prod(shape[dim + 1 :])
    return runs_from(start * inner, (stop - start) * inner, math.prod(shape[:dim]), shape[dim] * inner)


def cut_blocks(runs: Sequence[Runs]) -> Tensor:
    """Blocks of which more than one run has elements, ascending, int64.

    Args:
        runs: of all ranks that share a copy of a parameter.
    """
    numbers, counts = torch.cat([one.edges()[1] for one in runs]).unique(return_counts=True)
    return numbers[counts > 1]


@dataclass(frozen=True)
class Cut:
    """A rank's parts of cut blocks, k of them.

    Attributes:
        slots: where each one's scale is kept, k.
        numbers: which of the parameter's cut blocks each is a part of, k.
        elements: where its elements are in the rank's memory, those of all parts one after the other.
        places: where they are in a k × ``BLOCK`` matrix.
    """

    slots: Tensor
    numbers: Tensor
    elements: Tensor
    places: Tensor

    @classmethod
    def of(cls, runs: Runs, cut: Tensor) -> Cut:
        """The parts that ``runs`` have of ``cut``, a parameter's cut blocks."""
        slots, blocks = runs.edges()
        here = torch.isin(blocks, cut)
        slots, blocks = slots[here], blocks[here]
        numbers = torch.searchsorted(cut, blocks)
        run = slots // max(1, runs.slots)
        in_run = blocks[:, None] * BLOCK + torch.arange(BLOCK) - (runs.first + run * runs.stride)[:, None]
        held = (in_run >= 0) & (in_run < runs.width)
        elements = (in_run + (run * runs.width)[:, None])[held]
        return cls(slots, numbers, elements, held.view(-1).nonzero()[:, 0])

    def to(self, device: torch.device) -> Cut:
        """On another device."""
        return Cut(*(t.to(device) for t in (self.slots, self.numbers, self.elements, self.places)))

    def blocks(self, values: Tensor, fill: int = 0) -> Tensor:
        """The parts of these blocks among a rank's elements: k × ``BLOCK``, ``fill`` for what others hold."""
        found = values.new_full((len(self.slots) * BLOCK,), fill)
        return found.index_copy_(0, self.places, values[self.elements]).view(-1, BLOCK)

    def write(self, values: Tensor, blocks: Tensor) -> None:
        """Inverse of :meth:`blocks`, into the rank's elements."""
        values.index_copy_(0, self.elements, blocks.reshape(-1)[self.places])
