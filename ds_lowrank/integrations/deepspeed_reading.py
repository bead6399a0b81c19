"""What DeepSpeed's own classes make of a configuration, in any supported version, and why they refuse one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any


def offload_device(zero: Any) -> str:
    """Where DeepSpeed keeps the optimizer by its ``DeepSpeedZeroConfig``: ``none`` (the GPU), ``cpu`` or ``nvme``."""
    return "none" if zero.offload_optimizer is None else str(zero.offload_optimizer.device)


def without_auto(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what the HF Trainer is to fill in, which DeepSpeed's classes leave out too."""
    return {
        key: without_auto(value) if isinstance(value, Mapping) else value
        for key, value in content.items()
        if not (isinstance(value, str) and value == "auto")
    }


def mapping(value: Any) -> Mapping[str, Any]:
    """A block, empty where it is none."""
    return value if isinstance(value, Mapping) else {}


def bf16_block(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSpeed's older name of the block counts where the other is absent."""
    block = content.get("bf16")
    return mapping(content.get("bfloat16") if block is None else block)


def is_on(value: Any) -> bool:
    """A truth value as pydantic, which reads DeepSpeed's blocks, takes it."""
    return value.lower() in ("true", "yes", "on", "1", "t", "y") if isinstance(value, str) else value in (True, 1)


def read_bf16(content: Mapping[str, Any]) -> Any:
    """What ``bf16`` means: ``enabled`` and ``bf16_master_weights_and_grads``."""
    block = {k: v for k, v in bf16_block(content).items() if v != "auto"}
    try:
        from deepspeed.runtime.precision_config import get_bfloat16_config

        return get_bfloat16_config({"bf16": block})
    except (ImportError, ValueError):  # before 0.17 it was no class; what is wrong in the block is found by key
        master = bool(block.get("bf16_master_weights_and_grads"))
        return SimpleNamespace(enabled=is_on(block.get("enabled")), bf16_master_weights_and_grads=master)


def read_zero(block: Mapping[str, Any], installed: str) -> tuple[Any, list[str]]:
    """``DeepSpeedZeroConfig`` of a block, without the keys that it refuses, and why it refuses them."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    # These have a refusal of their own.
    left = {k: v for k, v in block.items() if k != "zenflow" and not (k == "mics_shard_size" and v not in (-1, 0))}
    if left.get("stage") not in (1, 2, 3):
        left.pop("stage", None)
    if isinstance(left.get("offload_optimizer"), Mapping):
        left["offload_optimizer"] = {k: v for k, v in left["offload_optimizer"].items() if k != "ratio"}
    faults: list[str] = []
    while True:
        try:
            zero = DeepSpeedZeroConfig(**left)
        except (ValueError, AssertionError, TypeError) as error:
            known = DeepSpeedZeroConfig.model_fields
            faults += _reasons(error, "zero_optimization", left, installed, known)
            bad = {str(e["loc"][0]) for e in getattr(error, "errors", list)() if e["loc"]}
            if not bad.intersection(left):  # keys that cannot be used together
                return DeepSpeedZeroConfig(**{k: v for k, v in left.items() if k == "stage"}), faults
            left = {k: v for k, v in left.items() if k not in bad}
            continue
        if zero.stage in (1, 2) and zero.allgather_bucket_size % 2:
            faults.append(f"zero_optimization.allgather_bucket_size must be even, got {zero.allgather_bucket_size}")
        return zero, faults


def refused(base: Mapping[str, Any], more: Mapping[str, Any], installed: str) -> list[str]:
    """Why DeepSpeed's whole configuration refuses what is added to ``base``; empty where it does not."""
    from deepspeed.runtime.config import DeepSpeedConfig

    if "elasticity" in more:  # where it is supported it wants to say the batch size itself
        base = {key: value for key, value in base.items() if "batch" not in key}
    try:
        DeepSpeedConfig({**base, **more})
    except Exception as error:  # whatever stops it stops the run
        key, value = next(iter(more.items()))
        return _reasons(error, key if len(more) == 1 else "", value, installed, {})
    return []


def _reasons(error: Exception, key: str, value: Any, installed: str, known: Mapping[str, Any]) -> list[str]:
    """An exception of DeepSpeed's classes, a line for each thing that is wrong."""
    if not hasattr(error, "errors"):
        if key and not isinstance(value, Mapping) and isinstance(error, (TypeError, AttributeError)):
            return [f"{key} must be {'a text' if 'lower' in str(error) else 'a block of options'}, got {value!r}"]
        where = f"{key}: " if key else ""
        return [f"{where}DeepSpeed {installed} refuses it: {error or type(error).__name__}"]
    found = []
    for one in error.errors():
        path = ".".join(str(part) for part in (key, *one["loc"]) if part != "")
        if one["type"] != "extra_forbidden":
            got = f", got {one['input']!r}" if one["loc"] else ""
            found.append(f"{path}: {one['msg']}{got}")
            continue
        name = str(one["loc"][-1])
        if name in known:
            found.append(f"{path} is given twice, also as {known[name].alias}: remove one of them")
            continue
        near = difflib.get_close_matches(name, [*known, *(f.alias for f in known.values() if f.alias)], n=1)
        found.append(
            f"{path} is unknown to DeepSpeed {installed}: " + (f"did you mean {near[0]!r}?" if near else "remove it")
        )
    return found
