"""FSDP2 by the HF Trainer: its ``--fsdp_config`` file, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.config import LowRankConfig, load_json

_PREFIX = "fsdp_"


@dataclass(frozen=True)
class FsdpSettings:
    """What an FSDP2 configuration means to the Trainer and to accelerate.

    Attributes:
        content: as it was given.
        keys: the same without the ``fsdp_`` that accelerate's keys may begin with.
        reshard: ``reshard_after_forward``.
        checkpointing: ``activation_checkpointing``.
        offload: whether parameters lie on the CPU: ``offload_params``, or the Trainer's ``cpu_offload``.
    """

    content: dict[str, Any]
    keys: dict[str, Any]
    reshard: bool
    checkpointing: bool
    offload: bool


def check_fsdp_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Refuse what is not supported before anything is started.

    The Trainer reads the keys it knows and passes over the rest, so the ``"lowrank"`` block may live in its file.

    Args:
        config: path of the JSON file that ``TrainingArguments(fsdp_config=...)`` takes, or its content.

    Returns:
        The content.

    Raises:
        ValueError: every fault, one a line: another version than FSDP2, a switch that is neither true nor false, an
            unknown or bad option in the ``"lowrank"`` block.
        FileNotFoundError: no such file.
    """
    return read_fsdp_config(config).content


def read_fsdp_config(config: str | Path | Mapping[str, Any]) -> FsdpSettings:
    """The same, as the Trainer reads it.

    Raises:
        ValueError, FileNotFoundError: see :func:`check_fsdp_config`.
    """
    if not isinstance(config, Mapping):
        if not Path(config).is_file():
            raise FileNotFoundError(f"FSDP configuration {str(config)!r} does not exist")
        if Path(config).suffix in (".yaml", ".yml"):
            raise ValueError(
                f"{str(config)!r} is accelerate's configuration: give it to `accelerate launch --config_file`, and "
                "here a JSON file of the Trainer's"
            )
    content = load_json(config)
    keys = {str(key).removeprefix(_PREFIX): value for key, value in content.items()}
    faults = []
    version = keys.get("version", 2)
    if str(version) != "2":
        faults.append(
            f"FSDP version {version} is not supported: FSDP1 flattens parameters across matrices. Set "
            '"version": 2 in the FSDP configuration'
        )
    switches = {"reshard_after_forward": True, "activation_checkpointing": False}
    switches.update({"offload_params": False, "cpu_offload": False})
    for key, usual in switches.items():
        value = str(keys.get(key, usual)).lower()  # the Trainer and accelerate read texts too
        switches[key] = value in ("y", "yes", "t", "true", "on", "1")
        if not switches[key] and value not in ("n", "no", "f", "false", "off", "0", "none"):
            faults.append(f"{key} of the FSDP configuration must be true or false, got {keys[key]!r}")
    try:
        LowRankConfig.from_deepspeed(content)
    except ValueError as error:
        faults.append(str(error))
    if faults:
        raise ValueError("\n".join(faults))
    return FsdpSettings(
        content=content,
        keys=keys,
        reshard=switches["reshard_after_forward"],
        checkpointing=switches["activation_checkpointing"],
        offload=switches["offload_params"] or switches["cpu_offload"],
    )
