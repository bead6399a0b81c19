"""What a layout says: which flat pieces of which parameters this rank holds, and where they lie.

A layout knows one framework and no mathematics. Everything above it sees pieces: runs of elements of a parameter in
row-major order, with a 1-D view of the weights and one of the gradient. Nothing above assumes that the weights are a
slice of an fp32 master copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Group = dict[str, Any]


class LayoutError(RuntimeError):
    """The way the model is sharded is not supported, or is not what it seemed."""


@dataclass(frozen=True)
class Piece:
    """Elements ``[start, stop)`` of a row-major flattened parameter, held by this rank."""

    start: int
    stop: int


@dataclass(frozen=True)
class Member:
    """One parameter of the optimizer as the user gave it, before any sharding.

    Attributes:
        name: unique name.
        parameter: the model's own parameter object.
        shape: its shape at construction.
        group: index of its parameter group.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    group: int


@dataclass
class Ranks:
    """The data-parallel ranks over which a model is sharded.

    Attributes:
        process_group: ``None`` for one process.
        rank: this rank in the group.
        size: number of ranks in the group.
        device: where collectives and products run.
    """

    process_group: Any = None
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Layout(Protocol):
    """One framework's way of laying parameters out.

    Attributes:
        kind: name for humans, e.g. ``"ZeRO-2"``.
        ranks: who shares the model.
        pieces: parameter name -> the piece this rank holds; parameters of which it holds nothing are absent.
    """

    kind: str
    ranks: Ranks

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """This rank's pieces."""
        ...

    def weight(self, name: str) -> Tensor:
        """1-D view of the weights of this rank's piece; writing to it moves the model."""
        ...

    def grad(self, name: str) -> Tensor | None:
        """1-D view of the gradient of this rank's piece, or ``None`` where the framework gave none."""
        ...

    def flat_params(self, group: int) -> list[Tensor]:
        """The tensors that the framework put into parameter group ``group``."""
        ...

    def mismatch(self) -> str | None:
        """``None`` if every piece's weights equal the model's own, else what differs. No communication."""
        ...
