"""A subspace that no gradient has chosen: uniform on the Stiefel manifold, as in GoLore (arXiv 2410.11289)."""

from __future__ import annotations

import torch

from ds_lowrank.selections import Basis, Gram, Key, Selection, register
from ds_lowrank.subspace.spectrum import fix_signs


@register
class Random(Selection):
    """Q of a Gaussian's QR, signs fixed. Drawn by the owner and sent: a QR need not be the same on every device."""

    name = "random"
    evidence = "none"

    def draw(  # noqa: D102
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis:
        vectors = random_basis(short, r, key.generator()).to(device, dtype)
        return Basis(vectors.contiguous(), torch.full((r,), -1, dtype=torch.int32))


def random_basis(short: int, r: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform draw from the Stiefel manifold: short × r, float64 on the CPU."""
    q, triangle = torch.linalg.qr(torch.randn(short, r, dtype=torch.float64, generator=generator))
    # Only with a positive diagonal of R is Q uniform (Mezzadri 2007); the sign convention comes after.
    return fix_signs(q * triangle.diagonal().sign())
