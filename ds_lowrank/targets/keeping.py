"""A run that goes on projects what its checkpoint has projected, whatever ``all-linear`` means by now."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ds_lowrank.checkpoint.load import open_checkpoint
from ds_lowrank.config import LowRankConfig
from ds_lowrank.targets.names import named_parameters
from ds_lowrank.targets.patterns import AUTOMATIC, list_targets, module_of


def keep_projected(config: LowRankConfig, model: nn.Module, folder: str | Path | None) -> LowRankConfig:
    """The configuration, with the names of those matrices in ``optim_target_modules`` that only a checkpoint projects.

    ``all-linear`` leaves out heads, and what is not larger than the rank; earlier versions projected some of both. What
    is frozen here is not named: its states are left behind.

    Args:
        config: of the run.
        model: before any sharding.
        folder: of the checkpoint that the run is to go on with, or ``None``. One that cannot be read is passed over:
            loading it says why, on all ranks together.
    """
    given = config.optim_target_modules
    patterns = [given] if isinstance(given, str) else list(given)
    if folder is None or AUTOMATIC not in patterns:
        return config
    try:
        saved = {module_of(name) for name in open_checkpoint(folder).matrices}
    except (ValueError, OSError):
        return config
    trained = {module_of(name) for name, parameter in named_parameters(model) if parameter.requires_grad}
    kept = saved & trained - {module_of(target.name) for target in list_targets(model, config).projected}
    # As expressions for the whole of a name: a part of one would name others as well.
    return config.replace(optim_target_modules=[*patterns, *sorted(f"{name}$" for name in kept)]) if kept else config
