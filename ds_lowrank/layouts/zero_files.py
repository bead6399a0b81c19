"""The files that DeepSpeed's stages 1–3 save: where flat masters and the packed optimizer are in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ds_lowrank.checkpoint.folders import member, read_text

# In the model's file: what DeepSpeed keeps there of parameters that its optimizer does not own.
SHAPES, FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"

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


def model_files(tag: Path, ranks: int) -> list[Path]:
    """The model's file of each of the ranks that wrote a checkpoint; in stages 1 and 2 there is one for all."""
    if not saved_by_stage3(tag):
        return [tag / "mp_rank_00_model_states.pt"] * ranks
    return [tag / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]


def outside_weights(content: Any, path: Path, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """Weights that a rank holds of parameters that DeepSpeed's optimizer does not own, 1-D.

    Args:
        content: of the model's file, as it was read.
        path: of the file, for errors.
        sizes: name -> how many there have to be.

    Raises:
        ValueError: some are missing.
    """
    fragments = content.get(FRAGMENTS) if isinstance(content, Mapping) else None
    found = {}
    for name, size in sizes.items():
        tensor = fragments.get(name) if isinstance(fragments, Mapping) else None
        if not isinstance(tensor, Tensor) or tensor.numel() < size or not tensor.is_floating_point():
            raise ValueError(f"{path} lacks the weights of {name}, which the optimizer's file says are there")
        found[name] = tensor.reshape(-1)
    return found


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
