"""The table of docs/hardware.md: for a model and GPUs, the first configuration whose plan fits.

python scripts/hardware.py

Configurations are tried in the order of CANDIDATES, the cheapest first: what costs work done twice, then precision of
the states, then traffic, then the CPU's memory. Nothing is run: figures are ``ds-lowrank plan``'s.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_lowrank.planner import MemoryPlan, plan_memory

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


def rows() -> list[str]:
    """Lines of the table."""
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


if __name__ == "__main__":
    print("\n".join(rows()))
