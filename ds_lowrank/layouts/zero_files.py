"""The files that DeepSpeed's stages 1–3 save: where flat masters and the packed optimizer are in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_lowrank.checkpoint.folders import member, read_text

_OPTIMIZER_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def tag_folder(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files in what ``engine.save_checkpoint`` wrote; ``None``: nothing of DeepSpeed.

    Raises:
        ValueError: ``latest`` names no folder inside.
    """
    if any(folder.glob("*_optim_states.pt")):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        tag = member(folder, read_text(latest), latest)
        if not tag.is_dir():
            raise ValueError(f"{latest} names {tag.name}, and there is no such folder: the checkpoint is incomplete")
        return tag
    tags = sorted(folder.glob("global_step*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    return tags[-1] if tags else None


def optimizer_files(tag: Path) -> list[Path]:
    """The optimizer's files of all ranks, in rank order."""
    found = {int(match[1]): path for path in tag.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def saved_by_stage3(tag: Path) -> bool:
    """Whether stage 3 wrote it: the only one that saves the model in parts."""
    return any(tag.glob("zero_pp_rank_*_model_states.pt"))


def packed_state(content: Any, path: Path) -> tuple[list[Tensor], Any]:
    """Flat masters by unit, and the packed state of the optimizer inside, from one rank's file.

    Args:
        content: of the file, as it was read.
        path: of the file, for errors.

    Raises:
        ValueError: it is none of stages 1–3.
    """
    state = content.get("optimizer_state_dict") if isinstance(content, Mapping) else None
    if isinstance(state, Mapping):
        for masters, packed in (
            ("fp32_flat_groups", "optimizer_state_dict"),  # stage 3
            ("single_partition_of_fp32_groups", "base_optimizer_state"),
        ):
            if masters in state and packed in state:
                flats = state[masters]
                if isinstance(flats, list) and all(isinstance(flat, Tensor) for flat in flats):
                    return flats, state[packed]
    raise ValueError(f"{path} is damaged: it is no optimizer's file of DeepSpeed's stages 1 to 3")
