"""Which directions of a spectrum span the subspace.

`dominant` is GaLore's (arXiv 2403.03507), `importance` SARA's (arXiv 2502.05790), `uniform` SARA's ablation, `random`
a uniform draw on the Stiefel manifold as in GoLore (arXiv 2410.11289).
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ds_lowrank.subspace.spectrum import fix_signs

SELECTIONS = ("dominant", "importance", "uniform", "random")


def generator_for(seed: int, name: str, refresh: int) -> torch.Generator:
    """CPU generator of one draw, keyed by what is drawn and by nothing else.

    The same (seed, parameter name, refresh index) gives the same draw for any number of ranks, any layout and after
    a resume; the global generator is never touched.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}\0{refresh}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def select(sigma: Tensor, rank: int, selection: str, generator: torch.Generator) -> Tensor:
    """Indices of the kept singular directions.

    Args:
        sigma: (short,) singular values, descending, ≥ 0.
        rank: how many to keep, ≤ short.
        selection: ``dominant``, ``importance`` (without replacement, probability ∝ σ) or ``uniform``.
        generator: CPU generator of the draw.

    Returns:
        (rank,) int64 on the CPU, ascending.

    ``importance`` uses the form "the ``rank`` largest of log σ + Gumbel noise", which is that law exactly (Efraimidis
    and Spirakis 2006) and needs no case for zero weights: they come last, in their order.
    """
    if selection == "dominant":
        return torch.arange(rank)
    uniform = torch.rand(sigma.numel(), dtype=torch.float64, generator=generator)
    keys = -torch.log(-torch.log(uniform))
    weights = sigma.detach().to("cpu", torch.float64)
    if selection == "importance":
        keys += torch.log(weights)
    elif selection == "uniform":  # among those that are the gradient's: of others the directions are arbitrary
        keys[weights == 0] = -torch.inf
    else:
        raise ValueError(f"selection {selection!r} draws no indices")
    return torch.argsort(keys, descending=True, stable=True)[:rank].sort().values


def random_basis(short: int, rank: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Uniform draw from the Stiefel manifold: Q of a Gaussian's QR, signs fixed. Returns: short × rank on the CPU."""
    gaussian = torch.randn(short, rank, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    # Only with a positive diagonal of R is Q uniform (Mezzadri 2007); the sign convention comes after.
    return fix_signs(q * r.diagonal().sign()).to(dtype)


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
