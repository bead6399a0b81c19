"""One refresh of one matrix, from its Gram to its basis and moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.subspace.selection import generator_for, random_basis, select
from ds_lowrank.subspace.spectrum import fix_signs, spectrum

MOMENT_POLICIES = ("keep", "project")


@dataclass(frozen=True)
class Basis:
    """A drawn subspace.

    Attributes:
        vectors: short × r, orthonormal columns, contiguous (never a view that keeps a whole decomposition alive).
        indices: (r,) int32 on the CPU, the kept singular directions, ascending; -1 for ``random``, which keeps none.
        captured: share of the gradient's energy ‖G‖² inside the subspace, in [0, 1].
    """

    vectors: Tensor
    indices: Tensor
    captured: float


def draw_basis(
    gram: Tensor,
    rank: int,
    selection: str,
    dtype: torch.dtype,
    *,
    candidates: int,
    seed: int,
    name: str,
    refresh: int,
) -> Basis | None:
    """Select a basis from a Gram matrix.

    Args:
        gram: short × short, float32 or float64.
        rank: r ≤ candidates.
        selection: one of ``SELECTIONS``.
        dtype: dtype of the basis.
        candidates: min(m, n), how many singular directions the gradient has. The Gram of the longer side
            (``reverse_std``) has a null space beside them, in which a decomposition's vectors are arbitrary.
        seed, name, refresh: key of the draw; see :func:`generator_for`.

    Returns:
        The basis on the Gram's device, or ``None`` when the Gram is zero, not finite or not decomposable: the caller
        keeps what it has.
    """
    generator = generator_for(seed, name, refresh)
    if selection == "random":
        energy = gram.diagonal().sum()
        if not bool(torch.isfinite(energy)) or float(energy) <= 0.0:
            return None
        vectors = random_basis(gram.shape[0], rank, torch.float64, generator).to(gram)
        captured = float((vectors * (gram @ vectors)).sum() / energy)
        return Basis(vectors.to(dtype).contiguous(), torch.full((rank,), -1, dtype=torch.int32), captured)
    decomposed = spectrum(gram)
    if decomposed is None:
        return None
    sigma, vectors = decomposed
    indices = select(sigma[:candidates], rank, selection, generator)
    on_device = indices.to(gram.device)
    kept = fix_signs(vectors.index_select(1, on_device)).to(dtype).contiguous()
    energy = sigma.square()
    captured = float(energy[on_device].sum() / energy.sum())
    return Basis(kept, indices.to(torch.int32), captured)


def overlap(cross: Tensor) -> float:
    """‖B_oldᵀ B_new‖_F² / r in [0, 1]: 1 for the same subspace, about r/short for unrelated ones (SARA, 2502.05790).

    Args:
        cross: B_oldᵀ B_new, r × r; the sum over slices of rows of both.
    """
    return float(cross.square().sum() / cross.shape[1])


def carry_moments_(exp_avg: Tensor, cross: Tensor, policy: str) -> None:
    """What becomes of the first moment (rows × r) when the basis changes.

    ``keep`` leaves it as it is (GaLore's code, SARA); ``project`` re-expresses it, M ← M B_oldᵀ B_new, the second
    moment kept (GoLore, arXiv 2410.11289). The step counter is never reset.

    Args:
        exp_avg: M, rows × r.
        cross: B_oldᵀ B_new, r × r.
        policy: one of ``MOMENT_POLICIES``.
    """
    if policy == "project":
        exp_avg.copy_(exp_avg @ cross)
    elif policy != "keep":
        raise ValueError(f"moments {policy!r} is unknown: use one of {', '.join(MOMENT_POLICIES)}")
