"""A model whose gradients have a decaying spectrum and full rank, and depend on the weights and on a seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

Shapes = tuple[tuple[int, ...], ...]

# Weights of one "layer": (out, in) of a linear layer, (experts, out, in) of stacked ones.
SHAPES: dict[str, Shapes] = {
    # tall, wide, square; sizes that leave every boundary between 2, 3 and 4 ranks in the middle of a row
    "small": ((24, 10), (9, 31), (13, 13), (40, 7), (5, 23)),
    # fewer rows than ranks, so that rows are cut more than once and some ranks compute none
    "thin": ((2, 50), (3, 2), (61, 3)),
    # stacked experts: fewer than ranks, and more; tall and wide
    "experts": ((3, 12, 7), (5, 6, 16)),
    # all of these kinds in one model
    "mixed": ((24, 10), (9, 31), (13, 13), (2, 50), (3, 2), (3, 12, 7), (5, 6, 16)),
    # even sizes, as models have them: DeepSpeed pads a group to 2 × ranks elements, which shifts odd boundaries
    "even": ((16, 16), (48, 16), (16, 48)),
    # sides that 2, 3 and 4 divide, for sharding wide matrices by columns
    "columns": ((12, 48), (24, 12), (12, 12), (2, 12, 24)),
    # LLaMA-60M's sizes, behind a small matrix that puts the boundaries of 2, 3 and 4 ranks in the middle of a row
    "real": ((37, 53), (1376, 512), (512, 1376)),
}


class Experts(nn.Module):
    """Linear maps stacked in one parameter, as transformers packs the experts of a layer."""

    def __init__(self, experts: int, out: int, inside: int):
        super().__init__()
        self.num_experts = experts
        self.weight = nn.Parameter(torch.randn(experts, out, inside) / math.sqrt(inside))


class Few:
    """Inputs that lie in few directions, the same on all ranks and in all micro-steps of a step.

    Args:
        step: of the optimizer.
        directions: how many.
    """

    def __init__(self, step: int, directions: int):
        self._generator = torch.Generator().manual_seed(77 + step)
        self._directions = directions

    def inputs(self, x: Tensor, expert: int | None) -> Tensor:
        """What ``x`` (tokens × n) has in them; of stacked experts the first gets nothing, the second one direction."""
        count = self._directions if expert is None else min(expert, self._directions)
        if count >= x.shape[1]:
            return x
        drawn = torch.randn(x.shape[1], count, dtype=torch.float64, generator=self._generator)
        frame = torch.linalg.qr(drawn).Q
        # Of sizes that are far apart: vectors of equal singular values are arbitrary. In float64, so that rounding adds
        # no directions of its own.
        return (x.double() @ frame * 0.5 ** torch.arange(count)) @ frame.mT


class Layer(nn.Module):
    """Linear layers, each fitting a target of its own."""

    def __init__(self, shapes: Shapes):
        super().__init__()
        for index, shape in enumerate(shapes):
            part = nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else Experts(*shape)
            self.add_module(str(index), part)

    def forward(self, generator: torch.Generator, gain: Tensor, few: Few | None, dropped: str | None = None) -> Tensor:
        loss: Any = 0.0
        for name, part in self.named_children():
            weight: Any = part.weight
            for expert, w in enumerate([weight] if weight.ndim == 2 else weight):
                m, n = w.shape
                tokens = min(m, n) * 5 // 4 + 3
                x = torch.randn(tokens, n, generator=generator) * _decay(n)
                if few is not None:
                    x = few.inputs(x, expert if weight.ndim == 3 else None)
                y = torch.randn(tokens, m, generator=generator) * _decay(m)
                if name == dropped:
                    continue
                error = gain.to(w.dtype) * nn.functional.linear(x.to(w.dtype), w) - y.to(w.dtype)
                loss = loss + error.to(torch.promote_types(w.dtype, torch.float32)).square().sum() / tokens
        return loss


class Regressions(nn.Module):
    """Layers, and a vector that scales every layer's outputs."""

    def __init__(self, shapes: Shapes, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(shapes) for _ in range(layers))
        self.gain = nn.Parameter(torch.ones(layers))

    def forward(
        self, seed: int, silent: bool = False, few: tuple[int, int] | None = None, dropped: str | None = None
    ) -> Tensor:
        """Loss on the data of ``seed``; ``silent`` leaves layer 0 out, so that it has no gradient; ``few``: of Few;
        ``dropped``: a weight that is left out.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs = None if few is None else Few(*few)
        losses = [
            layer(generator, gain, inputs, _part(dropped, index))
            for index, (layer, gain) in enumerate(zip(self.layers, self.gain))
            if not (silent and index == 0)
        ]
        return torch.stack(losses).sum()


def _part(weight: str | None, layer: int) -> str | None:
    """Of a weight's name, which of the layer's parts it is."""
    before, after = f"layers.{layer}.", ".weight"
    return None if weight is None or not weight.startswith(before) else weight[len(before) : -len(after)]


def _decay(size: int) -> Tensor:
    return torch.logspace(0, -1.5, size)
