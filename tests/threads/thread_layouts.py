"""What a framework gives to each rank, without the framework: pieces as ``layouts/cuts.py`` cuts them, plain tensors.

A layout is made of a model of whole parameters and of the optimizer's groups, and puts into these what the framework
would: a flat partition a group (ZeRO-1/2), flat sub-groups (ZeRO-3), shards (FSDP2, HSDP), or nothing (DDP).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from thread_ranks import Group, gather_objects, this_rank
from torch import Tensor, nn

from ds_lowrank.layouts.base import LayoutError, Member, Piece, Ranks, Tensors, checksum
from ds_lowrank.layouts.cuts import chunk_piece, flat_pieces, flat_size, slice_piece, sub_groups
from ds_lowrank.layouts.ddp import ReplicatedLayout
from ds_lowrank.layouts.hooks import WholeGradients

Shape = tuple[int, ...]
# What ZeRO-1 gives to a rank is what ZeRO-2 gives.
FLAT = ("zero2", "zero3")
SHARDED = ("fsdp2", "hsdp")
LAYOUTS = ("ddp", *FLAT, *SHARDED)
KINDS = {"zero2": "ZeRO-1/2", "zero3": "ZeRO-3", "fsdp2": "FSDP2", "hsdp": "HSDP"}
SUB_GROUP = 1_500  # elements of a rank: several sub-groups


def ranks_of(layout: str, size: int) -> Ranks:
    """Numbers and groups of this rank; HSDP is in two copies, of which an even and an odd rank are neighbours."""
    rank = this_rank()
    everyone = Group(tuple(range(size)))
    if layout != "hsdp" or size % 2:
        return Ranks(everyone, rank, size)
    copy = tuple(k % 2 for k in range(size))
    copy_group = tuple(k for k in range(size) if copy[k] == copy[rank])
    replicas = tuple(k for k in range(size) if k // 2 == rank // 2)
    return Ranks(everyone, rank, size, copy_group=Group(copy_group), copy=copy, replica_group=Group(replicas))


def copies_of(layout: str, size: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of each copy of the model; one copy, but for HSDP."""
    count = 2 if layout == "hsdp" and size % 2 == 0 else 1
    return tuple(tuple(range(first, size, count)) for first in range(count))


def place_model(layout: str, size: int, model: nn.Module, optimizer: Any, **options: Any) -> Any:
    """A layout of this rank; the optimizer's groups are filled, and the model sharded, as the framework does it.

    Args:
        layout: one of ``LAYOUTS``, or ``one``.
        size: number of ranks.
        model: whole on every rank.
        optimizer: made of its parameters.
        options: of :class:`CutLayout`.
    """
    if layout in ("one", "ddp"):
        return WholeLayout(optimizer.members, ranks_of(layout, size))
    return CutLayout(layout, optimizer.members, optimizer.param_groups, ranks_of(layout, size), **options)


class Chunk(Tensor):
    """In the place of a DTensor: what this rank has of a tensor of ``shape_cut``, which is cut along ``dim_cut``."""

    shape_cut: Shape
    dim_cut: int


class WholeLayout(ReplicatedLayout):
    """DDP, on threads. Keeps up with parameters that are added."""

    def __init__(self, members: Sequence[Member], ranks: Ranks):
        super().__init__(members)
        self.ranks = ranks
        self.replicated = ranks.size > 1
        self.kind = "DDP" if self.replicated else "one process"

    syncing = True  # in the backward pass that runs now

    def local_gradients(self, names: Sequence[str]) -> WholeGradients:
        parameters = {name: self._members[name].parameter for name in names}
        return WholeGradients(parameters, lambda: self.syncing, self.wire)

    def leaf(self, name: str) -> Tensor:
        """What a backward pass of this rank's own gives a whole gradient to."""
        return self._members[name].parameter

    wire: torch.dtype | None = None

    def renewed(self, members: Sequence[Member], groups: Sequence[dict[str, Any]]) -> WholeLayout:
        return WholeLayout(members, self.ranks)

    def fill_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, gradient in gradients.items():
            self._members[name].parameter.grad = None if gradient is None else gradient.clone()

    @contextmanager
    def calls(self, optimizer: Any) -> Iterator[list[Any]]:
        yield [None]

    def to_whole(self, name: str, local: Tensor) -> Tensor:
        return local

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor

    def to_local(self, name: str, whole: Tensor) -> Tensor:
        return whole


class OwnGradients(WholeGradients):
    """Of leaves that stand for parameters, which say what is frozen."""

    def __init__(self, leaves: Mapping[str, Tensor], parameters: Mapping[str, Tensor], *options: Any):
        super().__init__(leaves, *options)
        self._of = parameters

    def trained(self, name: str) -> bool:
        return self._of[name].requires_grad


class CutLayout:
    """ZeRO-1/2, ZeRO-3, FSDP2 and HSDP. See :class:`ds_lowrank.layouts.base.Layout`.

    Args:
        layout: one of ``FLAT`` or ``SHARDED``.
        members: of the optimizer, their parameters whole.
        groups: of the optimizer; changed.
        ranks: of this run.
        columns: FSDP2 shards wide matrices along the side that suits the projection.
        dtype: of flat masters; default: the parameters'.
        gradient_dtype: in which the model computes.
        apart: full-rank parameters are saved as torch saves them, by their shards.
    """

    copied: frozenset[str] = frozenset()  # every piece is given as a view
    syncing = True  # in the backward pass that runs now
    wire: torch.dtype | None = None

    def __init__(
        self,
        layout: str,
        members: Sequence[Member],
        groups: Sequence[dict[str, Any]],
        ranks: Ranks,
        columns: bool = False,
        dtype: torch.dtype | None = None,
        gradient_dtype: torch.dtype | None = None,
        apart: bool = True,
    ):
        self.name, self.kind, self.ranks = layout, KINDS[layout], ranks
        self.replicated = False
        self.steps_alone = self.by_parameter = layout in SHARDED
        self._columns, self._dtype, self._gradient_dtype, self._apart = columns, dtype, gradient_dtype, apart
        self._members = {m.name: m for m in members}
        self._tensors = Tensors()
        self.pieces: dict[str, Piece] = {}
        self._places: dict[str, tuple[Tensor, int]] = {}
        self._leaves: dict[str, Tensor] = {}
        self._units: dict[str, int] = {}
        self._groups = groups
        self._shard_group = ranks.shard_group
        self._number = self._shard_group.index(ranks.rank)
        by_group: dict[int, dict[str, Shape]] = {}
        for m in members:
            by_group.setdefault(m.group, {})[m.name] = m.shape
        place = {"zero3": self._place_sub_groups, "fsdp2": self._shard, "hsdp": self._shard}.get(layout)
        (place or self._place_partitions)(by_group)

    def renewed(self, members: Sequence[Member], groups: Sequence[dict[str, Any]]) -> CutLayout:
        if self.name in FLAT:
            return self
        return CutLayout(
            self.name, members, groups, self.ranks, self._columns, self._dtype, self._gradient_dtype, self._apart
        )

    # -- what the frameworks make of groups ---------------------------------------------------------------------------

    def _place_partitions(self, by_group: Mapping[int, dict[str, Shape]]) -> None:
        """ZeRO-1/2: a group's flat buffer, in equal parts."""
        size, rank = len(self._shard_group), self._number
        for index, shapes in by_group.items():
            partition = flat_size(sum(map(math.prod, shapes.values())), size) // size
            pieces = flat_pieces(shapes, size)[rank]
            flat = self._flat(partition, next(iter(shapes)))
            first = 0
            for name, shape in shapes.items():
                self._units[name] = index
                if name in pieces:
                    self._put(name, pieces[name], flat, first + pieces[name].start - rank * partition)
                else:
                    self._places[name] = (flat, -1)
                self._tensors.add(flat, name)
                first += math.prod(shape)
            self._groups[index]["params"] = [flat]

    def _place_sub_groups(self, by_group: Mapping[int, dict[str, Shape]]) -> None:
        """ZeRO-3: the slices of a sub-group's parameters, one after the other."""
        size, rank, before = len(self._shard_group), self._number, 0
        for index, shapes in by_group.items():
            shares = [-(-math.prod(shape) // size) for shape in shapes.values()]
            numbers = sub_groups(shares, SUB_GROUP)
            flats = []
            for number in range(numbers[-1] + 1):
                inside = [place for place, n in enumerate(numbers) if n == number]
                names = [list(shapes)[place] for place in inside]
                flat = self._flat(sum(shares[place] for place in inside), names[0])
                offset = 0
                for name, place in zip(names, inside):
                    piece = slice_piece(math.prod(shapes[name]), shares[place], rank)
                    self._units[name] = before + number
                    self._places[name] = (flat, offset)
                    if piece.start < piece.stop:
                        self._put(name, piece, flat, offset)
                    self._tensors.add(flat, name)
                    offset += shares[place]
                flats.append(flat)
            before += numbers[-1] + 1
            self._groups[index]["params"] = flats

    def _shard(self, by_group: Mapping[int, dict[str, Shape]]) -> None:
        """FSDP2: the model's parameters become shards; ``ds_shape`` says what a DTensor's shape would."""
        for shapes in by_group.values():
            for name, shape in shapes.items():
                parameter: Any = self._members[name].parameter
                piece = chunk_piece(shape, self._dim(name), len(self._shard_group), self._number)
                if not hasattr(parameter, "ds_shape"):
                    parameter.ds_shape = torch.Size(shape)
                    parameter.data = _cut(parameter.data, piece, self._dim(name))
                self._units[name] = 0
                self._places[name] = (parameter, 0)
                self._tensors.add(parameter, name)
                if piece.start < piece.stop:
                    self.pieces[name] = piece

    def _dim(self, name: str) -> int:
        *_, m, n = (1, *self._members[name].shape)
        stacked = len(self._members[name].shape) == 3
        wide = self._columns and len(self._members[name].shape) in (2, 3) and m < n and n % len(self._shard_group) == 0
        return (2 if stacked else 1) if wide else 0

    def _flat(self, numel: int, name: str) -> nn.Parameter:
        return nn.Parameter(torch.zeros(numel, dtype=self._dtype or self._members[name].parameter.dtype))

    def _put(self, name: str, piece: Piece, flat: Tensor, offset: int) -> None:
        self.pieces[name], self._places[name] = piece, (flat, offset)
        whole = self._members[name].parameter.data.reshape(-1)
        flat.data[offset : offset + piece.stop - piece.start].copy_(whole[piece.start : piece.stop])

    # -- what a run does ----------------------------------------------------------------------------------------------

    def fill_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        """This rank's parts of whole gradients; of flat buffers a missing one is zero."""
        for tensor in {id(t): t for t, _ in self._places.values()}.values():
            tensor.grad = None if self.by_parameter else torch.zeros_like(tensor)
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            if self.by_parameter:
                self._places[name][0].grad = self.to_local(name, gradient).to(self.dtype(name))
            elif name in self.pieces:
                grad = self.grad(name)
                assert grad is not None
                grad.copy_(gradient.reshape(-1)[self.pieces[name].start : self.pieces[name].stop])

    @contextmanager
    def calls(self, optimizer: Any) -> Iterator[Iterator[None]]:
        """The calls of ``step()`` that make a step, with the groups cut as DeepSpeed cuts them."""
        groups = optimizer.param_groups
        held = [group["params"] for group in groups]

        def each() -> Iterator[None]:
            if self.by_parameter:
                yield None
            elif self.name != "zero3":
                for group in groups:
                    optimizer.param_groups = [group]
                    yield None
            else:
                for group in groups:
                    group["params"] = []
                for group, flats in zip(groups, held):
                    for flat in flats:
                        group["params"] = [flat]
                        yield None
                    group["params"] = []

        try:
            yield each()
        finally:
            optimizer.param_groups = groups
            for group, params in zip(groups, held):
                group["params"] = params

    def to_local(self, name: str, whole: Tensor) -> Tensor:
        """This rank's shard of a tensor of a parameter's shape."""
        dim = self._dim(name)
        piece = chunk_piece(self._members[name].shape, dim, len(self._shard_group), self._number)
        return _cut(whole.view(self._members[name].shape), piece, dim)

    def to_whole(self, name: str, local: Tensor) -> Tensor:
        """Inverse of :meth:`to_local`. Collective over a copy of the model."""
        return self.whole(self.distribute(local, self._members[name].shape, self._dim(name)))

    def whole(self, tensor: Tensor) -> Tensor:
        """What :meth:`distribute` has made, on every rank. Collective over a copy of the model."""
        if not isinstance(tensor, Chunk):
            return tensor
        parts = gather_objects(tensor.as_subclass(Tensor), self.ranks.copy_group)
        return torch.cat(parts, tensor.dim_cut).view(tensor.shape_cut)

    def local_gradients(self, names: Sequence[str]) -> WholeGradients:
        """Of what FSDP2 makes whole for a forward and a backward pass."""
        for name in names:
            like = self._members[name]
            self._leaves[name] = nn.Parameter(torch.zeros(like.shape, dtype=like.parameter.dtype))
        self._trained = {name: self._members[name].parameter for name in names}
        return OwnGradients(self._leaves, self._trained, lambda: self.syncing, self.wire)

    def leaf(self, name: str) -> Tensor:
        return self._leaves[name]

    # -- Layout -------------------------------------------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        tensor, offset = self._places[name]
        return tensor.data.view(-1).narrow(0, offset, self._numel(name))

    def store(self, name: str, weights: Tensor) -> None:
        pass

    def grad(self, name: str) -> Tensor | None:
        tensor, offset = self._places[name]
        return None if tensor.grad is None else tensor.grad.view(-1).narrow(0, offset, self._numel(name))

    def _numel(self, name: str) -> int:
        piece, shape = self.pieces[name], self._members[name].shape
        if piece.dim is None:
            return piece.stop - piece.start
        return math.prod(shape) // shape[piece.dim] * (piece.stop - piece.start)

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name][0].dtype

    def gradient_dtype(self, name: str) -> torch.dtype:
        return self._gradient_dtype or self.dtype(name)

    def unit(self, name: str) -> int:
        return self._units[name]

    def place(self, name: str) -> tuple[Tensor, int]:
        return self._places[name]

    def names_in(self, tensor: Tensor) -> list[str]:
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:
        if self.by_parameter:
            return None
        for name, piece in self.pieces.items():
            model = self._members[name].parameter.data.reshape(-1)[piece.start : piece.stop]
            if not torch.equal(self.weight(name).to(model.dtype), model):
                return f"{name}: the flat buffer does not hold its weights"
        return None

    def checksums(self, what: str) -> dict[tuple[str, Any], Any] | None:
        if what != "weights" or len(set(self.ranks.copy)) == 1:
            return None
        return {(name, piece): checksum(self.weight(name)) for name, piece in self.pieces.items()}

    def shard_dim(self, name: str) -> int | None:
        if self._apart and "rank" not in self._groups[self._members[name].group]:
            return None  # its state lies on a plain tensor, and not on a DTensor that says how it is cut
        return self._dim(name)

    def distribute(self, local: Tensor, shape: Shape, dim: int) -> Tensor:
        chunk = local.detach().as_subclass(Chunk)
        chunk.shape_cut, chunk.dim_cut = tuple(shape), dim
        return chunk

    def local(self, tensor: Tensor, dim: int) -> tuple[Tensor, bool]:
        return tensor, True


def _cut(whole: Tensor, piece: Piece, dim: int) -> Tensor:
    if dim:
        return whole.narrow(dim, piece.start, piece.stop - piece.start).contiguous()
    row = math.prod(whole.shape[1:])
    return whole[piece.start // row : piece.stop // row].clone() if row else whole.clone()


def substitute_layouts(find: Any, real: Any) -> Any:
    """A ``find_layout`` that gives what ``find`` has for this rank's members, and elsewhere what ``real`` finds."""

    def find_layout(members: Sequence[Member], groups: Sequence[dict[str, Any]]) -> tuple[Any, list[Member]]:
        layout = find(members, groups)
        if layout is None:
            return real(members, groups)
        missing = [m.name for m in members if m.name not in layout._members]
        if missing:
            raise LayoutError(f"{missing[0]} was added after the flat buffers were made")
        return layout, list(members)

    return find_layout
