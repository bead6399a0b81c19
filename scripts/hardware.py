"""The tables of docs/hardware.md: what to start with on which GPUs, and the largest model that fits.

python scripts/hardware.py

Of the first table configurations are tried in the order of CANDIDATES, the cheapest first: what costs work done twice,
then precision of the states, then traffic, then the CPU's memory. Of the second each row is one of COMMANDS. The third
asks, for each kind of machine, for the largest model of LLaMA's shape that each optimizer trains. Nothing is run:
figures are ``ds-lowrank plan``'s.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.config import LowRankConfig
from ds_lowrank.planner import MemoryPlan, Model, Setup, others_of, plan_memory, plan_setup, read_model
from ds_lowrank.planner.others import GALORE, SPLIT

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
MARGIN = 1.0
# Tokens of a sequence, and GPUs x GiB.
MACHINES: dict[str, tuple[int, tuple[tuple[int, int], ...]]] = {
    "llama_350m": (1024, ((1, 8), (1, 12))),
    "llama_1b": (2048, ((1, 12), (1, 24), (2, 24), (8, 12), (4, 24), (8, 24))),
    "llama_7b": (2048, ((1, 24), (2, 24), (4, 24), (8, 12), (8, 24), (16, 24), (4, 48), (8, 80))),
}
CHECKPOINTING = "--activation_checkpointing"


@dataclass(frozen=True)
class Candidate:
    """A file of configs/ with flags of launch/pretrain.py.

    Attributes:
        file: its name.
        flags: on top of it, and of ``--rank``.
    """

    file: str
    flags: tuple[str, ...] = ()

    def plan(self, model: Path, ranks: int, rank: int, seq: int) -> MemoryPlan:
        """One sequence a rank and micro-step."""
        options: dict[str, Any] = {"checkpointing": CHECKPOINTING in self.flags}
        kind = "fsdp_config" if self.file.startswith("fsdp2") else "deepspeed"
        options[kind] = ROOT / "configs" / self.file
        return plan_memory(model, ranks, rank=rank, seq=seq, micro_batch=1, **options)


CANDIDATES = (
    Candidate("zero2.json"),
    Candidate("zero2.json", (CHECKPOINTING,)),
    Candidate("zero2_7b_8x24gb.json", (CHECKPOINTING,)),
    Candidate("fsdp2_7b_4x24gb.json", (CHECKPOINTING,)),
    Candidate("zero3.json", (CHECKPOINTING,)),
    Candidate("zero3_7b_8x12gb.json", (CHECKPOINTING,)),
    Candidate("zero2_bf16_master.json", (CHECKPOINTING,)),
    Candidate("zero2_offload.json", (CHECKPOINTING,)),
)


@dataclass(frozen=True)
class Command:
    """bf16 weights without an fp32 master copy, 2048 tokens, activation checkpointing, 8 micro-steps a step.

    Attributes:
        model: a file of configs/, without its ending.
        gpus, memory: GPUs x GiB.
        file: of configs/.
        layerwise: in the place of the file's projected gradients; no accumulation and no clipping then.
    """

    model: str
    gpus: int
    memory: int
    file: str
    layerwise: bool = False

    @property
    def flags(self) -> str:
        """Of ``launch/pretrain.py`` behind the file's."""
        if self.layerwise:
            return "--gradients full --layerwise true --grad_clipping 0"
        return "--gradient_accumulation 8" + (" " + SYNC if self.gpus > 1 else "")

    def plan(self) -> MemoryPlan:
        """One sequence a rank and micro-step."""
        model = ROOT / "configs" / f"{self.model}.json"
        kind = "fsdp_config" if self.file.startswith("fsdp2") else "lowrank_config"
        content = json.loads((ROOT / "configs" / self.file).read_text())
        content["lowrank"].setdefault("rank", json.loads(model.read_text())["hidden_size"] // 4)
        if self.layerwise:
            content["lowrank"].update(gradients="full", layerwise=True)
        return plan_memory(
            model,
            self.gpus,
            seq=2048,
            micro_batch=1,
            accumulation=1 if self.layerwise else 8,
            checkpointing=True,
            master="bf16",
            no_sync=False,
            **{kind: content},
        )


SYNC = """--accelerator_config '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}'"""
COMMANDS = (
    Command("llama_7b", 1, 24, "projected.json"),
    Command("llama_7b", 1, 24, "projected.json", layerwise=True),
    Command("llama_7b", 2, 16, "fsdp2_projected.json"),
    Command("llama_7b", 4, 12, "fsdp2_projected.json"),
    Command("llama_7b", 8, 8, "fsdp2_projected.json"),
    Command("llama_13b", 2, 24, "fsdp2_13b_2x24gb.json"),
    Command("llama_13b", 2, 24, "fsdp2_projected.json", layerwise=True),
    Command("llama_13b", 8, 12, "fsdp2_projected.json"),
)


def rows() -> list[str]:
    """Lines of the first table."""
    found = []
    for name, (seq, machines) in MACHINES.items():
        model = ROOT / "configs" / f"{name}.json"
        rank = json.loads(model.read_text())["hidden_size"] // 4
        plans: dict[tuple[int, Candidate], MemoryPlan] = {}  # GPUs that differ in their memory alone share them
        for ranks, memory in machines:
            cells = ["nothing here", "", "", ""]
            for candidate in CANDIDATES:
                key = (ranks, candidate)
                if key not in plans:
                    plans[key] = candidate.plan(model, ranks, rank, seq)
                plan = plans[key]
                if plan.fits(memory, margin=MARGIN):
                    adamw, eight_bit, _, ours = (
                        f"{held.peak / GIB:.1f}" + (f" + {held.host / GIB:.0f} CPU" if held.host else "")
                        for held in plan.optimizers.values()
                    )
                    cells = [f"`{candidate.file}`" + (f" `{' '.join(candidate.flags)}`" if candidate.flags else "")]
                    cells += [ours, adamw, eight_bit]
                    break
            found.append(f"| {name} | {ranks} x {memory} | " + " | ".join(cells) + " |")
    return found


def command_rows() -> list[str]:
    """Lines of the second table."""
    found = []
    for command in COMMANDS:
        plan = command.plan()
        model = read_model(ROOT / "configs" / f"{command.model}.json")
        split = next(other.memory for other in others_of(model, plan) if other.name == SPLIT)
        adamw, eight_bit, _, ours = (f"{held.peak / GIB:.1f}" for held in plan.optimizers.values())
        how = "layerwise" if command.layerwise else "projected"
        fits = "" if plan.fits(command.memory, margin=MARGIN) else " (does not fit)"
        cells = (
            command.model,
            f"{command.gpus} x {command.memory}",
            f"`{command.file}`",
            how,
            f"{ours}{fits}",
            adamw,
            eight_bit,
            f"{split.peak / GIB:.1f}",
        )
        found.append(f"| {' | '.join(cells)} |")
    return found


# ---- the largest model ----

LARGEST = ((1, 12), (1, 24), (2, 24), (4, 24), (8, 12), (8, 24), (8, 80))
STEP = 256  # of hidden sizes
SEQ = 2048


def llama(hidden: int) -> dict[str, Any]:
    """A model of LLaMA's shape: 4096 is its 7B and 5120 its 13B."""
    inner = 256 * math.ceil(8 * hidden / 3 / 256)
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": max(1, hidden // 128)}
    layers = {"num_hidden_layers": hidden // 128, "vocab_size": 32000, "tie_word_embeddings": False}
    return {"model_type": "llama", **shape, **layers}


@functools.cache
def _model(hidden: int) -> Model:
    return read_model(llama(hidden))


def _run(hidden: int, ranks: int, master: str, **options: Any) -> MemoryPlan:
    """FSDP2, or one process: no optimizer needs less in another layout without offload."""
    block = {"rank": hidden // 4, "state_dtype": "int8", "basis_dtype": "int8", "accumulator_dtype": "bf16", **options}
    config = LowRankConfig(**block, stochastic_rounding=master == "bf16")
    kind, several = ("one", 8) if ranks == 1 else ("fsdp2", 8)
    setup = Setup(
        kind,
        ranks,
        SEQ,
        accumulation=1 if options.get("layerwise") else several,
        checkpointing=True,
        master=master,
        communication_dtype="bf16",
    )
    return plan_setup(_model(hidden), config, setup.of(config))


@functools.cache
def _peak(what: str, hidden: int, ranks: int) -> int:
    """Bytes on the rank that needs most."""
    if what == "AdamW":
        return _run(hidden, ranks, "fp32").optimizers["AdamW"].peak
    if what in ("AdamW, bf16", "8-bit AdamW, bf16"):
        return _run(hidden, ranks, "bf16").optimizers[what.removesuffix(", bf16")].peak
    if what in (SPLIT, GALORE):
        plan = _run(hidden, ranks, "bf16")
        return next(other.memory.peak for other in others_of(_model(hidden), plan) if other.name == what)
    return _run(hidden, ranks, "bf16", **OURS[what]).ours.peak


OURS: dict[str, dict[str, Any]] = {"projected": {"gradients": "projected"}, "layerwise": {"layerwise": True}}
COLUMNS = ("AdamW", "AdamW, bf16", "8-bit AdamW, bf16", SPLIT, GALORE, *OURS)


def largest(what: str, ranks: int, memory: int) -> int:
    """Weights of the largest model that fits, 0 where none does."""
    fits: Callable[[int], bool] = lambda k: _peak(what, k * STEP, ranks) <= (memory - MARGIN) * GIB  # noqa: E731
    low, high = 0, 1
    while high <= 64 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _model(low * STEP).numel if low else 0


def largest_rows(machines: Sequence[tuple[int, int]] = LARGEST) -> list[str]:
    """Lines of the third table, of GPUs x GiB."""
    found = []
    for ranks, memory in machines:
        cells = []
        for what in COLUMNS:
            if what == GALORE and ranks > 1:
                cells.append("-")
            else:
                cells.append(f"{largest(what, ranks, memory) / 1e9:.1f}")
        found.append(f"| {ranks} x {memory} | " + " | ".join(cells) + " |")
    return found


if __name__ == "__main__":
    print("\n".join([*rows(), "", *command_rows(), "", *largest_rows()]))
