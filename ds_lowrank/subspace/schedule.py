"""When a matrix refreshes its subspace, and who decomposes it.

A refresh costs as much as hundreds of steps, so refreshes are spread over the period in waves of a fixed number of
matrices. The schedule depends on the model alone, never on the number of ranks: the trajectory must not either.
"""

from __future__ import annotations

from collections.abc import Sequence


def phases(matrices: int, gap: int, wave_size: int, stagger: bool) -> list[int]:
    """Phase of every matrix in the model's parameter order.

    Matrix j is in wave j mod W, W = ⌈matrices / wave_size⌉, so that neighbours in the model (which one rank tends to
    hold) fall into different waves; wave w has the phase ⌊w · gap / W⌋. Without ``stagger`` every phase is 0, as in
    the papers.
    """
    if not stagger or matrices == 0:
        return [0] * matrices
    count = -(-matrices // wave_size)
    return [wave * gap // count for wave in waves(matrices, wave_size)]


def waves(matrices: int, wave_size: int) -> list[int]:
    """Wave of every matrix: j mod W. It bounds what is refreshed at once also where all phases are 0."""
    count = max(1, -(-matrices // wave_size))
    return [j % count for j in range(matrices)]


def is_due(step: int, phase: int, gap: int) -> bool:
    """Whether a matrix that has made ``step`` steps refreshes before its next: at its first, then every ``gap``."""
    return step == 0 or (step - phase) % gap == 0


def deal_owners(costs: Sequence[float], candidates: Sequence[Sequence[int]], ranks: int, first: int = 0) -> list[int]:
    """Deal the decompositions of one wave to the ranks that may do them, the costliest first, to the least loaded.

    Args:
        costs: cost of each decomposition (short³).
        candidates: for each, the ranks that hold rows of the matrix; not empty.
        ranks: how many there are.
        first: the rank with which ties begin; another one a wave, so that neighbours in the model, which are in
            different waves but become ready together in a backward pass, have different owners.

    Returns:
        The owner of each: every rank computes the same deal from the same plan.
    """
    load: dict[int, float] = {}
    owners = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        owners[j] = min(candidates[j], key=lambda rank: (load.get(rank, 0.0), (rank - first) % ranks))
        load[owners[j]] = load.get(owners[j], 0.0) + costs[j]
    return owners
