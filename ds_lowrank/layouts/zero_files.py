"""The files that DeepSpeed's stages 1–3 save: where flat masters and the packed optimizer are in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_OPTIMIZER_FILE = re.compile(r".*zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


def tag_folder(folder: Path) -> Path | None:
    """The folder with DeepSpeed's files in what ``engine.save_checkpoint`` wrote; ``None``: nothing of DeepSpeed."""
    if any(folder.glob("*_optim_states.pt")):
        return folder
    latest = folder / "latest"
    if latest.is_file():
        return folder / latest.read_text().strip()
    tags = sorted(folder.glob("global_step*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0))
    return tags[-1] if tags else None


def optimizer_files(tag: Path) -> list[Path]:
    """The optimizer's files of all ranks, in rank order."""
    found = {int(match[1]): path for path in tag.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))}
    return [found[rank] for rank in sorted(found)]


def saved_by_stage3(tag: Path) -> bool:
    """Whether stage 3 wrote it: the only one that saves the model in parts."""
    return any(tag.glob("zero_pp_rank_*_model_states.pt"))


def packed_state(content: Mapping[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    """Flat masters by unit, and the packed state of the optimizer inside, from one rank's file."""
    state = content["optimizer_state_dict"]
    if "fp32_flat_groups" in state:  # stage 3
        return state["fp32_flat_groups"], state["optimizer_state_dict"]
    return state["single_partition_of_fp32_groups"], state["base_optimizer_state"]
