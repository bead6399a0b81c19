"""DeepSpeed: a configuration checked before anything starts, and an optimizer for ``deepspeed.initialize``."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ds_lowrank.config import LowRankConfig, load_json
from ds_lowrank.gloo import await_gloo_at_exit
from ds_lowrank.layouts import BF16_MASTER
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.param_groups import param_groups

OLDEST, TOO_NEW = (0, 16), (0, 20)
# Between these, DeepSpeed mistakes stage 1 with bf16 and fp32 accumulation for stage 0 (seen in 0.17.6 and 0.18.0).
_NO_BF16_OPTIMIZER = ((0, 17), (0, 19))
# Without offload these keep, of a step's micro-batches, the gradients of the last alone (deepspeedai/DeepSpeed#7718).
_DROP_MICRO_BATCHES = ("0.17.6", "0.18.0", "0.18.1", "0.18.2")


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
    content = check_deepspeed_config(deepspeed_config)
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
    if ranks is None:
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    return build_optimizer(model, config, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ranks=ranks)


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
        update_proj_gap=config.update_proj_gap,
        scale=config.scale,
        proj_type=config.proj_type,
        selection=config.selection,
        moments=config.moments,
        seed=config.seed,
        stagger=config.stagger,
        wave_size=config.wave_size,
        shard_projection=config.shard_projection,
        gram_dtype=config.gram_dtype,
        state_dtype=config.state_dtype,
        basis_dtype=config.basis_dtype,
        stochastic_rounding=config.stochastic_rounding,
        layerwise=config.layerwise,
        accumulation_steps=config.accumulation_steps,
    )


def check_deepspeed_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is not supported before anything is started.

    Args:
        config: path of a DeepSpeed JSON file, or its content. ``"auto"`` values of the HF Trainer pass.

    Returns:
        The content.

    Raises:
        ValueError: naming the setting and what to change; also for an unknown option in the ``"lowrank"`` block and
            for a DeepSpeed outside the supported range.
        FileNotFoundError: no such file.
    """
    installed = importlib.metadata.version("deepspeed").split("+")[0]
    release = _check_version(installed)
    content = load_json(config)
    if content.get("optimizer") is not None:
        raise ValueError(
            'the DeepSpeed configuration has an "optimizer" block beside the low-rank optimizer: remove the block; lr, '
            'betas, eps and weight_decay go into the "lowrank" block or the Trainer\'s arguments'
        )
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise ValueError('"zero_optimization" must be a block with a "stage"')
    _check_stage(zero, content, release)
    _check_offload(zero, content)
    if zero["stage"] == 2 and installed in _DROP_MICRO_BATCHES and _offload_device(zero) == "none":
        raise ValueError(
            f"DeepSpeed {installed} drops, in stage 2, the gradients of all micro-batches of a step but the last (its "
            "issue 7718): install deepspeed<0.17.6 or >=0.18.3, or use stage 1 or 3"
        )
    for key, what in (
        ("round_robin_gradients", "links fragments in another order than it stores them"),
        ("elastic_checkpoint", "cannot save the state of a foreign optimizer"),
    ):
        if zero.get(key) is True:
            raise ValueError(f"zero_optimization.{key} = true is not supported: it {what}. Set it to false")
    if zero.get("zenflow") is not None:
        raise ValueError("zero_optimization.zenflow is not supported: it needs its own optimizer. Remove the block")
    for name, degree in (
        ("tensor_parallel", "autotp_size"),
        ("expert_parallel", "autoep_size"),
        ("pipeline", "stages"),
    ):
        part = content.get(name)
        size = part.get(degree, 1) if isinstance(part, Mapping) else 1
        if isinstance(size, int) and size > 1:
            raise ValueError(
                f"{name}.{degree} = {size} is not supported: it cuts matrices before ZeRO does. Remove the block"
            )
    if isinstance(content.get("compile"), Mapping) and content["compile"].get("deepcompile"):
        raise ValueError("compile.deepcompile = true is not supported: it replaces ZeRO's gradient handling")
    _check_precision(content)
    _check_bf16_master(zero, content)
    if (content.get("checkpoint") or {}).get("load_universal"):
        raise ValueError(
            "checkpoint.load_universal = true is not supported, and not needed: ds_lowrank.load_checkpoint (in the "
            "HF Trainer ds_lowrank.ResumeAnywhere) goes on with a checkpoint of any stage on any number of ranks"
        )
    if LowRankConfig.from_deepspeed(content).layerwise:
        raise ValueError(
            "lowrank.layerwise = true is not supported under DeepSpeed: its engine collects the gradients of a "
            "backward pass and steps when it is over. Remove it, or use FSDP2"
        )
    return content


def prepare_cpu() -> None:
    """Make DeepSpeed start on a machine without an accelerator without compiling anything, and ranks end there orderly.

    DeepSpeed's CPU backend builds a shared-memory extension at its first start (about a minute, and a C++ compiler);
    gloo serves without it. Gloo's threads are waited for when the process ends (:mod:`ds_lowrank.gloo`). Call before
    ``torch.distributed`` is initialised; does nothing where torch sees a GPU or another accelerator.
    """
    if torch.accelerator.is_available():
        return
    await_gloo_at_exit()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if compatible is not None:
        compatible["deepspeed_shm_comm"] = False


def _check_version(installed: str) -> tuple[int, ...]:
    release = tuple(int(part) for part in installed.split(".")[:2])
    if not OLDEST <= release < TOO_NEW:
        raise ValueError(
            f"DeepSpeed {installed} is outside the supported range: install deepspeed>={_dotted(OLDEST)},"
            f"<{_dotted(TOO_NEW)}"
        )
    return release


def _check_stage(zero: Mapping[str, Any], content: Mapping[str, Any], release: tuple[int, ...]) -> None:
    if "stage" not in zero:
        raise ValueError('the DeepSpeed configuration sets no zero_optimization.stage: add {"stage": 2}, or 1 or 3')
    stage = zero["stage"]
    if stage not in (1, 2, 3):
        raise ValueError(f"zero_optimization.stage = {stage!r} is not supported: set it to 1, 2 or 3")
    if zero.get("mics_shard_size", -1) not in (-1, 0):
        raise ValueError("zero_optimization.mics_shard_size is not supported: leave it out, or use FSDP2 on a 2-D mesh")
    accumulation = (content.get("data_types") or {}).get("grad_accum_dtype")
    bf16 = (content.get("bf16") or {}).get("enabled") is True
    first, last = _NO_BF16_OPTIMIZER
    if stage == 1 and bf16 and accumulation == "fp32" and first <= release < last:
        raise ValueError(
            f"DeepSpeed {_dotted(release)} does not shard stage 1 with bf16 and data_types.grad_accum_dtype = fp32: "
            "use stage 2, or another DeepSpeed"
        )


def _check_offload(zero: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    offload = zero.get("offload_optimizer")
    device = _offload_device(zero)
    if isinstance(offload, Mapping) and offload.get("ratio", 1.0) != 1.0:
        raise ValueError(
            "offload_optimizer.ratio < 1 is not supported: DeepSpeed steps the rest with an AdamW of its own. Remove it"
        )
    parameters = zero.get("offload_param")
    if isinstance(parameters, Mapping) and parameters.get("device") == "nvme":
        raise ValueError('zero_optimization.offload_param.device = "nvme" is not supported: use "cpu"')
    if device == "nvme":
        raise ValueError('zero_optimization.offload_optimizer.device = "nvme" is not supported: use "cpu"')
    if device != "none" and content.get("zero_force_ds_cpu_optimizer", True) is not False:
        raise ValueError(
            'offload_optimizer with another optimizer than DeepSpeed\'s own needs "zero_force_ds_cpu_optimizer": false '
            "at the top level of the configuration"
        )


def _offload_device(zero: Mapping[str, Any]) -> str:
    offload = zero.get("offload_optimizer")
    return offload.get("device", "none") if isinstance(offload, Mapping) else "none"


def _check_precision(content: Mapping[str, Any]) -> None:
    autocast = content.get("torch_autocast") or {}
    if autocast.get("enabled") and autocast.get("dtype") in ("float16", "fp16", "half"):
        raise ValueError(
            "torch_autocast with float16 is not supported: its scaler may skip a step on one rank only. Use bfloat16"
        )
    fp16 = content.get("fp16", {})
    if isinstance(fp16, Mapping) and fp16.get("enabled") is True and not torch.cuda.is_available():
        raise ValueError("fp16 needs a GPU: DeepSpeed refuses it on a CPU. Use bf16 or fp32")


def bf16_master(content: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration asks for bf16 weights without an fp32 master copy."""
    bf16 = content.get("bf16")
    return isinstance(bf16, Mapping) and bool(bf16.get("bf16_master_weights_and_grads"))


def _check_bf16_master(zero: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    if not bf16_master(content):
        if LowRankConfig.from_deepspeed(content).stochastic_rounding:
            raise ValueError(
                "lowrank.stochastic_rounding = true is for bf16 weights without an fp32 master copy, which DeepSpeed "
                f"keeps unless told otherwise: set {BF16_MASTER}, or remove it"
            )
        return
    bf16, option = content["bf16"], "bf16.bf16_master_weights_and_grads = true"
    if bf16.get("enabled") not in (True, "auto"):
        raise ValueError(f"{option} rounds what the model computes with: set bf16.enabled to true as well")
    if not bf16.get("bf16_optimizer_states"):
        raise ValueError(
            f"{option} without bf16.bf16_optimizer_states = true is for DeepSpeed's own CPU optimizer: set both. How "
            "moments are kept remains lowrank.state_dtype's affair"
        )
    if _offload_device(zero) != "none":
        raise ValueError(
            f"{option} with offload_optimizer is not supported: DeepSpeed takes no optimizer but its own "
            "DeepSpeedCPUAdam there. Remove one of the two"
        )
    accumulation = (content.get("data_types") or {}).get("grad_accum_dtype")
    if zero["stage"] == 1 and accumulation in ("fp32", "float32", "float"):
        raise ValueError(
            f"{option} has no effect in stage 1 with data_types.grad_accum_dtype = fp32, whose BF16_Optimizer keeps an "
            "fp32 master copy: use stage 2"
        )
    try:
        from deepspeed.runtime.precision_config import DeepSpeedBF16Config

        known = DeepSpeedBF16Config.model_fields
    except ImportError:  # its configuration was no class then, and passed over what it did not know
        known = {}
    if "bf16_optimizer_states" not in known:
        raise ValueError(
            f"DeepSpeed {importlib.metadata.version('deepspeed')} cannot do without an fp32 master copy: it knows no "
            "bf16.bf16_optimizer_states. Install a newer one (0.19.8 does), or remove both"
        )


def _automatic_keys(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keys whose value is ``"auto"``, with the blocks they stand in."""
    found = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            found += _automatic_keys(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(f"{prefix}{key}")
    return found


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
