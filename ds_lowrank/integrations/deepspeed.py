"""DeepSpeed: an optimizer for ``deepspeed.initialize``, and a start on machines without an accelerator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_lowrank.comm.gloo import await_gloo_at_exit
from ds_lowrank.config import BLOCK, LowRankConfig
from ds_lowrank.integrations.deepspeed_config import (
    autocast_dtype,
    bf16_master,
    check_deepspeed_config,
    read_deepspeed_config,
)
from ds_lowrank.integrations.zero_init import count_all_ranks
from ds_lowrank.layouts import watch_engines
from ds_lowrank.optimizer import OPTIONS, LowRankAdamW
from ds_lowrank.param_groups import param_groups

__all__ = ["bf16_master", "build_optimizer", "check_deepspeed_config", "deepspeed_optimizer", "prepare_cpu"]


def deepspeed_optimizer(
    model: nn.Module,
    deepspeed_config: str | Path | Mapping[str, Any],
    *,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    ranks: int | None = None,
) -> LowRankAdamW:
    """Optimizer for ``deepspeed.initialize(model=model, optimizer=..., config=deepspeed_config)``.

    Args:
        model: the model, before ``initialize``.
        deepspeed_config: the same JSON file or mapping that ``initialize`` gets; its ``"lowrank"`` block holds the
            options, which win over the arguments below.
        lr, betas, eps, weight_decay: of AdamW, where the block does not set them.
        ranks: data-parallel ranks; ``None`` asks torch.distributed, so call ``deepspeed.init_distributed()`` first.

    Raises:
        ValueError: the configuration or an option is not supported, see :func:`check_deepspeed_config`.
        FileNotFoundError: no such file.
    """
    settings = read_deepspeed_config(deepspeed_config)
    for note in settings.notes:
        warnings.warn(note, stacklevel=2)
    content = settings.content
    if content.get("zero_allow_untested_optimizer") is not True:
        raise ValueError(
            'set "zero_allow_untested_optimizer": true at the top level of the configuration: DeepSpeed refuses '
            "optimizers that it does not ship without it"
        )
    automatic = _automatic_keys(content)
    if automatic:
        raise ValueError(
            f'"auto" is filled in by the HF Trainer only: give {", ".join(automatic)} a value, or leave the key out'
        )
    config = LowRankConfig.from_deepspeed(content)
    if config.gradient_dtype == "auto":
        config = config.replace(gradient_dtype=autocast_dtype(content))
    if ranks is None:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    optimizer = build_optimizer(model, config, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ranks=ranks)
    optimizer.notes = settings.notes
    if config.gradients == "projected":
        keep_from_deepspeed(optimizer)
    return optimizer


def keep_from_deepspeed(optimizer: LowRankAdamW) -> None:
    """Take the projected matrices out of what DeepSpeed will see, ahead of ``deepspeed.initialize`` and of schedulers.

    DeepSpeed would flatten them, with gradients of full size; they stay the model's own weights, and step beside it.

    Raises:
        ValueError: nothing would be left to DeepSpeed's own optimizer.
        ds_lowrank.LayoutError: the installed DeepSpeed does not allow it.
    """
    watch_engines()
    optimizer.keep_outside()


def build_optimizer(
    model: nn.Module,
    config: LowRankConfig | Mapping[str, Any] | None = None,
    *,
    lr: float | Tensor | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    ranks: int | None = None,
) -> LowRankAdamW:
    """Optimizer for a model from one configuration, every option of it.

    Args:
        model: the model, before any sharding.
        config: the options, as a configuration or as a mapping of its fields; ``None`` for the defaults.
        lr, betas, eps, weight_decay: of AdamW, where the configuration does not set them; ``None`` means the
            optimizer's default.
        ranks: see :func:`ds_lowrank.param_groups`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"build_optimizer takes the model, not its parameters (got {type(model).__name__})")
    if not isinstance(config, LowRankConfig):
        config = LowRankConfig.from_dict(config or {})
    given = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    settings: dict[str, Any] = {}
    for key, value in given.items():
        own = getattr(config, key)
        if own is not None or value is not None:
            settings[key] = value if own is None else own
    groups = param_groups(model, config, ranks=ranks, weight_decay=settings.get("weight_decay", 0.0))
    return LowRankAdamW(
        groups,
        **settings,
        **{name: value for name, value in config.to_dict().items() if name in OPTIONS},
    )


def prepare_cpu() -> None:
    """Make DeepSpeed start on a machine without an accelerator without compiling anything, and ranks end there orderly.

    DeepSpeed's CPU backend builds a shared-memory extension at its first start (about a minute, and a C++ compiler);
    gloo serves without it. Gloo's threads are waited for when the process ends (:mod:`ds_lowrank.comm.gloo`). Models
    that the Trainer partitions under stage 3 are cut for all ranks without ``deepspeed.init_distributed()``. Call
    before ``torch.distributed`` is initialised; does nothing where torch sees a GPU or another accelerator.
    """
    if torch.accelerator.is_available():
        return
    await_gloo_at_exit()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is not None:
        compatible["deepspeed_shm_comm"] = False
    count_all_ranks()


def _automatic_keys(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose value is ``"auto"``, with the blocks they stand in; options of ours have it for themselves."""
    found = []
    for key, value in content.items():
        if key == BLOCK:
            continue
        if isinstance(value, Mapping):
            found += _automatic_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(f"{prefix}{key}")
    return found
