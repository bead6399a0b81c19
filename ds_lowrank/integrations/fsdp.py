"""FSDP2 by the HF Trainer: its ``--fsdp_config`` file, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_lowrank.config import LowRankConfig, load_json


def check_fsdp_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is not supported before anything is started.

    The Trainer reads the keys it knows and passes over the rest, so the ``"lowrank"`` block may live in its file.

    Args:
        config: path of the JSON file that ``TrainingArguments(fsdp_config=...)`` takes, or its content.

    Returns:
        The content.

    Raises:
        ValueError: another version than FSDP2, or an unknown or bad option in the ``"lowrank"`` block.
        FileNotFoundError: no such file.
    """
    if not isinstance(config, Mapping) and not Path(config).is_file():
        raise FileNotFoundError(f"FSDP configuration {str(config)!r} does not exist")
    content = load_json(config)
    version = content.get("version", content.get("fsdp_version", 2))
    if str(version) != "2":
        raise ValueError(
            f"FSDP version {version} is not supported: FSDP1 flattens parameters across matrices. Set "
            '"version": 2 in the FSDP configuration'
        )
    LowRankConfig.from_deepspeed(content)
    return content
