"""Wrote the checkpoints of this folder, with the package as it was before methods declared what they keep.

    torchrun --nproc_per_node 2 write.py zero2       python write.py one

Gradients are given numbers, so that whoever goes on can give the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import ds_lowrank

HERE = Path(__file__).parent
OPTIONS = {"rank": 4, "update_proj_gap": 3, "stagger": False, "lr": 0.05, "optim_target_modules": ["tall", "wide"]}
FORMATS = {"fp32": {}, "int8": {"state_dtype": "int8", "basis_dtype": "int4"}}
STEPS = 5  # refreshed before the first and the fourth


class Model(nn.Module):
    """A tall, a wide and stacked matrices, and one that is not projected."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tall = nn.Linear(10, 24, bias=False)
        self.wide = nn.Linear(24, 9, bias=False)
        self.tall_experts = nn.Parameter(torch.randn(3, 12, 8))
        self.rest = nn.Linear(6, 5)

    def forward(self, step: int) -> torch.Tensor:
        """A loss whose gradients are :func:`gradients`."""
        return sum((p * g).sum() for p, g in zip(self.parameters(), gradients(self, step)))


def gradients(model: nn.Module, step: int) -> list[torch.Tensor]:
    """Of every parameter at a step."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def groups(model: nn.Module, formats: str) -> tuple[list, dict]:
    """Parameter groups and the optimizer's other options."""
    named = dict(model.named_parameters())
    low = ["tall.weight", "wide.weight", "tall_experts"]
    options = {**OPTIONS, **FORMATS[formats]}
    rank, lr, _ = options.pop("rank"), options.pop("lr"), options.pop("optim_target_modules")
    rest = [(n, p) for n, p in named.items() if n not in low]
    projected = {"params": [(n, named[n]) for n in low], "rank": rank, "stacked": [None, None, True]}
    return [projected, {"params": rest}], {"lr": lr, **options}


def one(formats: str) -> None:
    folder = HERE / f"one-{formats}"
    folder.mkdir(exist_ok=True)
    model = Model()
    params, options = groups(model, formats)
    optimizer = ds_lowrank.LowRankAdamW(params, **options)
    for step in range(STEPS + 1):
        if step == STEPS:
            torch.save(model.state_dict(), folder / "pytorch_model.bin")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        model.zero_grad()
        model(step).backward()
        optimizer.step()
    torch.save(model.state_dict(), folder / "next.pt")


def zero2(formats: str) -> None:
    import deepspeed

    folder = HERE / f"zero2-{formats}"
    model = Model()
    params, options = groups(model, formats)
    optimizer = ds_lowrank.LowRankAdamW(params, **options)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS + 1):
        if step == STEPS:
            engine.save_checkpoint(str(folder))
        engine.backward(engine(step))
        engine.step()
    if torch.distributed.get_rank() == 0:
        torch.save({n: p.detach().clone() for n, p in model.state_dict().items()}, folder / "next.pt")
    engine.destroy()


if __name__ == "__main__":
    for formats in FORMATS:
        {"one": one, "zero2": zero2}[sys.argv[1]](formats)
