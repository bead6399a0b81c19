"""What an optimizer will do, in numbers: what is projected, what is not, what it costs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from ds_lowrank.full_rank.adamw import moment_bytes
from ds_lowrank.layouts import Layout, is_outside
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.states.layout import StateLayout


@dataclass(frozen=True)
class Report:
    """Numbers of one optimizer on one rank's view; all ranks compute the same.

    Attributes:
        layout: kind of sharding found.
        ranks: data-parallel ranks.
        projected: (m, n, r) -> number of matrices.
        projected_numel: weights in projected matrices.
        full_rank: names and shapes of the parameters that are not projected.
        full_rank_numel: weights in them.
        narrow: names of those of them that ``all-linear`` means and whose short side does not exceed the rank.
        shared: projected matrices that lie on several ranks.
        moved: of which rows have to move in every step.
        state_bytes: optimizer state of each rank: what is kept of matrices, and AdamW's moments of the rest.
        adamw_bytes: what full-rank AdamW would hold on each rank under the same sharding.
        gap, selection: as configured; gap 0: bases are not refreshed, they move in every step.
        notes: what the framework does unasked.
        rule: as configured.
        slots: what is kept of every matrix, and as what.
    """

    layout: str
    ranks: int
    projected: dict[tuple[int, int, int], int]
    projected_numel: int
    full_rank: list[tuple[str, tuple[int, ...]]]
    full_rank_numel: int
    narrow: list[str]
    shared: int
    moved: int
    state_bytes: list[int]
    adamw_bytes: list[int]
    gap: int
    selection: str
    notes: tuple[str, ...] = ()
    rule: str = "adamw"
    slots: dict[str, str] = field(default_factory=dict)


def describe(optimizer: Any) -> Report:
    """Find and verify the layout and print, on rank 0, what is projected and what it costs. Collective.

    Args:
        optimizer: a :class:`LowRankAdamW`, or what accelerate or DeepSpeed wrapped it in.

    Raises:
        ValueError: nothing is projected, or it is another optimizer.
        ds_lowrank.LayoutError: the sharding is not supported.
    """
    inner = unwrap(optimizer)
    report = make_report(inner)
    if inner.layout.ranks.rank == 0:
        print_report(report)
    return report


def unwrap(optimizer: Any) -> LowRankAdamW:
    """The optimizer inside what accelerate, DeepSpeed or Lightning wrapped it in.

    Raises:
        ValueError: it is another optimizer.
    """
    seen = optimizer
    # Lightning's wrapper is of a subclass, with a copy of what the optimizer has: an instance, and not the optimizer.
    while hasattr(seen, "optimizer"):
        seen = seen.optimizer
    if not isinstance(seen, LowRankAdamW):
        raise ValueError(
            f"the run uses {type(seen).__name__} and not LowRankAdamW. Give the Trainer "
            "optimizer_cls_and_kwargs=ds_lowrank.trainer_optimizer(...); under DeepSpeed it silently replaces what "
            "comes by optimizers=(optimizer, None)"
        )
    return seen


def make_report(optimizer: LowRankAdamW) -> Report:
    """Describe an optimizer. Collective at its first call: it finds the layout.

    Raises:
        ValueError: nothing is projected.
        ds_lowrank.LayoutError: the sharding is not supported.
    """
    layout, plans = optimizer.layout, optimizer.plans
    if not plans:
        raise ValueError("nothing is projected: check optim_target_modules, or train with plain AdamW")
    ranks = layout.ranks.size
    names = {p.parameter for p in plans}
    # torch's AdamW keeps moments in the dtype of the weights that it is given.
    adamw = {m.name: layout.dtype(m.name).itemsize for m in optimizer.members}
    numel = {m.name: math.prod(m.shape) for m in optimizer.members}
    rest = [m for m in optimizer.members if m.name not in names]
    low = [sum(_state_bytes(p, k, optimizer.method.states) for p in plans) for k in range(ranks)]
    held = [sum(_adamw_numbers(layout, p, k) for p in plans) for k in range(ranks)]
    # Full-rank parameters are cut evenly, whatever they are; under DDP our moments of them, and not AdamW's.
    over = len(layout.ranks.shard_group)
    ours = optimizer.method.formats.state_dtype
    kept = sum(moment_bytes(ours, layout.dtype(m.name), numel[m.name]) for m in rest)
    full = -(-kept // over)
    theirs = -(-sum(2 * numel[m.name] * adamw[m.name] for m in rest) // (1 if layout.replicated else over))
    return Report(
        layout=layout.kind,
        ranks=ranks,
        projected=dict(Counter((*p.shape, p.r) for p in plans)),
        projected_numel=sum(p.shape[0] * p.shape[1] for p in plans),
        full_rank=[(m.name, m.shape) for m in rest],
        full_rank_numel=sum(numel[m.name] for m in rest),
        narrow=list(optimizer.narrow),
        shared=sum(p.shared for p in plans),
        moved=sum(p.moves for p in plans),
        state_bytes=[state + full for state in low],
        adamw_bytes=[2 * count + theirs for count in held],
        gap=plans[0].gap if optimizer.method.selection.periodic else 0,
        selection=optimizer.config.selection,
        notes=tuple(optimizer.notes),
        rule=optimizer.config.rule,
        slots={name: optimizer.method.states.format(name).name for name in optimizer.method.states.slots},
    )


def print_report(report: Report, console: Console | None = None, most_names: int = 6) -> None:
    """Print a report as the table that a run shows before its first step."""
    console = console or Console(width=110, highlight=False)
    when = f"refreshed every {report.gap} steps" if report.gap else "which move in every step"
    table = Table(title=f"ds_lowrank: {report.selection} subspaces, {when}", min_width=76)
    table.add_column("projected matrices")
    for heading in ("count", "rank", "weights"):
        table.add_column(heading, justify="right")
    for (m, n, r), count in report.projected.items():
        table.add_row(f"{m} x {n}", str(count), str(r), f"{m * n * count:,}")
    table.add_row("all", str(sum(report.projected.values())), "", f"{report.projected_numel:,}", style="bold")
    console.print(table)
    names = [f"{name} {shape}" for name, shape in report.full_rank]
    console.print(
        f"not projected (AdamW): {len(report.full_rank)} parameters, {report.full_rank_numel:,} weights: "
        + _first(names, most_names)
    )
    if report.narrow:
        console.print(
            f"of these, linear but with a short side not above the rank, so that a subspace saves nothing: "
            f"{len(report.narrow)}: " + _first(report.narrow, most_names)
        )
    ours, adamw = max(report.state_bytes), max(report.adamw_bytes)
    console.print(
        f"optimizer state per rank: {_mib(ours)} MiB, AdamW under the same sharding: {_mib(adamw)} MiB "
        f"(ratio {ours / adamw:.3f})"
    )
    kept = ", ".join(f"{name} ({kind})" for name, kind in report.slots.items())
    console.print(f"rule {report.rule}; kept of every matrix: {kept or 'nothing'}")
    console.print(
        f"layout: {report.layout} on {report.ranks} rank{'s' * (report.ranks > 1)}; matrices that lie on several "
        f"ranks: {report.shared}, of which rows move in every step: {report.moved}; weights verified"
    )
    for note in report.notes:
        console.print(note)


def _state_bytes(plan: MatrixPlan, rank: int, states: StateLayout) -> int:
    share = plan.shares[rank]
    return 0 if share is None else states.bytes(share.rows, plan.kept(rank), plan.r, plan.dtype)


def _adamw_numbers(layout: Layout, plan: MatrixPlan, rank: int) -> int:
    """Bytes of one moment that AdamW would keep of a matrix in its place."""
    if is_outside(layout, plan.parameter):  # DeepSpeed would have it in a flat buffer, with a master copy
        return -(-plan.shape[0] * plan.shape[1] * plan.dtype.itemsize // layout.ranks.size)
    part = plan.parts[rank]
    return 0 if part is None else part.numel * plan.weight_dtype.itemsize


def _first(names: list[str], most: int) -> str:
    more = len(names) - most
    return ", ".join(names[:most]) + (f", and {more} more" if more > 0 else "")


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f}"
