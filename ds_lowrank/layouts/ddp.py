"""Whole parameters on every rank: one process, or DistributedDataParallel.

The ranks keep equal weights because whoever averages the gradients (DDP, or a loop of one's own) gives every rank the
same ones. Both are checked once: the weights when the layout is found, the gradients at the first step.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Joinable
from torch.nn.parallel import DistributedDataParallel

from ds_lowrank.layouts.base import (
    LayoutError,
    LocalGradients,
    Member,
    Piece,
    Ranks,
    Tensors,
    checksum,
    is_dtensor,
    same_device,
)
from ds_lowrank.layouts.hooks import WholeGradients


class ReplicatedLayout:
    """Parameters as the model has them, equal on all ranks."""

    steps_alone = True
    by_parameter = True

    def __init__(self, members: Sequence[Member]):
        self._members = {m.name: m for m in members}
        self._parameters = {m.name: m.parameter for m in members}
        self.copied: set[str] = set()
        self._tensors = Tensors()
        for m in members:
            if any(s == 0 and n > 1 for n, s in zip(m.parameter.shape, m.parameter.stride())):
                raise LayoutError(
                    f"{m.name} {m.shape} is an expanded tensor, several of its elements are one number in memory: make "
                    "the parameter from its .clone()"
                )
            self._tensors.add(m.parameter, m.name)
        device = same_device({m.name: m.parameter for m in members})
        self.ranks = Ranks(device=device)
        dist = torch.distributed
        if dist.is_available() and dist.is_initialized():
            self.ranks = Ranks(None, dist.get_rank(), dist.get_world_size(), device)
        self.replicated = self.ranks.size > 1
        self.kind = "DDP" if self.replicated else "one process"
        self.pieces = {m.name: Piece(0, m.parameter.numel()) for m in members}

    def weight(self, name: str) -> Tensor:  # noqa: D102
        data = self._parameters[name].data
        if data.is_contiguous():
            return data.view(-1)
        self.copied.add(name)
        return data.contiguous().view(-1)

    def store(self, name: str, weights: Tensor) -> None:  # noqa: D102
        if name in self.copied:
            data = self._parameters[name].data
            data.copy_(weights.view(data.shape))
            self.copied.discard(name)

    def grad(self, name: str) -> Tensor | None:  # noqa: D102
        grad = self._parameters[name].grad
        return None if grad is None else grad.contiguous().view(-1)

    def dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._members[name].parameter.dtype

    def gradient_dtype(self, name: str) -> torch.dtype:  # noqa: D102
        return self._members[name].parameter.dtype

    def unit(self, name: str) -> int:  # noqa: D102
        return 0

    def place(self, name: str) -> tuple[Tensor, int]:  # noqa: D102
        return self._members[name].parameter, 0

    def shard_dim(self, name: str) -> None:  # noqa: D102
        return None

    def distribute(self, local: Tensor, shape: tuple[int, ...], dim: int) -> Tensor:  # noqa: D102
        return local

    def local(self, tensor: Tensor, dim: int) -> tuple[Tensor, bool]:  # noqa: D102
        return tensor, True

    def names_in(self, tensor: Tensor) -> list[str]:  # noqa: D102
        return self._tensors.names_in(tensor)

    def mismatch(self) -> str | None:  # noqa: D102
        return None

    def local_gradients(self, names: Sequence[str]) -> LocalGradients:  # noqa: D102
        parameters = {name: self._parameters[name] for name in names}
        if not self.replicated:
            return WholeGradients(parameters, lambda: True)
        models: list[DistributedDataParallel] = []

        def syncs() -> bool:
            if not models:  # it may have been wrapped since
                models.extend(ddp_models(list(self._parameters.values())))
            return all(m.require_forward_param_sync for m in models)

        # Ranks that have no gradient of a projected parameter take part all the same.
        others = {name: p for name, p in self._parameters.items() if name not in parameters}
        return WholeGradients(parameters, syncs, others=others)

    def checksums(self, what: str) -> dict[tuple[str, Any], Any] | None:  # noqa: D102
        if not self.replicated:
            return None
        values = {n: m.parameter.data if what == "weights" else m.parameter.grad for n, m in self._members.items()}
        return {(n, None): None if t is None else checksum(t.contiguous()) for n, t in values.items()}


def replicates(parameters: Sequence[Tensor]) -> bool:
    """Whether parameters that no framework has sharded so far are whole on several ranks."""
    dist = torch.distributed
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return several and not any(is_dtensor(p) for p in parameters)


def ddp_models(parameters: Sequence[Tensor]) -> list[DistributedDataParallel]:
    """The models in DistributedDataParallel that hold some of these parameters; for set-up only, it looks everywhere.

    Nothing leads from a parameter to the model that averages its gradient.
    """
    own = {id(p) for p in parameters}
    models = [found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel)]
    return [m for m in models if "module" in m._modules and any(id(p) in own for p in m.module.parameters())]


def in_join(joinable: Joinable) -> bool:
    """Whether a model or an optimizer was given to a ``Join`` that is enabled."""
    return joinable._join_config.enable


def joins_first(joinable: Joinable) -> bool:
    """Whether it was the first that was given to it."""
    return joinable._join_config.is_first_joinable


def steps_now(models: Sequence[DistributedDataParallel]) -> bool:
    """On a rank without data, after DistributedDataParallel's hook: whether the others average gradients and step."""
    return all(model.require_forward_param_sync for model in models)


def ignore_in_ddp(model: nn.Module, parameters: Sequence[Tensor]) -> None:
    """Keep DistributedDataParallel from averaging the gradients of some parameters; call it before wrapping a model.

    It keeps all gradients in buckets of its own. What steps in the backward pass is averaged there instead.
    """
    chosen = {id(p) for p in parameters}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in chosen]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def check_excluded(members: Sequence[Member], option: str) -> None:
    """Refuse parameters whose gradients DistributedDataParallel would average as well.

    Args:
        members: whose gradients are averaged by us.
        option: what asks for that.

    Raises:
        LayoutError: naming the first of them.
    """
    for m in members:
        if not getattr(m.parameter, "_ddp_ignored", False):
            raise LayoutError(
                f"{option} on several ranks averages the gradient of {m.name} {m.shape} itself: call "
                "ds_lowrank.exclude_from_ddp(model, optimizer) before the model is wrapped in DistributedDataParallel"
            )
