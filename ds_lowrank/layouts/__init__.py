"""Framework -> pieces. The only files that read a framework's private attributes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ds_lowrank.layouts.base import Group, Layout, LayoutError, Member, Piece, Ranks
from ds_lowrank.layouts.local import LocalLayout
from ds_lowrank.layouts.zero import ZeroLayout, is_zero12

__all__ = ["Group", "Layout", "LayoutError", "Member", "Piece", "Ranks", "find_layout"]


def find_layout(members: Sequence[Member], groups: Sequence[Group]) -> Layout:
    """Find out how the model is sharded now.

    Args:
        members: the parameters that the optimizer was built with.
        groups: all its parameter groups as they are now.

    Raises:
        LayoutError: the sharding is not supported; the text says what is.
    """
    for m in members:
        if not m.parameter.requires_grad:
            raise LayoutError(f"{m.name} {m.shape} was frozen after the optimizer was built: build it after freezing")
    held = {id(p) for g in groups for p in g["params"]}
    replaced = not all(id(m.parameter) in held for m in members)
    if replaced and is_zero12(members):
        return ZeroLayout(members, groups)
    if any(hasattr(m.parameter, "ds_id") for m in members):
        raise LayoutError("ZeRO stage 3 is not supported yet: use stage 1 or 2")
    if any(type(m.parameter).__name__ == "DTensor" or hasattr(m.parameter, "device_mesh") for m in members):
        raise LayoutError("FSDP2 (DTensor) parameters are not supported yet: use DeepSpeed ZeRO-1 or 2")
    if replaced:
        raise LayoutError(
            "the optimizer's parameters were replaced by something that is neither ZeRO-1 nor ZeRO-2: this DeepSpeed "
            "stage, precision or wrapper is not supported (stage 0 in fp16 or bf16 is such a case)"
        )
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise LayoutError(
            f"{dist.get_world_size()} ranks without sharding (DDP, ZeRO stage 0) are not supported yet: use DeepSpeed "
            "ZeRO-1 or 2, or one process"
        )
    return LocalLayout(members, groups)
