"""FSDP2 (``fully_shard``): every parameter a DTensor, sharded along one dimension; HSDP: replicated as well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from ds_lowrank.layouts.base import LayoutError, LocalGradients, Member, Piece, Ranks, Tensors, checksum, same_device
from ds_lowrank.layouts.cuts import chunk_piece
from ds_lowrank.layouts.fsdp_gradients import UnshardedGradients, param_groups
from ds_lowrank.subspace.sides import projected_side


def long_side_placement(
    ranks: int, proj_type: str = "std", min_numel: int = 1 << 16
) -> Callable[[nn.Parameter], Shard | None]:
    """``shard_placement_fn`` for ``fully_shard`` that shards matrices along the side that is kept whole per row.

    A wide matrix (m < n) sharded by rows costs an all-to-all of its gradient and one of its update in every step;
    sharded by columns it costs nothing.

    Args:
        ranks: how many ranks a parameter is sharded over; FSDP2 needs an even split along dimension 1.
        proj_type: as in :class:`ds_lowrank.LowRankConfig`.
        min_numel: smaller parameters keep FSDP2's default.

    Returns:
        A function of a parameter: ``Shard(1)`` for matrices whose columns are the rows of A and divide by ``ranks``
        (``Shard(2)`` for stacked experts), ``None`` (the default, ``Shard(0)``) for all others. Stacked matrices
        that divide by ``ranks`` keep the default: whole ones cost nothing at all.

    Example::

        fully_shard(layer, mesh=mesh, shard_placement_fn=ds_lowrank.long_side_placement(mesh.size()))
    """

    def place(parameter: nn.Parameter) -> Shard | None:
        shape = tuple(parameter.shape)
        if parameter.numel() < min_numel or len(shape) not in (2, 3):
            return None
        stacked = len(shape) == 3
        if stacked and shape[0] % ranks == 0:
            return None
        m, n = shape[-2:]
        if projected_side((m, n), proj_type) == "left":
            return Shard(len(shape) - 1) if n % ranks == 0 else None
        return Shard(1) if stacked and m % ranks == 0 else None

    return place


class Fsdp2Layout:
    """Local shards of DTensors.

    A parameter without a gradient on this rank counts as a zero gradient where its rows are shared: ranks may differ
    in what has one, and the collectives must not.
    """

    steps_alone = True
    by_parameter = True

    def __init__(self, members: Sequence[Member]):
        self._tensors = Tensors()
        self._parameters: dict[str, Any] = {}
        self.replicated = False
        self.copied: frozenset[str] = frozenset()
        self.pieces: dict[str, Piece] = {}
        first = next(m.parameter for m in members if isinstance(m.parameter, DTensor))
        mesh = first.device_mesh
        for m in members:
            parameter = m.parameter
            if not isinstance(parameter, DTensor):
                raise LayoutError(
                    f"{m.name} {m.shape} is not sharded (no DTensor) while others are: nobody averages its gradient. "
                    "Apply fully_shard to the root module too, and leave no trained parameter out of it"
                )
            if parameter.device_mesh != mesh:
                raise LayoutError(
                    f"{m.name} {m.shape} is sharded over another device mesh than {members[0].name}: expert and tensor "
                    "parallelism are not supported beside FSDP2. Use one mesh for all parameters"
                )
            self._parameters[m.name] = parameter
            self._tensors.add(parameter, m.name)
            piece = _piece(m, parameter.placements)
            if piece.start < piece.stop:
                self.pieces[m.name] = piece
        self._gradient_dtypes = _mixed_precision()
        self._mesh: Any = mesh
        same_device({name: p.to_local() for name, p in self._parameters.items()})
        self.ranks = _ranks(mesh)
        self.kind = "FSDP2" if mesh.ndim == 1 else f"HSDP ({mesh.size(0)} x {mesh.size(1)})"

    def weight(self, name: str) -> Tensor:  # noqa: D102
        return _flat(self._parameters[name].detach().to_local())

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        pass

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        grad = self._parameters[name].grad
        return None if grad is None else _local(grad).contiguous().view(-1)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._parameters[name].dtype

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._gradient_dtypes.get(id(self._parameters[name]), self._parameters[name].dtype)

    def unit(self, name: str) -> int:  # noqa: D102
        return 0

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        return self._parameters[name], 0

    def shard_dim(self, name: str) -> int:  # noqa: D102
        return self._parameters[name].placements[-1].dim

    def distribute(self, local: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:  # noqa: D102
        # The shape is given: from_local would take it that all ranks hold as much as this one.
        stride = torch.empty(shape, device="meta").stride()
        placements = self._placements(dim)
        return DTensor.from_local(
            local.contiguous(), self._mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
        )

    def local(self, tensor: Tensor, dim: int) -> tuple[Tensor, bool]:  # noqa: D102
        if not isinstance(tensor, DTensor):
            return tensor, True
        return tensor.redistribute(self._mesh, self._placements(dim)).to_local(), False

    def _placements(self, dim: int) -> list[Placement]:
        return [*[Replicate()] * (self._mesh.ndim - 1), Shard(dim)]

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        for name, piece in self.pieces.items():
            parameter = self._parameters[name]
            held = parameter.to_local()
            expected = _numel_of(piece, tuple(parameter.shape))
            if held.numel() != expected or not held.is_contiguous():
                return (
                    f"{name} {tuple(parameter.shape)}: this rank holds {tuple(held.shape)} of it, strides "
                    f"{held.stride()}, where {parameter.placements} on torch {torch.__version__} should be {expected} "
                    "contiguous elements"
                )
        return None

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:  # noqa: D102
        return UnshardedGradients({name: self._parameters[name] for name in names})

    def checksums(self, what: str) -> dict[tuple[str, Any], Any] | None:  # noqa: D102
        if what != "weights" or len(set(self.ranks.copy)) == 1:
            return None
        # fully_shard does not broadcast over copies of the model.
        return {(name, piece): checksum(self.weight(name)) for name, piece in self.pieces.items()}


def write_shard(parameter: Any, read: Callable[[int, int], Tensor]) -> None:
    """Fill this rank's shard of a DTensor; ``read`` gives elements [start, stop) of the flattened whole."""
    name, shape = "a parameter", tuple(parameter.shape)
    piece = _piece(Member(name, parameter, shape, 0), parameter.placements)
    if piece.start >= piece.stop:
        return
    flat = _flat(parameter.detach().to_local())
    if piece.dim is None:
        flat.copy_(read(piece.start, piece.stop))
    else:
        whole = read(0, parameter.numel()).view(shape)
        flat.copy_(whole.narrow(piece.dim, piece.start, piece.stop - piece.start).reshape(-1))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _flat(local: Tensor) -> Tensor:
    return local.view(-1)


def _piece(m: Member, placements: Sequence[Placement]) -> Piece:
    """What this rank holds, by FSDP2's rule: torch.chunk along the sharded dimension."""
    parameter: Any = m.parameter
    *replicated, last = placements
    if len(placements) > 2 or any(not p.is_replicate() for p in replicated) or type(last) is not Shard:
        raise LayoutError(
            f"{m.name} {m.shape} has the placements {tuple(placements)}: supported are (Shard(dim),) and "
            "(Replicate(), Shard(dim)), as fully_shard makes them on a 1-D or 2-D mesh without tensor parallelism"
        )
    mesh = parameter.device_mesh
    return chunk_piece(m.shape, last.dim, mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1))


def _mixed_precision() -> dict[int, torch.dtype]:
    """The narrowest dtype that a gradient goes through, by the id of the sharded parameter, where it is another one."""
    found: dict[int, torch.dtype] = {}
    for group in param_groups():
        dtypes = [d for d in (group.mp_policy.param_dtype, group.mp_policy.reduce_dtype) if d is not None]
        for sharded in (p.sharded_param for p in group.fsdp_params):
            coarsest = max([sharded.dtype, *dtypes], key=lambda dtype: torch.finfo(dtype).eps)
            found[id(sharded)] = coarsest
    return found


def _numel_of(piece: Piece, shape: tuple[int, ...]) -> int:
    count = piece.stop - piece.start
    if piece.dim is not None:
        for d, size in enumerate(shape):
            count *= 1 if d == piece.dim else size
    return count


def _ranks(mesh: Any) -> Ranks:
    """All ranks of the mesh; with two dimensions the second shards and the first replicates."""
    dist = torch.distributed
    device = torch.device(mesh.device_type)
    if device.type != "cpu":
        device = torch.device(device.type, torch.get_device_module(device.type).current_device())
    order = mesh.mesh.flatten().tolist()
    if mesh.ndim == 1:
        group = mesh.get_group()
        return Ranks(group, dist.get_rank(group), dist.get_world_size(group), device)
    if sorted(order) != list(range(dist.get_world_size())):
        raise LayoutError(
            f"the mesh has {len(order)} of {dist.get_world_size()} ranks: tensor and pipeline parallelism are not "
            "supported beside HSDP"
        )
    # Ranks are numbered as the default group numbers them, whatever their order in the mesh.
    shards = mesh.size(1)
    copy = [0] * len(order)
    for place, rank in enumerate(order):
        copy[rank] = place // shards
    return Ranks(None, dist.get_rank(), len(order), device, mesh.get_group(1), tuple(copy), mesh.get_group(0))
