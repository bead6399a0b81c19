"""What is in a checkpoint, by parameter."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ds_lowrank import manifest
from ds_lowrank.checkpoint.opening import open_checkpoint, trainer_step
from ds_lowrank.states.blocks import count
from ds_lowrank.states.formats import Formats
from ds_lowrank.states.layout import StateLayout


def describe_checkpoint(folder: str | Path) -> dict[str, Any]:
    """Facts of a checkpoint, ready for JSON.

    Args:
        folder: see :func:`ds_lowrank.open_checkpoint`.

    Returns:
        ``folder``; ``layout`` and ``ranks`` that wrote it (``None`` where it does not say); ``step`` of the Trainer or
        of the optimizer; ``complete``: whether its marker is there (files are not hashed); ``file_bytes``;
        ``weights``, ``low_rank_bytes``, ``adamw_bytes`` (moments); ``state_dtype``, ``basis_dtype`` (``None`` where
        nothing is kept in it); ``slots``: what is kept of every matrix, a list of ``name``, ``axis`` (``rows`` of A,
        rows of the ``basis``, or one a ``matrix``), ``width`` (numbers a row: ``r`` or 1), ``format`` and ``bytes`` of
        all matrices together; ``matrices``: a list of ``name``, ``shape`` (m, n), ``rank``, ``step``, ``refreshes``,
        ``bytes``, ``overlaps`` with the basis before, oldest first; ``full_rank``: a list of ``name``, ``shape``.

    Raises:
        FileNotFoundError, ValueError: as :func:`ds_lowrank.open_checkpoint`.
    """
    source = open_checkpoint(folder)
    matrices: list[dict[str, Any]] = []
    for name, saved in source.matrices.items():
        numbers = source.numbers(name)
        matrices.append(
            {
                "name": name,
                "shape": [saved.short, saved.long] if saved.left else [saved.long, saved.short],
                "rank": saved.rank,
                "step": int(numbers["step"]),
                "refreshes": int(numbers["refreshes"]),
                "bytes": saved.bytes,
                "overlaps": [round(x, 4) for x in numbers["overlaps"].tolist() if x >= 0],
            }
        )
    full_rank = source.full_rank()
    kept = next((saved.states for saved in source.matrices.values()), StateLayout((), Formats()))
    used = {slot.format for slot in kept.slots.values()}
    slot_bytes: Counter[str] = Counter()
    for saved in source.matrices.values():
        slot_bytes.update(saved.slot_bytes)
    step = trainer_step(folder)
    return {
        "folder": str(folder),
        "layout": source.layout,
        "ranks": source.ranks,
        "step": max((m["step"] for m in matrices), default=None) if step is None else step,
        "complete": manifest.is_complete(folder),
        "file_bytes": sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()),
        "weights": sum(math.prod(shape) for shape in source.parameters().values()),
        "low_rank_bytes": sum(m["bytes"] for m in matrices),
        "adamw_bytes": sum(_moment_bytes(source.moment_dtype(n), math.prod(s)) for n, s in full_rank.items()),
        "state_dtype": kept.state_dtype if used & {"signed", "unsigned"} else None,
        "basis_dtype": kept.basis_dtype if "basis" in used else None,
        "slots": [
            {
                "name": name,
                "axis": slot.axis,
                "width": slot.width,
                "format": kept.format(name).name,
                "bytes": slot_bytes[name],
            }
            for name, slot in kept.slots.items()
        ],
        "matrices": matrices,
        "full_rank": [{"name": name, "shape": list(shape)} for name, shape in full_rank.items()],
    }


def _moment_bytes(dtype: torch.dtype, numel: int) -> int:
    return 2 * (numel * dtype.itemsize + (4 * count(numel) if dtype == torch.uint8 else 0))


def print_checkpoint(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print what :func:`describe_checkpoint` found as a table."""
    console = console or Console(highlight=False)
    ranks = "an unknown number of ranks" if facts["ranks"] is None else f"{facts['ranks']} rank(s)"
    marked = "complete" if facts["complete"] else "no marker: incomplete, or written without CheckpointCallback"
    console.print(f"{facts['folder']}: step {facts['step']}, {facts['layout']} on {ranks}, {marked}", soft_wrap=True)
    if facts["matrices"]:
        table = Table()
        for heading in (
            "matrix",
            "shape",
            "rank",
            "step",
            "refreshes",
            "MiB",
            "overlap with the basis before, newest last",
        ):
            right = heading not in ("matrix", "overlap with the basis before, newest last")
            table.add_column(heading, justify="right" if right else "left", overflow="fold")
        for m in facts["matrices"]:
            history = " ".join(f"{x:.2f}" for x in m["overlaps"][-6:])
            shape, size = f"{m['shape'][0]} x {m['shape'][1]}", f"{m['bytes'] / 2**20:.2f}"
            table.add_row(m["name"], shape, str(m["rank"]), str(m["step"]), str(m["refreshes"]), size, history)
        console.print(table)
        of = {"rows": "row of A", "basis": "row of the basis", "matrix": "matrix"}
        for slot in facts["slots"]:
            console.print(
                f"{slot['name']}: {slot['width']} number{'s' * (slot['width'] != 1)} a {of[slot['axis']]}, "
                f"{slot['format']}, {slot['bytes'] / 2**20:,.2f} MiB",
                soft_wrap=True,
            )
    else:
        console.print("no low-rank states: another optimizer's checkpoint, or weights alone")
    console.print(
        f"{facts['weights']:,} weights; low-rank states {facts['low_rank_bytes'] / 2**20:,.1f} MiB, AdamW's moments of "
        f"{len(facts['full_rank'])} other parameters {facts['adamw_bytes'] / 2**20:,.1f} MiB; files "
        f"{facts['file_bytes'] / 2**20:,.1f} MiB",
        soft_wrap=True,
    )
