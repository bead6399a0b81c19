"""Framework -> pieces. The only files that read a framework's private attributes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ds_lowrank.layouts.base import (
    Group,
    Layout,
    LayoutError,
    LocalGradients,
    Member,
    ParameterLayout,
    Piece,
    Ranks,
    is_dtensor,
    is_outside,
    is_replicated,
    local_tensors,
)
from ds_lowrank.layouts.ddp import (
    ReplicatedLayout,
    check_excluded,
    ddp_models,
    ignore_in_ddp,
    in_join,
    joins_first,
    replicates,
    steps_now,
)
from ds_lowrank.layouts.hooks import at_end_of_backward, hook_gradients
from ds_lowrank.layouts.own_groups import own_groups
from ds_lowrank.layouts.zero import BF16_MASTER, ZeroLayout, check_left_out, in_flat_buffers, is_zero12
from ds_lowrank.layouts.zero3 import Zero3Layout, check_partitioned, in_sub_groups, is_zero3, write_partition
from ds_lowrank.layouts.zero_outside import OutsideEngine, OutsideLayout, watch_engines

__all__ = [
    "BF16_MASTER",
    "Group",
    "Layout",
    "LayoutError",
    "LocalGradients",
    "Member",
    "OutsideEngine",
    "ParameterLayout",
    "Piece",
    "Ranks",
    "at_end_of_backward",
    "bare_model",
    "check_excluded",
    "check_left_out",
    "ddp_models",
    "find_layout",
    "find_layout_beside",
    "hook_gradients",
    "ignore_in_ddp",
    "in_join",
    "is_dtensor",
    "is_outside",
    "is_replicated",
    "joins_first",
    "local_tensors",
    "own_groups",
    "replicates",
    "steps_now",
    "watch_engines",
    "whole_shape",
    "write_parameter",
]


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of a parameter that a framework may have partitioned already: ``zero.Init`` leaves it empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def write_parameter(parameter: Tensor, read: Callable[[int, int], Tensor], rank: int) -> None:
    """Fill what a model computes with: a whole parameter, a shard of FSDP2 or a slice of ZeRO-3.

    Args:
        parameter: of the model.
        read: gives elements [start, stop) of the flattened whole, in any floating dtype.
        rank: this rank among those that share the model.
    """
    if is_dtensor(parameter):
        from ds_lowrank.layouts.fsdp import write_shard  # DTensors take half as long to import as torch does

        write_shard(parameter, read)
    elif hasattr(parameter, "ds_tensor"):
        write_partition(parameter, read, rank)
    else:
        parameter.data.copy_(read(0, parameter.numel()).view(parameter.shape))


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and DeepSpeed, in whatever order they were applied."""
    while True:
        wrapped = isinstance(model, DistributedDataParallel) or type(model).__name__ == "DeepSpeedEngine"
        inner = model.module if wrapped else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def find_layout(members: Sequence[Member], groups: Sequence[Group]) -> tuple[Layout, list[Member]]:
    """Find out how the model is sharded now.

    Args:
        members: the parameters that the optimizer was built with, group by group.
        groups: all its parameter groups as they are now.

    Returns:
        The layout, and the members with the parameters that are in the groups now; under DeepSpeed without those that
        were frozen in ``initialize``, which it leaves out of its flat buffers.

    Raises:
        LayoutError: the sharding is not supported; the text says what is.
    """
    held = [(index, p) for index, group in enumerate(groups) for p in group["params"]]
    replaced = [id(p) for _, p in held] != [id(m.held) for m in members]
    if replaced and [index for index, _ in held] == [m.group for m in members]:
        # accelerate shards a model after its optimizer was built and puts the new parameters into their places. A
        # group of one parameter may have been flattened instead: then the shape tells.
        swapped = [dataclasses.replace(m, held=p) for m, (_, p) in zip(members, held)]
        if all(whole_shape(m.parameter) == m.shape for m in swapped):
            members, replaced = swapped, False
    if is_zero3(members):
        members = _without_left_out(members, in_sub_groups(members))
        return Zero3Layout(members), members
    check_partitioned(members)
    if replaced and is_zero12(members):
        members = _without_left_out(members, in_flat_buffers)
        return ZeroLayout(members, groups), members
    if any(type(p).__name__ == "FlatParameter" for p in [m.parameter for m in members] + [p for _, p in held]):
        raise LayoutError(
            "FSDP1 flattens parameters across matrices and is not supported: use FSDP2 (fully_shard; in the HF Trainer "
            "and accelerate fsdp_version 2)"
        )
    if replaced:
        raise LayoutError(
            "the optimizer's parameters were replaced by something that is none of ZeRO-1, 2, 3 and FSDP2: this "
            "DeepSpeed stage, precision or wrapper is not supported (stage 0 in fp16 or bf16 is such a case)"
        )
    if any(is_dtensor(m.parameter) for m in members):
        from ds_lowrank.layouts.fsdp import Fsdp2Layout  # see above

        return Fsdp2Layout(members), list(members)
    return ReplicatedLayout(members), list(members)


def find_layout_beside(
    engine: OutsideEngine, members: Sequence[Member], groups: Sequence[Group]
) -> tuple[Layout, list[Member]]:
    """As :func:`find_layout`, where DeepSpeed's optimizer was not given some of the parameters."""
    inside, kept = find_layout([m for m in members if m.name not in engine.names], groups)
    outside = [m for m in members if m.name in engine.names]
    known = {m.name for m in kept} | engine.names
    return OutsideLayout(inside, outside, engine), [m for m in members if m.name in known]


def _without_left_out(members: Sequence[Member], known: Callable[[Member], bool]) -> list[Member]:
    check_left_out([m for m in members if not known(m)])
    return [m for m in members if known(m)]
