"""``accelerate launch --config_file``: the framework's part of such a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def is_accelerates(config: Any) -> bool:
    """Whether ``config`` is the path of a YAML file, as accelerate's are."""
    return isinstance(config, (str, Path)) and Path(config).suffix in (".yaml", ".yml")


def deepspeed_file(path: str | Path) -> tuple[str, str | None]:
    """The DeepSpeed file that an accelerate configuration names, and the dtype it asks for.

    Raises:
        ValueError: it is no DeepSpeed configuration, or names no file.
        FileNotFoundError: no such file.
    """
    content = _read(path, "DEEPSPEED")
    block = content.get("deepspeed_config")
    name = block.get("deepspeed_config_file") if isinstance(block, Mapping) else None
    if not isinstance(name, str) or name.lower() == "none":
        raise ValueError(
            f"{str(path)!r}: accelerate makes a DeepSpeed configuration of its own of this, which is not planned: name "
            "a file in it, deepspeed_config_file: configs/zero2.json, as configs/accelerate_zero2.yaml does"
        )
    return name, _dtype(content)


def fsdp_block(path: str | Path) -> tuple[dict[str, Any], str | None]:
    """The FSDP block of an accelerate configuration, and the dtype it asks for.

    Raises:
        ValueError: it is no FSDP configuration.
        FileNotFoundError: no such file.
    """
    content = _read(path, "FSDP")
    block = content.get("fsdp_config")
    if not isinstance(block, Mapping):
        raise ValueError(f"{str(path)!r} has no fsdp_config block")
    # accelerate's default, other than the Trainer's.
    return {"fsdp_version": 1, **block}, _dtype(content)


def _dtype(content: Mapping[str, Any]) -> str | None:
    # YAML reads a bare `no` as false.
    known = {"bf16": "bf16", "fp16": "fp16", "no": "fp32", "false": "fp32"}
    return known.get(str(content.get("mixed_precision")).lower())


def _read(path: str | Path, kind: str) -> dict[str, Any]:
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"configuration {str(path)!r} does not exist")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"configuration {str(path)!r} must hold a mapping, as accelerate's do")
    found = content.get("distributed_type")
    if found != kind:
        raise ValueError(f"{str(path)!r}: accelerate's distributed_type is {found!r} there, and has to be {kind} here")
    return content
