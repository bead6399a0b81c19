"""Which checkpoint a run goes on with: found, checked and refused before anything is started."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from sharding import world_size

from ds_lowrank import manifest
from ds_lowrank.checkpoint.opening import check_checkpoint, trainer_step


def resolve_resume(args: Any) -> None:
    """Find the checkpoint to go on with; every rank checks a share of it.

    Args:
        args: the training arguments; ``resume``, ``resume_from_checkpoint`` and ``output_dir`` are read,
            ``resume_from_checkpoint`` (a folder, or ``None``) and ``resumed_step`` are set.

    Raises:
        ValueError: there is no checkpoint where one was asked for; it is incomplete or damaged; or a complete one of a
            later step lies in ``output_dir``.
    """
    wanted: str | None = args.resume_from_checkpoint
    output = Path(str(args.output_dir))
    folder, flag = None, "--resume_from_checkpoint"
    newest = (wanted or "").lower() == "true"
    if args.resume or newest:
        folder = _newest(output)
        if folder is not None:
            flag = "--resume" if args.resume else flag
        elif newest:
            raise ValueError(
                f"--resume_from_checkpoint: there is no checkpoint in {output} that is complete; see --save_every, and "
                "--resume, which starts from scratch then"
            )
    if folder is None and wanted:
        folder = Path(wanted)
        if not folder.is_dir():
            raise ValueError(f"--resume_from_checkpoint: there is no checkpoint in {folder}; see --save_every")
    step = 0
    if folder is not None:
        try:
            found = manifest.verify(folder, (_rank(), world_size()))
            if found.facts.get("model_only"):
                raise ValueError(f"{folder} was written with --save_only_model and has no optimizer to go on with")
            step = _steps_made(folder)
            check_checkpoint(folder)
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from error
        if manifest.is_superseded(folder):
            raise ValueError(
                f"{flag}: an earlier run left {folder}, and a later one started at a lower step: python -m "
                f"ds_lowrank.manifest {folder} makes it count again"
            )
    args.resume_from_checkpoint, args.resumed_step = None if folder is None else str(folder), step
    beyond = manifest.complete_beyond(output, step)
    if beyond:
        raise ValueError(
            f"this run starts at step {step} and {output} has checkpoints of later steps "
            f"({', '.join(later.name for later in beyond)}): resume from the newest (--resume), delete them, or write "
            "into another directory (--run_name, --output_dir)"
        )
    if args.resume and _rank() == 0:
        there = (
            f"going on with {folder}, step {step}" if folder else f"no complete checkpoint in {output}: from scratch"
        )
        print(f"--resume: {there}", flush=True)


def _steps_made(folder: Path) -> int:
    step = trainer_step(folder)
    if step is None:
        raise ValueError(f"{folder} has no trainer_state.json: it is no checkpoint of the Trainer")
    return step


def _newest(output: Path) -> Path | None:
    with warnings.catch_warnings():
        if _rank():  # once is enough
            warnings.simplefilter("ignore")
        return manifest.newest_complete(output)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
