"""DistributedDataParallel beside an optimizer that steps in the backward pass."""

from __future__ import annotations

import torch
from torch import nn

from ds_lowrank.layouts import ignore_in_ddp
from ds_lowrank.optimizer import LowRankAdamW


def exclude_from_ddp(model: nn.Module, optimizer: LowRankAdamW) -> None:
    """Leave the averaging of projected gradients to the optimizer; call it before wrapping the model in DDP.

    DistributedDataParallel keeps all gradients in buckets, which is what ``layerwise`` and ``gradients="projected"``
    are to avoid: the optimizer averages what it makes of each gradient itself, and frees it. All other gradients stay
    with DDP. It does not give rank 0's weights to the others either then: this does, where ranks are there already.

    Args:
        model: the bare model.
        optimizer: made for it.

    Raises:
        ValueError: the optimizer leaves gradients to DDP: nobody would average these.
    """
    if not optimizer.config.layerwise and optimizer.config.gradients != "projected":
        raise ValueError(
            "exclude_from_ddp is for layerwise=True and gradients='projected', where the optimizer averages projected "
            "gradients itself: without them leave this call out"
        )
    projected = {spec.parameter for spec in optimizer.matrix_specs}
    parameters = [m.parameter for m in optimizer.members if m.name in projected]
    ignore_in_ddp(model, parameters)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for parameter in parameters:
            torch.distributed.broadcast(parameter.data, 0)
