"""The LLaMAs as benchmarks need them: the matrices of 60M alone with random gradients, or a model that computes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIGS = Path(__file__).parent.parent / "configs"
SQUARE, TALL, WIDE = (512, 512), (1376, 512), (512, 1376)
LAYER = (SQUARE, SQUARE, SQUARE, SQUARE, TALL, TALL, WIDE)
LAYERS = 8


@dataclass(frozen=True)
class Setting:
    """How a model is trained: what :func:`harness.start` needs to know.

    Attributes:
        layout: one of ``harness.LAYOUTS``.
        options: of the optimizer.
        wide_on_columns: FSDP2 shards matrices along the side that suits the projection.
        zero: further keys of ``zero_optimization``; the default undoes the harness' tiny buckets.
    """

    layout: str
    options: dict[str, Any]
    wide_on_columns: bool = False
    zero: dict[str, Any] = field(
        default_factory=lambda: {
            "reduce_bucket_size": 5_000_000,
            "allgather_bucket_size": 5_000_000,
            "sub_group_size": 1_000_000_000,
        }
    )
    dtype: str = "fp32"
    accumulation: int = 1
    clip: float = 0.0
    offload: bool = False
    layerwise: bool = False
    master: bool = True
    config: dict[str, Any] = field(default_factory=dict)


class Weight(nn.Linear):
    """A weight whose gradient is random: it is the loss' coefficient."""

    def forward(self, generator: torch.Generator) -> Tensor:  # type: ignore[override]
        return (self.weight * torch.randn(self.weight.shape, generator=generator)).sum()


class Weights(nn.Module):
    """One layer."""

    def __init__(self, shapes: Sequence[tuple[int, int]]):
        super().__init__()
        for index, (m, n) in enumerate(shapes):
            self.add_module(str(index), Weight(n, m, bias=False))

    def forward(self, generator: torch.Generator) -> Tensor:
        return torch.stack([weight(generator) for weight in self.children()]).sum()


class Matrices(nn.Module):
    """Layers of weights, nothing else.

    Args:
        layers: (m, n) of the weights of each.
    """

    def __init__(self, layers: Sequence[Sequence[tuple[int, int]]]):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Weights(shapes) for shapes in layers)

    def forward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([layer(generator) for layer in self.layers]).sum()


class Llama(nn.Module):
    """The model; ``layers`` is where ``harness.shard`` looks for them.

    Args:
        model: of ``configs``.
        changed: other values of its configuration.
    """

    def __init__(self, model: str = "llama_60m", **changed: Any) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        super().__init__()
        settings = {**json.loads((CONFIGS / f"{model}.json").read_text()), **changed}
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.llama = AutoModelForCausalLM.from_config(config)
        self.layers = self.llama.model.layers

    def forward(self, tokens: Tensor) -> Tensor:
        return self.llama(input_ids=tokens, labels=tokens).loss
