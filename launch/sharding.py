"""Who shards this run: the flags and the launcher's variables, checked before anything is started.

The Trainer and accelerate fall back to one process, or to plain data parallelism, without a word; whoever asked for
something else is told here, or by :func:`check_trainer` once the Trainer has chosen.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

import ds_lowrank
from ds_lowrank.config import load_json
from ds_lowrank.integrations.fsdp import check_fsdp_config
from ds_lowrank.integrations.transformers import check_trainer as check_chosen
from ds_lowrank.integrations.transformers import wants_fsdp


def world_size() -> int:
    """Ranks of this run, as its launcher exported them; known before torch.distributed starts."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_config(deepspeed: str | None, fsdp_config: str | None, lowrank_config: str | None = None) -> dict[str, Any]:
    """Content of the one configuration file of a run, checked; empty without one.

    Raises:
        ValueError: several are given, or a setting is not supported.
        FileNotFoundError: no such file.
    """
    if lowrank_config is not None:
        if deepspeed is not None or fsdp_config is not None:
            raise ValueError("--lowrank_config is for one process and DDP: the other file has a lowrank block itself")
        return load_json(lowrank_config)
    if deepspeed is not None and fsdp_config is not None:
        raise ValueError("--deepspeed and --fsdp_config exclude each other: give one of them")
    if fsdp_config is not None:
        return check_fsdp_config(fsdp_config)
    if deepspeed is None:
        return {}
    content = ds_lowrank.check_deepspeed_config(deepspeed)
    zero = content["zero_optimization"]
    if zero["stage"] == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise ValueError(
            "stage 3 saves no model that can be loaded unless zero_optimization.stage3_gather_16bit_weights_on_"
            "model_save is true: set it"
        )
    return content


def accelerates_deepspeed_file() -> str | None:
    """DeepSpeed's file in the configuration of ``accelerate launch``, which the script then reads as its own."""
    if not _is_true("ACCELERATE_USE_DEEPSPEED"):
        return None
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if name.lower() == "none" else name


def check_launch(args: Any) -> None:
    """Refuse a launcher that does not fit the flags.

    Args:
        args: the training arguments; ``fsdp``, ``fsdp_config`` and ``deepspeed`` are read.
    """
    launched = "RANK" in os.environ
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if args.deepspeed and wants_fsdp(args):
        raise ValueError("DeepSpeed and FSDP exclude each other: give --deepspeed or --fsdp_config")
    if by_accelerate and not launched and "MASTER_PORT" in os.environ:
        raise ValueError(
            "accelerate launch started one process where several were asked for, as it does with --cpu or without "
            "GPUs: add --multi_gpu (on a CPU too), or start this with torchrun"
        )
    if args.deepspeed and not launched:
        raise ValueError(
            "--deepspeed needs a launcher: start this with `deepspeed launch/pretrain.py ...` (or torchrun), or "
            "leave --deepspeed out to train in one process"
        )
    if wants_fsdp(args) and not launched:
        raise ValueError(
            "--fsdp_config needs a launcher: start this with `torchrun --nproc-per-node N launch/pretrain.py ...`, or "
            "leave --fsdp_config out to train in one process"
        )
    gpus = 0 if args.use_cpu else torch.cuda.device_count()
    if not launched and gpus > 1:
        raise ValueError(
            f"one process sees {gpus} GPUs, on which the Trainer would copy the model (DataParallel): start this with "
            f"`torchrun --nproc-per-node {gpus} launch/pretrain.py ...` or deepspeed, or set CUDA_VISIBLE_DEVICES"
        )
    if _is_true("ACCELERATE_USE_CPU") and args.deepspeed:
        raise ValueError(
            "accelerate launch --cpu drops DeepSpeed without a word: start this with `deepspeed` or torchrun"
        )
    if _is_true("ACCELERATE_USE_DEEPSPEED") and not args.deepspeed:
        raise ValueError(
            "accelerate launch brings a DeepSpeed configuration of its own: name a file in it, deepspeed_config_file: "
            "configs/zero2.json, as configs/accelerate_zero2.yaml does, or give one to the script by --deepspeed"
        )


def check_checkpoints(args: Any, low_rank: bool) -> None:
    """Refuse to resume from what would not load the optimizer as it was.

    Our optimizer goes on with what any layout has saved; others are loaded by the frameworks themselves.

    Args:
        args: the training arguments; ``resume_from_checkpoint`` is a folder or empty.
        low_rank: whether the optimizer is ours.
    """
    if args.resume_from_checkpoint and not low_rank:
        _check_resume(args, Path(args.resume_from_checkpoint))


def check_trainer(trainer: Trainer, low_rank: bool) -> None:
    """Refuse what the Trainer chose where something else was asked for.

    Raises:
        ValueError: see :func:`ds_lowrank.integrations.transformers.check_trainer`.
    """
    check_chosen(trainer, low_rank)


def _check_resume(args: Any, folder: Path) -> None:
    flag = f"--resume_from_checkpoint: {folder}"
    by_deepspeed = bool(list(folder.glob("global_step*")))
    if by_deepspeed != bool(args.deepspeed):
        wrote, here = ("with", "without") if by_deepspeed else ("without", "with")
        raise ValueError(f"{flag} was written {wrote} DeepSpeed and this run is {here} it: the optimizer would be lost")
    if not by_deepspeed:
        return
    ranks = len(list(folder.glob("global_step*/*zero_pp_rank_*_optim_states.pt")))
    if ranks and ranks != world_size():
        raise ValueError(
            f"{flag} was written by {ranks} ranks and this run has {world_size()}: start {ranks} (DeepSpeed does not "
            "load AdamW's states on another number; ours go on anywhere)"
        )
    stage = ds_lowrank.check_deepspeed_config(args.deepspeed)["zero_optimization"]["stage"]
    partitioned = bool(list(folder.glob("global_step*/*zero_pp_rank_*_model_states.pt")))
    if partitioned != (stage == 3):
        raise ValueError(
            f"{flag} was {'' if partitioned else 'not '}written by stage 3 and this run has stage {stage}: resume with "
            "the stage that wrote it"
        )


def _is_true(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")
