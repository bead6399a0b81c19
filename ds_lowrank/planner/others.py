"""What others need for the same model: the incumbents that a plan's own columns do not have.

24-bit masters (bf16 weights with 8 bits more of each, 8-bit moments) take 7 bytes a parameter with its gradient, 5
where gradients are released in the backward pass, which leaves no accumulation and no clipping. galore-torch's
layerwise 8-bit optimizer runs on one card, without accumulation and clipping too.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from ds_lowrank.planner.activations import Activations, activations
from ds_lowrank.planner.arrangement import arrange
from ds_lowrank.planner.formats import adamw8bit_bytes
from ds_lowrank.planner.frameworks import Frame, frames
from ds_lowrank.planner.memory import MemoryPlan, RankMemory, on_rank
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import Setup
from ds_lowrank.planner.states import States, held_tensors

SPLIT, RELEASED, GALORE = "24-bit-master AdamW", "the same, gradients released", "galore-torch 8-bit, layerwise"
# Of 24-bit masters beside the bf16 weight and its gradient: the rest of the master, and two moments.
_SPLIT_BYTES = 3


@dataclass(frozen=True)
class Other:
    """One of them.

    Attributes:
        name: ours for it.
        layout: where it runs: the plan's kind, or ``one``.
        memory: on the rank that needs most.
        lacks: what it cannot do.
    """

    name: str
    layout: str
    memory: RankMemory
    lacks: str


def others_of(model: Model, plan: MemoryPlan) -> list[Other]:
    """Those that can be had in the plan's layout (24-bit masters, not with offload), and galore-torch on one card."""
    setup = plan.setup.replace(gradients="full", layerwise=False)
    a = Activations(0, 0, 0, 0, 0, 0)
    if model.decoder is not None:
        a = activations(model.decoder, setup.tokens, setup.width, setup.checkpointing)
    found = []
    if setup.dtype == "bf16" and not setup.offload:
        found.append(_split(model, plan, setup.replace(master="bf16"), a, released=False))
        if setup.kind in ("one", "fsdp2") and setup.accumulation == 1:
            found.append(_split(model, plan, setup.replace(master="bf16"), a, released=True))
    return [*found, _galore_alone(model, plan, setup, a)]


def _split(model: Model, plan: MemoryPlan, setup: Setup, a: Activations, released: bool) -> Other:
    arrangement = arrange(model, plan.config, setup)
    held = [dataclasses.replace(f, master=0) for f in frames(model, arrangement, setup)]
    if released:
        held = [_release(model, f, setup) for f in held]
    name = RELEASED if released else SPLIT
    memories = []
    for rank, numels in enumerate(held_tensors(arrangement, setup)):
        states = States(_SPLIT_BYTES * sum(numels))
        memories.append(on_rank(name, setup, held[rank], a, rank, states, (0, 0, 0)))
    most = max(memories, key=lambda m: m.peak)
    return Other(name, setup.kind, most, "accumulation, clipping" if released else "")


def _release(model: Model, frame: Frame, setup: Setup) -> Frame:
    """One parameter's gradient at a time, or one FSDP2 unit's."""
    units = [model.numel_of(layer) for layer in model.layers] if setup.kind == "fsdp2" else []
    alone = max([*units, *(0 if units else math.prod(shape) for shape in model.shapes.values())], default=0)
    gradients = setup.master_width * -(-alone // setup.shards)
    return dataclasses.replace(frame, gradients=gradients, gradients_stay=False, buckets=0, buckets_stay=0)


def _galore_alone(model: Model, plan: MemoryPlan, setup: Setup, a: Activations) -> Other:
    """galore-torch 1.0's ``GaLoreAdamW8bit`` on bf16 weights, a hook a parameter: projectors are bf16 and whole."""
    alone = Setup(
        "one", 1, setup.seq, setup.micro_batch, checkpointing=setup.checkpointing, dtype=setup.dtype, master="bf16"
    )
    arrangement = arrange(model, plan.config.replace(gradients="full", layerwise=False), alone)
    moments = bases = largest = 0
    for p in arrangement.plans:
        moments += adamw8bit_bytes(p.long * p.r)
        bases += 2 * p.short * p.r
        # The gradient in fp32 and both sides of its decomposition.
        largest = max(largest, 4 * (p.long * p.short + p.long * p.short + p.short**2))
    rest = (shape for name, shape in model.shapes.items() if name not in arrangement.projected)
    moments += sum(adamw8bit_bytes(math.prod(shape)) for shape in rest)
    frame = _release(model, frames(model, arrangement, alone)[0], alone)
    memory = on_rank(GALORE, alone, frame, a, 0, States(moments, bases, largest), (0, largest, 0))
    # The hook decomposes in the backward pass.
    layer = memory.moments["layer"]
    memory.moments["layer"] = {**layer, "temporaries": layer["temporaries"] + largest}
    return Other(GALORE, "one", memory, "accumulation, clipping, more than one card")
