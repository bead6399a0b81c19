"""What ``TrainingArguments(optim="galore_adamw", ...)`` say, beside options of our own: taken over, or refused."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from ds_lowrank.config import LowRankConfig

# The Trainer's default is one of these: they say nothing against an AdamW with states of low rank.
_ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_hf")
# What each name means beside "GaLore".
_GALORE: dict[str, dict[str, Any]] = {
    "galore_adamw": {},
    "galore_adamw_layerwise": {"layerwise": True},
    "galore_adamw_8bit": {"state_dtype": "int8"},
    "galore_adamw_8bit_layerwise": {"state_dtype": "int8", "layerwise": True},
}
_OPTIM_ARGS: dict[str, Callable[[str], Any]] = {"rank": int, "update_proj_gap": int, "scale": float, "proj_type": str}


def with_galore_arguments(config: LowRankConfig | Mapping[str, Any], args: Any) -> LowRankConfig:
    """Our options, completed by the GaLore options of the Trainer's own arguments; see :func:`complete_options`.

    Args:
        config: our options. The keys of a mapping are what it says; a :class:`LowRankConfig` says everything.
        args: the ``TrainingArguments``.

    Raises:
        ValueError: see :func:`complete_options`.
    """
    if not isinstance(config, LowRankConfig):
        LowRankConfig.from_dict(config)
    given = config.to_dict() if isinstance(config, LowRankConfig) else config
    return LowRankConfig.from_dict(complete_options(given, args))


def complete_options(options: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Options and, where these do not say it, what the Trainer's own arguments say of GaLore.

    ``optim_args`` (``rank``, ``update_proj_gap``, ``scale``, ``proj_type``), ``optim_target_modules`` and what the name
    ``optim`` says (``_8bit``: ``state_dtype="int8"``; ``_layerwise``: ``layerwise``) are taken where ours do not say
    it. GaLore keeps the dominant directions, so with its name ``selection`` is ``dominant`` unless ours say otherwise.

    Args:
        options: fields of a :class:`LowRankConfig`.
        args: the ``TrainingArguments``; ``optim``, ``optim_args`` and ``optim_target_modules`` are read.

    Raises:
        ValueError: both say it and differ, ``optim`` names another rule than AdamW, or an ``optim_args`` is unknown
            or no number.
    """
    given = dict(options)
    name = getattr(args.optim, "value", args.optim)
    told = [(f'optim_args="{key}={value}"', key, value) for key, value in _optim_args(args.optim_args).items()]
    if (targets := getattr(args, "optim_target_modules", None)) is not None:
        told.append((f"optim_target_modules={targets!r}", "optim_target_modules", targets))
    if name in _GALORE:
        told += [(f'optim="{name}"', key, value) for key, value in _GALORE[name].items()]
        given = {"selection": "dominant", **given}
    elif name not in _ADAMW:
        raise ValueError(
            f'TrainingArguments(optim="{name}") asks for another optimizer than the low-rank AdamW: leave optim out'
            + ('; 8-bit states are "state_dtype": "int8"' if "8bit" in name else "")
        )
    for where, key, value in told:
        if _plain(given.setdefault(key, _plain(value))) != _plain(value):
            raise ValueError(
                f"TrainingArguments({where}) and lowrank.{key} = {given[key]!r} are two values of one option: leave "
                "one of them out"
            )
    return given


def _optim_args(text: str | None) -> dict[str, Any]:
    """``"rank=2, scale=0.5"``, read as the Trainer reads it."""
    found: dict[str, Any] = {}
    for item in (text or "").replace(" ", "").split(",") if text else []:
        key, _, value = item.partition("=")
        if key not in _OPTIM_ARGS:
            near = difflib.get_close_matches(key, _OPTIM_ARGS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"TrainingArguments(optim_args={text!r}): unknown {key!r}{hint} Known: {', '.join(_OPTIM_ARGS)}"
            )
        try:
            found[key] = _OPTIM_ARGS[key](value)
        except ValueError as error:
            raise ValueError(
                f"TrainingArguments(optim_args={text!r}): {key} must be a number, got {value!r}"
            ) from error
    return found


def _plain(value: Any) -> Any:
    """The same for what means the same."""
    if isinstance(value, str) and value.replace("_", "-") == "all-linear":  # the Trainer takes both
        return "all-linear"
    return list(value) if isinstance(value, tuple) else value
