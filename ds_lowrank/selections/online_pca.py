"""Online Subspace Descent (arXiv 2408.12857): the basis follows the gradient by a small step in every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import ClassVar

import torch
from torch import Tensor

from ds_lowrank.rules.base import Hyper
from ds_lowrank.selections import Basis, Gram, Key, Selection, Sketch, register
from ds_lowrank.selections.random import random_basis
from ds_lowrank.states.layout import Slot

# Units in the last place of a row's terms that rounding may leave where they cancel.
NOISE = 32


@register
class OnlinePCA(Selection):
    """Adam on L(B) = ‖G̃ − G̃ B Bᵀ‖² + λ ‖BᵀB − I‖² with G̃ = ∇A / ‖∇A‖, from a random orthonormal basis on.

    Its learning rate is ``lr_factor`` times that of the weights, and its weight decay theirs, as in the paper. The
    weights of a step move by the basis of before it. A gradient that is zero or not finite leaves the basis and its
    moments as they are.
    """

    name = "online_pca"
    evidence = "sketch"
    periodic = False
    orthonormal = False
    slots = (
        Slot("basis_exp_avg", axis="basis"),
        Slot("basis_exp_avg_sq", axis="basis", format="unsigned"),
    )
    options: ClassVar[Mapping[str, float]] = {
        "lr_factor": 5.0,
        "penalty": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
    }

    def check(self, options: Mapping[str, float]) -> None:  # noqa: D102
        for name, least, below in (
            *(("lr_factor", 0.0, math.inf), ("penalty", 0.0, math.inf), ("eps", 0.0, math.inf)),
            *(("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0)),
        ):
            if not least <= options[name] < below:
                raise ValueError(
                    f"lowrank.selection_options[{name!r}] must be at least {least:g} and less than {below:g}, got "
                    f"{options[name]!r}"
                )

    def draw(  # noqa: D102
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis:
        vectors = random_basis(short, r, key.generator()).to(device, dtype)
        return Basis(vectors.contiguous(), torch.full((r,), -1, dtype=torch.int32))

    def refine(  # noqa: D102
        self,
        basis: Tensor,
        sketch: Sketch,
        state: MutableMapping[str, Tensor],
        hyper: Hyper,
    ) -> Tensor:
        options, step = hyper.options, hyper.step
        lr, beta1, beta2 = hyper.lr * options["lr_factor"], options["beta1"], options["beta2"]
        # |S_ij|² ≤ ‖∇A‖² (RᵀR)_jj: what is finite here is finite on every rank. Nobody waits for the device to say so.
        usable = (sketch.energy + sketch.rr.diagonal().sum()).isfinite() & (
            sketch.energy >= torch.finfo(sketch.energy.dtype).tiny
        )
        usable = usable.reshape(())
        slope = loss_gradient(basis, sketch, options["penalty"])
        # At a minimum, as where r = short, a slope is rounding alone, of which Adam would make steps of full size, on
        # every layout others.
        sizes = _row_sizes(sketch.s) / sketch.energy + options["penalty"] * _row_sizes(basis)
        slope = torch.where(usable & (slope.abs() > NOISE * torch.finfo(slope.dtype).eps * sizes), slope, 0.0)
        weight = usable.to(basis.dtype)
        m, v = state["basis_exp_avg"], state["basis_exp_avg_sq"]
        m.lerp_(slope, weight * (1 - beta1))
        v.mul_(1 - weight * (1 - beta2)).addcmul_(slope, slope, value=1 - beta2)
        root = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(options["eps"])
        move = torch.div(m, root, out=root).mul_(weight * (lr / (1 - beta1**step)))
        return basis.mul_(1 - weight * (lr * hyper.weight_decay)).sub_(move)


def _row_sizes(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def loss_gradient(basis: Tensor, sketch: Sketch, penalty: float) -> Tensor:
    """∇L of rows of the basis.

    With C = G̃ᵀ G̃, L = tr C − 2 tr BᵀCB + tr BᵀCB BᵀB + λ ‖BᵀB − I‖²; C B is S / ‖∇A‖² and BᵀCB is RᵀR / ‖∇A‖².

    Args:
        basis: rows of B (of short) × r.
        sketch: S of the same rows, RᵀR, BᵀB and ‖∇A‖².
        penalty: λ.

    Returns:
        rows × r.
    """
    # Subtracted before it is rounded, see Sketch.
    excess = (sketch.bb - torch.eye(len(sketch.bb)).to(sketch.bb)).to(basis.dtype)
    inside = (sketch.s @ excess - sketch.s + basis @ sketch.rr) * (2 / sketch.energy)
    return inside + basis @ (4 * penalty * excess)
