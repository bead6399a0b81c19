"""What a step sends and computes, as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ds_lowrank.planner.choice import Comparison
from ds_lowrank.planner.memory import GIB
from ds_lowrank.planner.wire import BASES, PURPOSES


def print_wire(
    found: Comparison, network: float | None = None, tflops: float | None = None, console: Console | None = None
) -> None:
    """Print what a rank sends in a step by purpose, and seconds where rates are known.

    Args:
        found: of :func:`ds_lowrank.planner.compare`.
        network: Gb/s of a rank.
        tflops: TFLOP/s of the device in the products of a step.
        console: where to.
    """
    console = console or Console(width=110, highlight=False)
    setup = found.full.plan.setup
    ours = {"layerwise" if setup.layerwise else "full": found.full.traffic}
    if found.projected is not None:
        ours["projected"] = found.projected.traffic
    columns = {"AdamW, 8-bit AdamW": found.adamw, **{f"ds_lowrank, {name}": t for name, t in ours.items()}}
    table = Table(title="what a rank sends in a step: GiB")
    table.add_column(f"{setup.accumulation} micro-step{'s' * (setup.accumulation > 1)} a step")
    for name in columns:
        table.add_column(name, justify="right")
    for purpose in PURPOSES:
        if any(purpose in traffic.sent for traffic in columns.values()):
            table.add_row(purpose, *(_gib(t.sent.get(purpose, 0)) for t in columns.values()))
    table.add_section()
    table.add_row("all", *(_gib(t.bytes) for t in columns.values()), style="bold")
    if network is not None:
        table.add_row(f"seconds at {network:g} Gb/s", *(f"{t.seconds(network):.3f}" for t in columns.values()))
    table.add_row("TFLOP of projecting and lifting", *(f"{t.flops / 1e12:.2f}" for t in columns.values()))
    if tflops is not None:
        table.add_row(f"seconds at {tflops:g} TFLOP/s", *(f"{t.computing(tflops):.3f}" for t in columns.values()))
    console.print(table)
    own = found.model_flops / 1e12
    console.print(f"- the model's own products are {own:.0f} TFLOP of a rank's step", soft_wrap=True)
    joined = max((t.sent.get(BASES, 0.0) for t in ours.values()), default=0.0)
    if joined:
        console.print(
            f"- shard_projection false would send none of the {_gib(joined)} GiB of bases, and keep them whole on "
            "every rank",
            soft_wrap=True,
        )


def _gib(count: float) -> str:
    return f"{count / GIB:.3f}"
