"""When a matrix refreshes its subspace, and who decomposes it.

A refresh costs as much as hundreds of steps, so refreshes are spread over the period in waves of a fixed number of
matrices. The schedule depends on the model alone, never on the number of ranks: the trajectory must not either.
"""

from __future__ import annotations

from collections.abc import Sequence


def phases(costs: Sequence[int], gap: int, wave_size: int, stagger: bool) -> list[int]:
    """Phase of every matrix in the model's parameter order: ⌊w · gap / W⌋ for the matrices of wave w of W.

    Without ``stagger`` every phase is 0, as in the papers.
    """
    count = _count(costs, wave_size)
    return [wave * gap // count if stagger else 0 for wave in waves(costs, wave_size)]


def waves(costs: Sequence[int], wave_size: int) -> list[int]:
    """Wave of every matrix; it bounds what is refreshed at once also where all phases are 0.

    Each run of W = ⌈matrices / wave_size⌉ neighbours in the model gives one matrix to every wave, so that neighbours
    (which one rank tends to hold) are in different waves; the costliest goes to the wave with the least so far. Taking
    every W-th matrix instead would fill a wave with matrices of one kind where W is a multiple of a layer's.

    Args:
        costs: of refreshing each matrix: :func:`refresh_cost`.
        wave_size: the most matrices in a wave.
    """
    count = _count(costs, wave_size)
    load, wave = [0] * count, [0] * len(costs)
    for start in range(0, len(costs), count):
        run = sorted(range(start, min(start + count, len(costs))), key=lambda j: (-costs[j], j))
        for j, w in zip(run, sorted(range(count), key=lambda w: (load[w], w))):
            wave[j] = w
            load[w] += costs[j]
    return wave


def refresh_cost(long: int, short: int) -> int:
    """Roughly the multiplications of a refresh: the Gram's, and those for the eigenvectors of its side, some 5 side³.

    It is the shorter side's Gram whichever side is projected.
    """
    side = min(long, short)
    return side * side * (max(long, short) + 5 * side)


def _count(costs: Sequence[int], wave_size: int) -> int:
    return max(1, -(-len(costs) // wave_size))


def assign_owners(costs: Sequence[float], candidates: Sequence[Sequence[int]], ranks: int, first: int = 0) -> list[int]:
    """Assign the decompositions of one wave to the ranks that may do them, the costliest first, to the least loaded.

    Args:
        costs: cost of each decomposition (short³).
        candidates: for each, the ranks that hold rows of the matrix; not empty.
        ranks: how many there are.
        first: the rank with which ties begin; another one a wave, so that neighbours in the model, which are in
            different waves but become ready together in a backward pass, have different owners.

    Returns:
        The owner of each: the same on every rank, from the same plan.
    """
    load: dict[int, float] = {}
    owners = [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: (-costs[j], j)):
        owners[j] = min(candidates[j], key=lambda rank: (load.get(rank, 0.0), (rank - first) % ranks))
        load[owners[j]] = load.get(owners[j], 0.0) + costs[j]
    return owners
