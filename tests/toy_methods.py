"""A rule and two selections that no engine, checkpoint or plan knows, with slots of every axis, width and format."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from ds_lowrank import LowRankAdamW
from ds_lowrank.rules import Hyper, Rule, Stack, Steps, Update
from ds_lowrank.rules import register as register_rule
from ds_lowrank.selections import Basis, Gram, Key, Selection
from ds_lowrank.selections import register as register_selection
from ds_lowrank.selections.random import random_basis
from ds_lowrank.selections.spectral import Dominant
from ds_lowrank.states.layout import Slot

SELECTIONS = ["toy_kept", "toy_keyless"]
FORMATS: dict[str, dict[str, str]] = {"fp32": {}, "int8": {"state_dtype": "int8", "basis_dtype": "int4"}}


@register_rule
class Toy(Rule):
    """A mean of R, scaled by the size of rows and of the whole matrix."""

    name = "toy"
    slots = (
        Slot("toy_m", turns="linear"),
        Slot("toy_v", width=1, format="unsigned"),
        Slot("toy_norm", axis="matrix", width=1, format="exact"),
        Slot("toy_mean", axis="matrix"),
    )

    def step(self, r: Tensor, state: MutableMapping[str, Tensor], hyper: Hyper, stack: Stack) -> Steps:
        squares = r.square().sum(1)
        total = yield stack.totals(squares)
        state["toy_norm"] = state["toy_norm"].to(total) * 0.5 + total.sqrt()[:, None]
        state["toy_mean"] = state["toy_mean"] * 0.5 + total[:, None]
        state["toy_m"].mul_(0.9).add_(r, alpha=0.1)
        state["toy_v"].mul_(0.9).add_(squares[:, None], alpha=0.1)
        size = stack.each_row((state["toy_norm"] + state["toy_mean"].mean(1, keepdim=True))[:, 0])
        return Update(state["toy_m"] / (state["toy_v"].sqrt() + size[:, None]))


@register_selection
class Kept(Dominant):
    """Has something beside its basis."""

    name = "toy_kept"
    slots = (Slot("toy_slope", axis="basis"),)


@register_selection
class Keyless(Selection):
    """Keeps no basis."""

    name = "toy_keyless"
    evidence = "none"
    stored = False

    def draw(
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis:
        vectors = random_basis(short, r, key.generator()).to(device, dtype)
        return Basis(vectors, torch.full((r,), -1, dtype=torch.int32))


class Model(nn.Module):
    """A tall, a wide and stacked matrices, and one parameter that is not projected."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Linear(10, 14, bias=False)
        self.wide = nn.Linear(14, 6, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 12, 8))
        self.gain = nn.Parameter(torch.ones(5))


def model_of(seed: int = 0) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Model()


def make_optimizer(model: nn.Module, selection: str, rule: str = "toy", **options: Any) -> LowRankAdamW:
    named = list(model.named_parameters())
    low, rest = ([(n, p) for n, p in named if (p.ndim > 1) is matrix] for matrix in (True, False))
    groups: list[dict[str, Any]] = [
        {"params": low, "rank": 3, "stacked": [True if p.ndim > 2 else None for _, p in low]}
    ]
    given = {"lr": 0.05, "update_proj_gap": 2, "rule": rule, "selection": selection, **options}
    return LowRankAdamW(groups + ([{"params": rest}] if rest else []), **given)


def take(model: nn.Module, optimizer: LowRankAdamW, steps: Iterable[int]) -> None:
    """Steps with given gradients."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
