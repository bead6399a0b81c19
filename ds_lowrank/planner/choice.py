"""Which of ``gradients: full`` and ``projected`` a run should take: by memory first, then by what a step costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ds_lowrank.planner.arrangement import arrange
from ds_lowrank.planner.memory import GIB, MemoryPlan, plan_setup
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import Setup
from ds_lowrank.planner.wire import Traffic, adamw_traffic, our_traffic


@dataclass(frozen=True)
class Way:
    """A run with one of the two.

    Attributes:
        plan: its memory.
        traffic: what its steps send and compute.
    """

    plan: MemoryPlan
    traffic: Traffic


@dataclass(frozen=True)
class Comparison:
    """Both ways of one run, and AdamW's.

    Attributes:
        full, projected: ``None`` where the run cannot be had so.
        refused: why there is no ``projected``.
        adamw: under the same layout.
        model_flops: of the model's own products on a rank in a step: 6 a weight and token, 8 with checkpointing.
    """

    full: Way
    projected: Way | None
    refused: str
    adamw: Traffic
    model_flops: float

    def to_dict(self) -> dict[str, Any]:
        """Numbers ready for JSON: bytes that a rank sends in a step by purpose, peaks, and products."""
        ways = {"full": self.full, "projected": self.projected}
        found: dict[str, Any] = {"AdamW": {"sent": dict(self.adamw.sent)}}
        for name, way in ways.items():
            if way is not None:
                found[name] = {"sent": dict(way.traffic.sent), "flops": way.traffic.flops, "peak": way.plan.ours.peak}
        return found


def compare(model: Model, plan: MemoryPlan) -> Comparison:
    """The planned run with full gradients (and ``layerwise`` as it has it) and with projected ones."""
    setup, config = plan.setup, plan.config

    def way(run: Setup) -> Way:
        options = config.replace(gradients=run.gradients, layerwise=run.layerwise)
        arrangement = arrange(model, options, run)
        of = plan if run == setup else plan_setup(model, options, run, arrangement)
        return Way(of, our_traffic(model, arrangement, run, options))

    full = way(setup.replace(gradients="full"))
    projected, refused = None, ""
    try:
        projected = way(setup.replace(gradients="projected", layerwise=False))
    except ValueError as error:
        refused = str(error)
    flops = (8.0 if setup.checkpointing else 6.0) * model.numel * setup.tokens * setup.accumulation
    return Comparison(full, projected, refused, adamw_traffic(model, setup), flops)


def verdict(
    found: Comparison,
    gpu_memory: float,
    margin: float = 0.0,
    network: float | None = None,
    tflops: float | None = None,
) -> str:
    """One sentence: which of the two to take for this run, and why.

    Args:
        found: of :func:`compare`.
        gpu_memory, margin: GiB of a GPU, and what is to stay free of it.
        network: Gb/s of a rank, ``None``: not known.
        tflops: TFLOP/s of the device in the products of a step, ``None``: not known.
    """
    full, projected = found.full, found.projected
    if projected is None:
        return f"take gradients full: projected cannot be had here ({found.refused})"
    fits = [way.plan.fits(gpu_memory, margin=margin) for way in (full, projected)]
    less = (full.plan.ours.peak - projected.plan.ours.peak) / GIB
    name = "layerwise" if full.plan.setup.layerwise else "full"
    if fits == [False, True]:
        return f"take gradients projected: {name} does not fit, and needs {less:.2f} GiB more"
    if fits == [True, False]:
        return f"take {name}: projected does not fit, and needs {-less:.2f} GiB more"
    if fits == [False, False]:
        which = "projected" if less > 0 else name
        return f"neither fits; {which} needs {abs(less):.2f} GiB less"
    saved = full.traffic.bytes - projected.traffic.bytes
    extra = projected.traffic.flops - full.traffic.flops
    if saved <= 0:
        sends = (
            "sends nothing either way" if full.plan.setup.ranks == 1 else f"sends {-saved / GIB:.2f} GiB more a step"
        )
        return f"take {name}: it fits, and projected {sends} and computes {extra / 1e12:.2f} TFLOP more"
    costs = f"sends {saved / GIB:.2f} GiB a step less than {name} and computes {extra / 1e12:.2f} TFLOP more"
    if network is not None and tflops is not None:
        seconds, computing = saved * 8 / (network * 1e9), extra / (tflops * 1e12)
        which = "gradients projected" if seconds > computing else name
        return (
            f"take {which}: projected {costs}, {seconds:.3f} s on the wire against {computing:.3f} s of products, as "
            "far as neither hides behind the model's own"
        )
    # Gb/s at which both take as long, for a device of 1 TFLOP/s.
    even = saved * 8 / 1e9 / (extra / 1e12) if extra > 0 else float("inf")
    if network is not None:
        when = f"on a device of more than {network / even:.1f} TFLOP/s (--tflops)"
    elif tflops is not None:
        when = f"on less than {even * tflops:.1f} Gb/s a rank (--network)"
    else:
        when = f"on less than {even:.2f} Gb/s a rank for each TFLOP/s of the device (--network, --tflops)"
    return f"both fit: take gradients projected {when}, for it {costs}"
