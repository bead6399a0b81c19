"""The methods of papers in a few lines each, on one dense matrix: what their tests hold ours and the packages against.

They share no code with ds_lowrank. A is the weight or, where that is wide, its transpose (long × short); B is short × r
and comes from outside: a list with one basis a refresh, or a function of the refresh's number and A's gradient.

Where conventions differ, the package's is an option. Fed with known gradients, fira 1.0.2, apollo-torch 1.0.3 and
grams-pytorch 0.0.2 have ``raw_eps``: ε stands beside √V before V is bias-corrected. The first two have ``decay_last``:
the weight decays after the update, so the update decays too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Bases = Sequence[Tensor] | Callable[[int, Tensor], Tensor]
TINY = 1e-8  # what both packages add to a norm that they divide by


class AdamW:
    """A ← keep A − η u, with u = α c N Bᵀ; c N = M̂ / (√V̂ + ε) are GaLore's. The other methods replace ``update``."""

    def __init__(
        self,
        bases: Bases,
        *,
        gap: int = 200,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        alpha: float = 1.0,
        raw_eps: bool = False,
        decay_last: bool = False,
    ):
        self.bases, self.gap, self.lr, self.betas, self.eps = bases, gap, lr, betas, eps
        self.weight_decay, self.alpha, self.raw_eps, self.decay_last = weight_decay, alpha, raw_eps, decay_last
        self.state: dict[str, Any] = {"t": 0, "m": 0.0, "v": 0.0}

    @torch.no_grad()
    def step(self, weight: Tensor, gradient: Tensor) -> None:
        """One step of ``weight`` in place. Moments stay as they are at a refresh."""
        a, g = (weight, gradient) if weight.shape[0] >= weight.shape[1] else (weight.T, gradient.T)
        if self.state["t"] % self.gap == 0:
            refresh = self.state["t"] // self.gap
            self.state["basis"] = self.bases(refresh, g) if callable(self.bases) else self.bases[refresh]
        self.state["t"] += 1
        step = self.lr * self.update(g, g @ self.state["basis"], self.state["basis"])
        keep = 1 - self.lr * self.weight_decay
        a.copy_(keep * (a - step) if self.decay_last else keep * a - step)

    def update(self, g: Tensor, r: Tensor, basis: Tensor) -> Tensor:
        n, correction = self.adam(r)
        return self.alpha * correction * n @ basis.T

    def adam(self, r: Tensor) -> tuple[Tensor, float]:
        """N before bias correction, and the factor that corrects it."""
        (beta1, beta2), state = self.betas, self.state
        state["m"] = beta1 * state["m"] + (1 - beta1) * r
        state["v"] = beta2 * state["v"] + (1 - beta2) * r * r
        root = math.sqrt(1 - beta2 ** state["t"])
        n = state["m"] / (state["v"].sqrt() + self.eps * (1 if self.raw_eps else root))
        return n, root / (1 - beta1 ** state["t"])

    def limit(self, s: Tensor, gamma: float = 1.01) -> Tensor:
        """Fira's norm-growth limiter: ‖S‖ is at most γ times what it was a step ago, by one factor for the matrix.

        The packages remember a zero norm too: after one gradient of zeros nothing above γ · 1e-8 gets through, and the
        bound then grows by 1 % a step. Here a zero is not remembered.
        """
        last = self.state.get("norm")
        if last is not None:
            excess = max(1.0, float(s.norm() / (last + TINY)) / gamma)
            self.state["limited"] = self.state.get("limited", 0) + (excess > 1)
            s = s / excess
        if s.norm() > 0:
            self.state["norm"] = s.norm()
        return s


class Fira(AdamW):
    """Fira (2410.01623): the residual G − α R Bᵀ moves too, each row scaled by φ = |N| / |R| and limited as a whole.

    φ and the limiter take N before bias correction; the correction then multiplies both parts.
    """

    def update(self, g: Tensor, r: Tensor, basis: Tensor) -> Tensor:
        n, correction = self.adam(r)
        phi = n.norm(dim=1, keepdim=True) / (r.norm(dim=1, keepdim=True) + TINY)
        residual = self.limit(phi * (g - self.alpha * r @ basis.T))
        return correction * (self.alpha * n @ basis.T + residual)


class Apollo(AdamW):
    """APOLLO (2412.05270): G itself moves, each row scaled by |N| / |R|, where R = G P, P Gaussian of variance 1/r.

    ``tensor``: one number for the matrix, ‖N‖ / ‖R‖: APOLLO-Mini with r = 1. ``alpha`` is the factor of the update (the
    package's is √scale: √1, and √128 of Mini); the limiter sees the update before it.
    """

    tensor = False

    def update(self, g: Tensor, r: Tensor, basis: Tensor) -> Tensor:
        n, correction = self.adam(r)
        if self.tensor:
            s = n.norm() / (r.norm() + TINY)
        else:
            s = n.norm(dim=1, keepdim=True) / (r.norm(dim=1, keepdim=True) + TINY)
        return correction * self.alpha * self.limit(s * g)


class ApolloMini(Apollo):
    tensor = True


class Grams(AdamW):
    """Grams (2412.17107): the size of Adam's step, the sign of the gradient of now."""

    def update(self, g: Tensor, r: Tensor, basis: Tensor) -> Tensor:
        n, correction = self.adam(r)
        return self.alpha * (correction * n).abs() * r.sign() @ basis.T


class OnlinePCA:
    """Online Subspace Descent's basis (2408.12857), as ``bases`` of a method with ``gap=1``.

    A step uses the basis P of before; then P takes one step of its own optimizer on L(P) = ‖G̃ − G̃ P Pᵀ‖² + λ ‖PᵀP − I‖²
    with G̃ = G / ‖G‖. ``betas=None`` is plain gradient descent in Adam's place.
    """

    def __init__(
        self,
        start: Tensor,
        *,
        lr: float,
        penalty: float,
        betas: tuple[float, float] | None = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.lr, self.penalty, self.betas, self.eps, self.weight_decay = lr, penalty, betas, eps, weight_decay
        self.state: dict[str, Any] = {"p": start.clone(), "t": 0, "m": 0.0, "v": 0.0}

    def __call__(self, refresh: int, g: Tensor) -> Tensor:
        now = self.state["p"]
        r = g @ now
        slope = online_pca_gradient(now, g.T @ r, r.T @ r, g.square().sum(), self.penalty)
        self.state["p"] = (1 - self.lr * self.weight_decay) * now - self.lr * self.direction(slope)
        return now

    def direction(self, slope: Tensor) -> Tensor:
        if self.betas is None:
            return slope
        (beta1, beta2), state = self.betas, self.state
        state["t"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * slope
        state["v"] = beta2 * state["v"] + (1 - beta2) * slope * slope
        root = (state["v"] / (1 - beta2 ** state["t"])).sqrt()
        return state["m"] / (1 - beta1 ** state["t"]) / (root + self.eps)


def online_pca_gradient(p: Tensor, s: Tensor, t: Tensor, energy: Tensor, penalty: float) -> Tensor:
    """∇L(P) from the sketch S = GᵀR, T = RᵀR and ‖G‖², which are sums over G's rows: short × r, r × r and a number.

    With C = G̃ᵀG̃ the loss is tr C − 2 tr PᵀCP + tr PᵀCP PᵀP + λ ‖PᵀP − I‖², and CP = S / ‖G‖², PᵀCP = T / ‖G‖².
    """
    gram = p.T @ p
    eye = torch.eye(len(gram), dtype=p.dtype)
    return (-4 * s + 2 * s @ gram + 2 * p @ t) / energy + 4 * penalty * p @ (gram - eye)
