"""Random projections of no gradient, as APOLLO (arXiv 2412.05270) has them: never kept, never sent, made when used."""

from __future__ import annotations

import torch

from ds_lowrank.kernels.gaussian import gaussian_rows
from ds_lowrank.selections import Basis, Gram, Key, Selection, register


@register
class Gaussian(Selection):
    """Entries N(0, 1/r), so that rows of R are as long as those of ∇A on average and B Bᵀ is I on average."""

    name = "gaussian"
    evidence = "none"
    orthonormal = False
    stored = False

    def draw(  # noqa: D102
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis:
        vectors = gaussian_rows(key.number(), (0, short), r, device).to(dtype)
        return Basis(vectors, torch.full((r,), -1, dtype=torch.int32))
