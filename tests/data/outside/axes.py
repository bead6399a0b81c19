"""A subspace of coordinates: R is a part of the gradient's columns, and the basis an index."""

import torch

from ds_lowrank.selections import Basis, Gram, Key, Selection, register


@register
class Axes(Selection):
    """The r columns of ∇A whose norms are the largest."""

    name = "axes"
    evidence = "gram"

    def draw(
        self, key: Key, short: int, r: int, dtype: torch.dtype, device: torch.device, gram: Gram | None = None
    ) -> Basis | None:
        assert gram is not None
        whole = gram.matrix if gram.frame is None else gram.frame @ gram.matrix @ gram.frame.mT
        energy = whole.diagonal()
        total = float(energy.sum())
        if not 0.0 < total < float("inf"):
            return None
        kept = energy.argsort(descending=True, stable=True)[:r].sort().values
        basis = torch.zeros(short, r, dtype=dtype, device=device)
        basis[kept, torch.arange(r, device=device)] = 1
        return Basis(basis, torch.full((r,), -1, dtype=torch.int32), float(energy[kept].sum()) / total)
