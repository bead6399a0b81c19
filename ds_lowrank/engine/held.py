"""Weights and gradients of what this rank holds, as views of boxes of W, while matrices are stepped."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_lowrank.layouts.base import Layout
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan


class Held:
    """What a layout gives, asked for once a step.

    Args:
        layout: where weights and gradients lie.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._rank = layout.ranks.rank
        self._weights: dict[str, Tensor] = {}  # of what is being stepped; copies where the layout has no view
        self._missing: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Forget a step that failed."""
        self._weights.clear()

    def store(self) -> None:
        """Keep what was written into weights that are copies."""
        for name, weights in self._weights.items():
            self._layout.store(name, weights)
        self._weights.clear()

    def end(self) -> None:
        """Free what stood for missing gradients."""
        self._missing.clear()

    def has_gradient(self, plan: MatrixPlan) -> bool:
        """Whether the framework gave this rank a gradient of its part of a matrix."""
        return plan.parts[self._rank] is not None and self._layout.grad(plan.parameter) is not None

    def gradient(self, plan: MatrixPlan, box: Box) -> Tensor:
        """The gradient of a box that this rank holds; zeros where there is none."""
        part = plan.parts[self._rank]
        assert part is not None
        grad = self._layout.grad(plan.parameter)
        if grad is None:
            if plan.parameter not in self._missing:
                self._missing[plan.parameter] = torch.zeros_like(self._layout.weight(plan.parameter))
            grad = self._missing[plan.parameter]
        return part.view(grad, box)

    def weights(self, plan: MatrixPlan, box: Box) -> Tensor:
        """The weights of a box that this rank holds: writing to them, and :meth:`store`, moves the model."""
        part = plan.parts[self._rank]
        assert part is not None
        # Where it is a copy, all of a parameter's matrices are written into the same one.
        held = self._weights.get(plan.parameter)
        if held is None:
            held = self._weights[plan.parameter] = self._layout.weight(plan.parameter)
        return part.view(held, box)

    def home(self, plan: MatrixPlan) -> torch.device:
        """Where states lie: with the weights, which may be offloaded."""
        if plan.parameter in self._layout.pieces:
            return self._layout.weight(plan.parameter).device
        return self._layout.ranks.device
