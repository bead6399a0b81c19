"""DistributedDataParallel beside an optimizer that steps in the backward pass."""

from __future__ import annotations

from torch import nn

from ds_lowrank.layouts import ignore_in_ddp
from ds_lowrank.optimizer import LowRankAdamW


def exclude_from_ddp(model: nn.Module, optimizer: LowRankAdamW) -> None:
    """Leave the averaging of projected gradients to a layerwise optimizer; call it before wrapping the model in DDP.

    DistributedDataParallel keeps all gradients in buckets, which is what ``layerwise`` is to avoid: it averages each
    projected gradient itself, when it arrives, and frees it. All other gradients stay with DDP.

    Args:
        model: the bare model.
        optimizer: made for it.

    Raises:
        ValueError: the optimizer is not layerwise: nobody would average these gradients.
    """
    if not optimizer.config.layerwise:
        raise ValueError(
            "exclude_from_ddp is for layerwise=True, where the optimizer averages projected gradients itself: without "
            "it leave this call out"
        )
    projected = {spec.parameter for spec in optimizer.matrix_specs}
    ignore_in_ddp(model, [m.parameter for m in optimizer.members if m.name in projected])
