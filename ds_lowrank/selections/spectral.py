"""Bases of a gradient's singular vectors.

``dominant`` is GaLore's (arXiv 2403.03507), ``importance`` SARA's (arXiv 2502.05790), ``uniform`` SARA's ablation.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from ds_lowrank.selections import Basis, Gram, Key, Selection, register
from ds_lowrank.subspace.spectrum import fix_signs, independent, spectrum


class Spectral(Selection):
    """r of the singular vectors of a gradient.

    Where fewer than r of its directions stand above rounding (:func:`independent`) all of these are kept, and the rest
    is drawn by the key and orthogonalised against them: equal subspaces give equal bases, and what rounding has made of
    the null space does not matter.
    """

    @abstractmethod
    def choose(self, sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:
        """Indices of the kept directions.

        Args:
            sigma: (side,) singular values, descending, ≥ 0.
            r: how many to keep, ≤ side.
            generator: CPU generator of the draw.

        Returns:
            (r,) int64 on the CPU, ascending.
        """

    def draw(  # noqa: D102
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis | None:
        assert gram is not None
        decomposed = spectrum(gram.matrix)
        if decomposed is None:
            return None
        sigma, directions = decomposed
        generator = key.generator()
        found = independent(sigma, gram.gradient_dtype)
        if found >= r:
            indices = self.choose(sigma, r, generator)
            on_device = indices.to(gram.matrix.device)
            vectors = _in_whole(gram.frame, directions.index_select(1, on_device))
            energy = sigma.square()
            captured = float(energy[on_device].sum() / energy.sum())
        else:
            indices = torch.arange(r).where(torch.arange(r) < found, -1)
            kept = _in_whole(gram.frame, directions[:, :found])
            vectors = torch.cat([kept, complement(kept, r - found, generator)], dim=1)
            captured = _captured(gram, vectors)
        return Basis(fix_signs(vectors).to(dtype).contiguous(), indices.to(torch.int32), captured)


@register
class Dominant(Spectral):
    """The first r."""

    name = "dominant"

    def choose(self, sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        return torch.arange(r)


@register
class Importance(Spectral):
    """r without replacement, with probability ∝ σ."""

    name = "importance"

    def choose(self, sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        return _largest(torch.log(sigma.detach().to("cpu", torch.float64)), r, generator)


@register
class Uniform(Spectral):
    """r without replacement, all with one probability; among those that are the gradient's."""

    name = "uniform"

    def choose(self, sigma: Tensor, r: int, generator: torch.Generator) -> Tensor:  # noqa: D102
        # Of singular values that are zero the directions are arbitrary.
        return _largest(torch.where(sigma.detach().to("cpu", torch.float64) == 0, -torch.inf, 0.0), r, generator)


def _largest(log_weights: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """The r largest of log weight + Gumbel noise: exactly the law of drawing without replacement with probabilities ∝
    the weights (Efraimidis and Spirakis 2006). It needs no case for zero weights: they come last, in their order.
    """
    uniform = torch.rand(log_weights.numel(), dtype=torch.float64, generator=generator)
    keys = log_weights - torch.log(-torch.log(uniform))
    return torch.argsort(keys, descending=True, stable=True)[:r].sort().values


def complement(kept: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform draw of orthonormal directions orthogonal to others; it depends on what these span and nothing else.

    Args:
        kept: short × k, orthonormal columns.
        count: how many to draw, ≤ short − k.
        generator: CPU generator of the draw.

    Returns:
        short × count on the device and in the dtype of ``kept``, signs not fixed.
    """
    drawn = torch.randn(len(kept), count, dtype=torch.float64, generator=generator).to(kept)
    for _ in range(2):  # once leaves ε times what was taken away (Giraud, Langou and Rozložník 2005)
        drawn -= kept @ (kept.mT @ drawn)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal().sign()


def _in_whole(frame: Tensor | None, coordinates: Tensor) -> Tensor:
    return coordinates if frame is None else frame @ coordinates


def _captured(gram: Gram, vectors: Tensor) -> float:
    """Share of the energy inside the subspace of ``vectors`` (short × r, orthonormal)."""
    coordinates = vectors if gram.frame is None else gram.frame.mT @ vectors
    return float((coordinates * (gram.matrix @ coordinates)).sum() / gram.matrix.diagonal().sum())
