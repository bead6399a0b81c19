"""A plan as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ds_lowrank.planner.advice import Advice
from ds_lowrank.planner.memory import GIB, TERMS, MemoryPlan
from ds_lowrank.planner.others import Other
from ds_lowrank.planner.setup import Setup

_KINDS = {
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "fsdp2": "FSDP2",
    "ddp": "DDP",
    "one": "one process",
}
_MOMENTS = {
    "resident": "between steps",
    "forward": "forward",
    "loss": "loss",
    "head": "backward: head",
    "layer": "backward: layers",
    "wave": "backward: what is due",
    "embedding": "backward: end",
    "norm": "gradient norm",
    "step": "step",
    "refresh": "step with refreshes",
}


def print_plan(
    plan: MemoryPlan,
    gpu_memory: float,
    margin: float = 0.0,
    advice: Sequence[Advice] = (),
    console: Console | None = None,
    others: Sequence[Other] = (),
) -> None:
    """Print a plan: the terms at each optimizer's highest moment, all moments, what fits and what would.

    Args:
        plan: of :func:`plan_memory`.
        gpu_memory, margin: GiB of a GPU, and what is to stay free of it.
        advice: of :func:`advise`.
        console: where to.
        others: of :func:`others_of`.
    """
    console = console or Console(width=110, highlight=False)
    setup = plan.setup
    table = Table(title=f"{plan.model}, {plan.weights:,} weights, on the rank that needs most: GiB")
    table.add_column(_headline(plan))
    for name in plan.optimizers:
        table.add_column(name, justify="right")
    all_of = list(plan.optimizers.values())
    for term in TERMS:
        counts = [m.moments[m.peak_moment][term] for m in all_of]
        if term != "accumulators" or any(counts):
            table.add_row(f"{term}, at the peak", *map(_gib, counts))
    table.add_section()
    for moment, label in _MOMENTS.items():
        if any(moment in m.moments for m in all_of):
            sums = (sum(m.moments[moment].values()) if moment in m.moments else None for m in all_of)
            table.add_row(label, *("-" if count is None else _gib(count) for count in sums))
    table.add_section()
    table.add_row("peak", *(_gib(m.peak) for m in all_of), style="bold")
    table.add_row("at", *(_MOMENTS[m.peak_moment] for m in all_of))
    fits = ["yes" if plan.fits(gpu_memory, m.optimizer, margin) else "no" for m in all_of]
    table.add_row(f"fits {gpu_memory:g} GiB less {margin:g}" if margin else f"fits {gpu_memory:g} GiB", *fits)
    if setup.offload:
        table.add_row("on the CPU", *(_gib(m.host) for m in all_of))
    console.print(table)
    if others:
        console.print(_others(others, gpu_memory, margin))
    for note in plan.notes:
        console.print(f"- {note}", soft_wrap=True)
    if plan.fits(gpu_memory, margin=margin):
        return
    if not advice:
        console.print("nothing that is known here makes ds_lowrank fit", soft_wrap=True)
    for found in advice:
        console.print(f"fits with {', '.join(found.changes)}: {_gib(found.plan.ours.peak)} GiB", soft_wrap=True)


def _others(others: Sequence[Other], gpu_memory: float, margin: float) -> Table:
    table = Table(title="beside it: GiB")
    table.add_column("")
    for head in ("layout", "between steps", "peak", "at", f"fits {gpu_memory:g} GiB less {margin:g}", "without"):
        table.add_column(head, justify="right")
    for other in others:
        m = other.memory
        fits = "yes" if m.peak <= (gpu_memory - margin) * GIB else "no"
        at = _MOMENTS[m.peak_moment]
        table.add_row(other.name, _KINDS[other.layout], _gib(m.resident), _gib(m.peak), at, fits, other.lacks)
    return table


def _headline(plan: MemoryPlan) -> str:
    s = plan.setup
    return (
        f"{_KINDS[s.kind] if s.copies == 1 else f'HSDP, {s.copies} copies'}{' with offload' if s.offload else ''}, "
        f"{s.ranks} rank{'s' * (s.ranks > 1)}\n"
        f"{s.micro_batch} x {s.seq} tokens{', checkpointing' if s.checkpointing else ''}\n"
        f"{s.dtype}, {'no fp32 master' if s.master == 'bf16' else 'fp32 master'}, rank {plan.config.rank}\n"
        f"{s.rule}, {s.selection} subspaces{_gradients(s)}\n"
        f"{s.state_dtype} states, {f'{s.basis_dtype} bases' if s.method.selection.stored else 'no bases kept'}"
    )


def _gradients(s: Setup) -> str:
    if s.projected:
        return f"\nprojected gradients in {s.accumulator_dtype}"
    return ", layerwise" if s.layerwise else ""


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
