"""One refresh of one matrix, from its Gram to its basis and moments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.subspace.selection import complement, generator_for, random_basis, select
from ds_lowrank.subspace.spectrum import fix_signs, independent, spectrum

MOMENT_POLICIES = ("keep", "project")


@dataclass(frozen=True)
class Basis:
    """A drawn subspace.

    Attributes:
        vectors: short × r, orthonormal columns, contiguous (never a view that keeps a whole decomposition alive).
        indices: (r,) int32 on the CPU, the kept singular directions, ascending; -1 where a direction is none of the
            gradient's: all of ``random``, and at the end what fills up the basis of a gradient with too few.
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
    frame: Tensor | None = None,
    gradient_dtype: torch.dtype,
    seed: int,
    name: str,
    refresh: int,
) -> Basis | None:
    """Select a basis from a Gram matrix.

    Where fewer than ``rank`` of the gradient's directions stand above rounding (:func:`independent`) all of these are
    kept, whatever the selection, and the rest is drawn by the key and orthogonalised against them: equal subspaces give
    equal bases, and what rounding has made of the null space does not matter.

    Args:
        gram: side × side, float32 or float64, with side = min(m, n).
        rank: r ≤ side.
        selection: one of ``SELECTIONS``.
        dtype: dtype of the basis.
        frame: short × side with orthonormal columns, the coordinates of the Gram where the longer side is projected:
            see :func:`ds_lowrank.subspace.project.gram_of_short_rows`. ``None``: side = short, no frame is needed.
        gradient_dtype: in which the gradient was computed, perhaps narrower than what it comes in.
        seed, name, refresh: key of the draw; see :func:`generator_for`.

    Returns:
        The basis on the Gram's device, or ``None`` when the Gram is zero, not finite or not decomposable: the caller
        keeps what it has.
    """
    generator = generator_for(seed, name, refresh)
    short = len(gram if frame is None else frame)
    if selection == "random":
        energy = gram.diagonal().sum()
        if not bool(torch.isfinite(energy)) or float(energy) <= 0.0:
            return None
        vectors = random_basis(short, rank, torch.float64, generator).to(gram)
        indices = torch.full((rank,), -1, dtype=torch.int32)
        return Basis(vectors.to(dtype).contiguous(), indices, _captured(gram, frame, vectors))
    decomposed = spectrum(gram)
    if decomposed is None:
        return None
    sigma, directions = decomposed
    found = independent(sigma, gradient_dtype)
    if found >= rank:
        indices = select(sigma, rank, selection, generator)
        on_device = indices.to(gram.device)
        vectors = _in_whole(frame, directions.index_select(1, on_device))
        energy = sigma.square()
        captured = float(energy[on_device].sum() / energy.sum())
    else:
        indices = torch.arange(rank).where(torch.arange(rank) < found, -1)
        kept = _in_whole(frame, directions[:, :found])
        vectors = torch.cat([kept, complement(kept, rank - found, generator)], dim=1)
        captured = _captured(gram, frame, vectors)
    return Basis(fix_signs(vectors).to(dtype).contiguous(), indices.to(torch.int32), captured)


def _in_whole(frame: Tensor | None, coordinates: Tensor) -> Tensor:
    return coordinates if frame is None else frame @ coordinates


def _captured(gram: Tensor, frame: Tensor | None, vectors: Tensor) -> float:
    """Share of the energy inside the subspace of ``vectors`` (short × r, orthonormal)."""
    coordinates = vectors if frame is None else frame.mT @ vectors
    return float((coordinates * (gram @ coordinates)).sum() / gram.diagonal().sum())


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
