"""What a layout says: which pieces of which parameters this rank holds, and where they lie.

A layout knows one framework and no mathematics. Everything above it sees pieces: parts of a parameter, with a 1-D view
of the weights and one of the gradient. Nothing above assumes that the weights are a slice of an fp32 master copy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Group = dict[str, Any]


class LayoutError(RuntimeError):
    """The way the model is sharded is not supported, or is not what it seemed."""


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a parameter, in 1-D memory.

    Attributes:
        start, stop: without ``dim``, elements [start, stop) of the row-major flattened parameter; with it, the slice
            [start, stop) of that dimension, stored contiguously.
        dim: 1 or more; a slice of dimension 0 is a run of elements.
    """

    start: int
    stop: int
    dim: int | None = None


@dataclass(frozen=True)
class Member:
    """One parameter of the optimizer as the user gave it.

    Attributes:
        name: unique name.
        held: the model's own parameter object; replaced where a framework has swapped it for a sharded one. ``None``
            where it is not to be kept alive until then. (No weak reference: torch refuses to swap tensors that have
            one, which ``Module.to_empty`` does with DTensors.)
        shape: its whole shape.
        group: index of its parameter group.
    """

    name: str
    held: nn.Parameter | None
    shape: tuple[int, ...]
    group: int

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter.

        Raises:
            LayoutError: it was released, and the optimizer's groups have no other in its place.
        """
        if self.held is None:
            raise LayoutError(
                f"{self.name} {self.shape} was released for FSDP2 to shard it, but the optimizer's groups do not hold "
                "the sharded parameters"
            )
        return self.held


@dataclass
class Ranks:
    """The ranks that train one model on different data.

    Attributes:
        process_group: of all of them; ``None`` for one process or the default group.
        rank: this rank in the group.
        size: number of ranks in the group.
        device: where collectives and products run.
        copy_group: process group of the ranks over which one copy of the model is sharded, in the order of their
            ranks; the same as ``process_group`` unless the model is replicated as well (HSDP).
        copy: for every rank, which copy of the model it holds a part of; all zero without replication.
        replica_group: process group of the ranks that hold the same part of each copy; ``None`` without replication.
    """

    process_group: Any = None
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    copy_group: Any = None
    copy: tuple[int, ...] = ()
    replica_group: Any = None

    def __post_init__(self) -> None:
        if not self.copy:
            self.copy = (0,) * self.size
            self.copy_group = self.process_group

    @cached_property
    def shard_group(self) -> list[int]:
        """The ranks that share this rank's copy of the model, itself included, ascending."""
        return [k for k in range(self.size) if self.copy[k] == self.copy[self.rank]]


class Layout(Protocol):
    """One framework's way of laying parameters out.

    Attributes:
        kind: name for humans, e.g. ``"ZeRO-2"``.
        ranks: who shares the model.
        pieces: parameter name -> the piece this rank holds; parameters of which it holds nothing are absent.
        replicated: every rank holds every parameter whole, and the rows of matrices are to be dealt out over the ranks.
        steps_alone: a parameter may step as soon as it has its gradient.
        by_parameter: the optimizer's groups hold the model's own parameters, so that its saved state can have an entry
            for each of them; otherwise they hold flat buffers.
    """

    kind: str
    ranks: Ranks
    replicated: bool
    steps_alone: bool
    by_parameter: bool

    @property
    def copied(self) -> AbstractSet[str]:
        """Parameters of which :meth:`weight` has given a copy since the last :meth:`store`."""
        ...

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """This rank's pieces."""
        ...

    def weight(self, name: str) -> Tensor:
        """1-D view of the weights of this rank's piece; writing to it moves the model.

        Of a parameter whose memory is not row-major (``channels_last``, a transposed matrix) it is a copy, which moves
        the model at :meth:`store`.
        """
        ...

    def store(self, name: str, weights: Tensor) -> None:
        """Keep what was written into what :meth:`weight` gave; free where that was a view."""
        ...

    def grad(self, name: str) -> Tensor | None:
        """1-D view of the gradient of this rank's piece, or ``None`` where the framework gave none."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the weights that the optimizer is given for a parameter; the same on all ranks."""
        ...

    def gradient_dtype(self, name: str) -> torch.dtype:
        """Dtype in which the model computes a parameter's gradient; the same on all ranks.

        It may come in a wider one. Of autocast a layout knows nothing.
        """
        ...

    def unit(self, name: str) -> int:
        """Parameters with the same number step in the same call of ``step()``."""
        ...

    def place(self, name: str) -> tuple[Tensor, int]:
        """Where this rank's piece lies: the tensor of the optimizer's groups, and the offset in its flat memory."""
        ...

    def names_in(self, tensor: Tensor) -> list[str]:
        """Parameters of which elements lie, on some rank, in a tensor of the optimizer's groups.

        Raises:
            LayoutError: the tensor is none that was there when the layout was found.
        """
        ...

    def mismatch(self) -> str | None:
        """``None`` if every piece's weights equal the model's own, else what differs. No communication."""
        ...

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:
        """Gradients of some parameters before they are averaged.

        Raises:
            LayoutError: they cannot be had.
        """
        ...

    def checksums(self, what: str) -> dict[tuple[str, Any], Any] | None:
        """What must be equal on all ranks that have the same keys (parameter name and what is held of it).

        Of the ``"weights"``, or at the first step of the ``"gradients"`` (``None`` for a missing one). ``None`` where
        the layout makes no such promise.
        """
        ...


class LocalGradients(Protocol):
    """Whole gradients of this rank, before anything averages them: of its own part of the batch."""

    def hook(
        self,
        names: Sequence[str],
        ready: Callable[[str, Tensor], None],
        absent: Callable[[Sequence[str]], None],
    ) -> None:
        """From now on call ``ready(name, gradient)`` once in a backward pass, and leave no gradient behind.

        Args:
            names: of parameters.
            ready: a bound method; ``gradient`` has the parameter's whole shape.
            absent: a bound method, told during a backward pass which parameters will have no gradient in it, before
                this rank waits for one that waits for them.
        """
        ...

    def syncs(self) -> bool:
        """Whether the framework averages gradients in the backward pass that runs now."""
        ...

    def wire_dtype(self, name: str) -> torch.dtype:
        """Dtype in which the framework would send a parameter's gradient."""
        ...

    def trained(self, name: str) -> bool:
        """Whether a parameter is to have gradients: it is not frozen."""
        ...


class ParameterLayout(Layout, Protocol):
    """A layout whose optimizer groups hold the model's own parameters (``by_parameter``), DTensors perhaps."""

    def shard_dim(self, name: str) -> int | None:
        """Dimension along which a parameter is cut as ``torch.chunk`` cuts it; ``None`` where ranks hold it whole."""
        ...

    def distribute(self, local: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:
        """The tensor of ``shape`` of which ``local`` is this rank's chunk along ``dim``; no communication."""
        ...

    def local(self, tensor: Tensor, dim: int) -> tuple[Tensor, bool]:
        """Inverse of :meth:`distribute`; a tensor that is whole on every rank comes back as it is, with ``True``."""
        ...


class Tensors:
    """Which parameters lie in which tensors of the optimizer's groups."""

    def __init__(self) -> None:
        self._names: dict[int, list[str]] = {}

    def add(self, tensor: Tensor, name: str) -> None:
        """Note that elements of ``name`` lie in ``tensor``."""
        self._names.setdefault(id(tensor), []).append(name)

    def names_in(self, tensor: Tensor) -> list[str]:
        """See :meth:`Layout.names_in`."""
        if id(tensor) not in self._names:
            raise LayoutError(
                f"a parameter of shape {tuple(tensor.shape)} was put into the optimizer after the layout was found "
                "(the first step): prepare model and optimizer first"
            )
        return self._names[id(tensor)]


def is_replicated(layout: Layout, name: str) -> bool:
    """Whether every rank holds a parameter whole; layouts in which that is so of some have a method of this name."""
    asked = getattr(layout, "is_replicated", None)
    return layout.replicated if asked is None else asked(name)


def is_outside(layout: Layout, name: str) -> bool:
    """Whether a parameter is in no tensor of the framework's, where others lie in flat buffers."""
    asked = getattr(layout, "is_outside", None)
    return asked is not None and asked(name)


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, without importing what takes half as long as torch does: who has one has it imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The memory on this rank of tensors that may be DTensors."""
    return [t.to_local() if is_dtensor(t) else t for t in tensors]  # type: ignore[attr-defined]


def checksum(tensor: Tensor) -> int:
    """Sum of the bits of a contiguous tensor as whole numbers: exact, whatever the order, the device and the values."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return int(tensor.detach().view(kinds[tensor.element_size()]).sum(dtype=torch.int64))


def same_device(members: Mapping[str, Tensor]) -> torch.device:
    """The one device of some tensors.

    Raises:
        LayoutError: there are several, or it is the meta device.
    """
    devices = {t.device for t in members.values()}
    if len(devices) != 1:
        raise LayoutError(f"the parameters lie on several devices ({', '.join(map(str, devices))}): use one device")
    device = devices.pop()
    if device.type == "meta":
        raise LayoutError(
            "the parameters are on the meta device: materialise them first (model.to_empty(device=...), then their "
            "initialisation)"
        )
    return device
