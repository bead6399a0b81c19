"""Weights and gradients of what this rank holds, as rows of A or boxes of W, while matrices are stepped."""

from __future__ import annotations

from collections.abc import Sequence

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
        # Of the rows of A that lie where they are computed: shape, strides, and where they begin in the piece.
        self._tall: dict[str, tuple[tuple[int, int], tuple[int, int], int] | None] = {}

    def forget(self) -> None:
        """Let go of what one step holds."""
        self._weights.clear()
        self._missing.clear()

    def store(self) -> None:
        """Keep what was written into weights that are copies."""
        for name in list(self._layout.copied):
            if name in self._weights:
                self._layout.store(name, self._weights[name])
        self._weights.clear()

    def has_gradient(self, plan: MatrixPlan) -> bool:
        """Whether the framework gave this rank a gradient of its part of a matrix."""
        return plan.parts[self._rank] is not None and self._layout.grad(plan.parameter) is not None

    def gradient_rows(self, plan: MatrixPlan) -> Tensor | None:
        """The gradient of the rows of A that lie where they are computed; ``None``: there is none, or no such row."""
        grad = self._layout.grad(plan.parameter)
        at = self._tall[plan.name] if plan.name in self._tall else self._find(plan)
        return None if grad is None or at is None else grad.as_strided(at[0], at[1], grad.storage_offset() + at[2])

    def weight_rows(self, plan: MatrixPlan) -> Tensor:
        """The weights of the same rows: writing to them, and :meth:`store`, moves the model."""
        held = self._weights.get(plan.parameter)
        if held is None:  # where it is a copy, all of a parameter's matrices are written into the same one
            held = self._weights[plan.parameter] = self._layout.weight(plan.parameter)
        at = self._tall[plan.name] if plan.name in self._tall else self._find(plan)
        assert at is not None
        return held.as_strided(at[0], at[1], held.storage_offset() + at[2])

    def gradients(self, plan: MatrixPlan, boxes: Sequence[Box]) -> list[Tensor]:
        """The gradients of boxes that this rank holds; zeros where there is none."""
        part = plan.parts[self._rank]
        assert part is not None
        grad = self._layout.grad(plan.parameter)
        held = self._no_gradient(plan) if grad is None else grad
        return [part.view(held, box) for box in boxes]

    def weights(self, plan: MatrixPlan, box: Box) -> Tensor:
        """The weights of a box that this rank holds, as :meth:`weight_rows`."""
        part = plan.parts[self._rank]
        assert part is not None
        held = self._weights.get(plan.parameter)
        if held is None:
            held = self._weights[plan.parameter] = self._layout.weight(plan.parameter)
        return part.view(held, box)

    def missing_rows(self, plan: MatrixPlan) -> Tensor | None:
        """Zeros in the place of :meth:`gradient_rows`; ``None``: no row lies where it is computed."""
        at = self._tall[plan.name]
        return None if at is None else self._no_gradient(plan).as_strided(*at)

    def home(self, plan: MatrixPlan) -> torch.device:
        """Where states lie: with the weights, which may be offloaded."""
        if plan.parameter in self._layout.pieces:
            return self._layout.weight(plan.parameter).device
        return self._layout.ranks.device

    def _no_gradient(self, plan: MatrixPlan) -> Tensor:
        if plan.parameter not in self._missing:
            self._missing[plan.parameter] = torch.zeros_like(self._layout.weight(plan.parameter))
        return self._missing[plan.parameter]

    def _find(self, plan: MatrixPlan) -> tuple[tuple[int, int], tuple[int, int], int] | None:
        share, part = plan.shares[self._rank], plan.parts[self._rank]
        found = None
        if share is not None and share.view is not None and part is not None:
            (height, width), box = share.view.shape, share.view
            at = part.origin + box.top * part.stride + box.left
            tall = plan.side == "right"
            shape, strides = ((height, width), (part.stride, 1)) if tall else ((width, height), (1, part.stride))
            found = (shape, strides, at)
        self._tall[plan.name] = found
        return found
