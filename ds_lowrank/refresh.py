"""Refreshing subspaces across ranks: Grams to the owner, decisions and bases back to the holders.

Nobody gathers a full gradient and nobody repeats a decomposition. What the owner decided travels with the basis, to
every rank, so that the ranks agree on which matrices are born and how often they have refreshed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_lowrank.comm import Comm
from ds_lowrank.rows import MatrixPlan
from ds_lowrank.subspace.basis import Basis, carry_moments_, draw_basis, overlap
from ds_lowrank.subspace.project import gram
from ds_lowrank.subspace.schedule import is_due

logger = logging.getLogger(__name__)

# What a rank keeps of one matrix; numbers and tensors only, so that weights_only=True loads it. See states.
MatrixState = dict[str, int | Tensor]
_HEADER = 1  # numbers before the indices in a verdict on the wire: is there a new basis


@dataclass(frozen=True)
class Verdict:
    """What an owner tells every rank about one matrix; the basis itself goes to those who compute.

    Attributes:
        fresh: whether there is a new basis.
        indices: (r,) int32, the kept singular directions.
    """

    fresh: bool
    indices: Tensor

    def pack(self) -> Tensor:
        """As float64 numbers, in which indices are exact."""
        return torch.tensor([float(self.fresh), *self.indices.tolist()], dtype=torch.float64)

    @staticmethod
    def unpack(packed: Tensor) -> Verdict:
        """Inverse of :meth:`pack`."""
        return Verdict(bool(packed[0]), packed[_HEADER:].to(torch.int32))


@dataclass
class RefreshStats:
    """Sums over the matrices that this rank has decomposed since the last reading.

    Attributes:
        decomposed: how many.
        seconds: wall time of the refreshes of this rank, exchanges included.
        overlap, overlaps: sum and number of overlaps with the basis before.
        captured: sum of the shares of gradient energy inside the new subspace.
    """

    decomposed: int = 0
    seconds: float = 0.0
    overlap: float = 0.0
    overlaps: int = 0
    captured: float = 0.0


class Refresher:
    """Gives matrices that are due a new basis.

    Args:
        comm: the collectives.
        selection, moments, seed: see :class:`ds_lowrank.LowRankConfig`.
        gram_dtype: float32 or float64.
    """

    def __init__(self, comm: Comm, selection: str, moments: str, seed: int, gram_dtype: torch.dtype):
        self._comm = comm
        self._rank = comm.ranks.rank
        self._selection = selection
        self._moments = moments
        self._seed = seed
        self._gram_dtype = gram_dtype
        self._warned = False
        self.stats = RefreshStats()

    def run(
        self,
        plans: Sequence[MatrixPlan],
        blocks: Mapping[str, Sequence[Tensor]],
        states: Mapping[str, MatrixState],
        dtype: torch.dtype,
    ) -> None:
        """Refresh those of ``plans`` that are due. Collective when one of them is cut.

        Args:
            plans: the matrices of this call that have a gradient, the same on all ranks as far as they are cut.
            blocks: name -> blocks of rows of A's gradient on this rank.
            states: name -> state; the counters of cut matrices are known to every rank, others to their holder.
            dtype: of the bases, the same for all of ``plans``.
        """
        due = [p for p in plans if p.name in states and is_due(_int(states[p.name], "step"), p.phase, p.gap)]
        if not due:
            return
        start = time.perf_counter()
        for plan in due:
            if not plan.cut:
                state = states[plan.name]
                drawn = self._draw(plan, self._gram(plan, blocks), state, dtype)
                if drawn is not None:
                    self._install(plan, state, drawn.vectors, drawn.indices)
        shared = [p for p in due if p.cut]
        if shared:
            self._refresh_shared(shared, blocks, states, dtype)
        self.stats.seconds += time.perf_counter() - start

    def _gram(self, plan: MatrixPlan, blocks: Mapping[str, Sequence[Tensor]]) -> Tensor:
        device = self._comm.ranks.device
        parts = [gram(block.to(device), self._gram_dtype) for block in blocks[plan.name]]
        return parts[0] if len(parts) == 1 else parts[0].add_(parts[1])

    def _draw(self, plan: MatrixPlan, gram_sum: Tensor, state: MatrixState, dtype: torch.dtype) -> Basis | None:
        """Decompose on the owner."""
        drawn = draw_basis(
            gram_sum,
            plan.rank,
            self._selection,
            dtype,
            candidates=min(plan.shape),
            seed=self._seed,
            name=plan.name,
            refresh=_int(state, "refreshes"),
        )
        if drawn is None:
            self._explain(plan, gram_sum)
            return None
        self.stats.decomposed += 1
        self.stats.captured += drawn.captured
        if _int(state, "refreshes"):
            self.stats.overlap += overlap(_tensor(state, "basis").to(drawn.vectors), drawn.vectors)
            self.stats.overlaps += 1
        return drawn

    def _explain(self, plan: MatrixPlan, gram_sum: Tensor) -> None:
        if not self._warned and float(gram_sum.diagonal().sum()) != 0.0:  # a zero gradient is ordinary, NaN != 0
            self._warned = True
            logger.warning(
                "%s %s: its gradient is not finite or its Gram matrix cannot be decomposed; the matrix keeps the "
                "subspace it has. Reported once.",
                plan.name,
                plan.shape,
            )

    def _install(self, plan: MatrixPlan, state: MatrixState, vectors: Tensor, indices: Tensor) -> None:
        if plan.shares[self._rank] is not None:
            basis = _tensor(state, "basis")
            if _int(state, "refreshes"):
                carry_moments_(_tensor(state, "exp_avg"), basis, vectors.to(basis), self._moments)
            basis.copy_(vectors)
            _tensor(state, "indices").copy_(indices)
        state["refreshes"] = _int(state, "refreshes") + 1

    def _refresh_shared(
        self,
        plans: Sequence[MatrixPlan],
        blocks: Mapping[str, Sequence[Tensor]],
        states: Mapping[str, MatrixState],
        dtype: torch.dtype,
    ) -> None:
        """Cut matrices: Gram blocks to the owner, the verdict to everyone, the basis to those who compute."""
        grams = self._sum_grams(plans, blocks)
        drawn = {p.name: self._draw(p, grams[p.name], states[p.name], dtype) for p in plans if p.name in grams}
        verdicts = self._tell(plans, drawn)
        fresh = [p for p in plans if verdicts[p.name].fresh]
        bases = self._send_bases(fresh, drawn, dtype)
        for plan in fresh:
            # A rank that computes no row of it gets no basis: only its counter moves.
            vectors = bases.get(plan.name, torch.empty(0))
            self._install(plan, states[plan.name], vectors, verdicts[plan.name].indices)

    def _sum_grams(self, plans: Sequence[MatrixPlan], blocks: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """Gram of the whole matrix, on its owner: the ranks' parts summed in rank order."""
        everyone = range(self._comm.ranks.size)
        mine = {p.name: self._gram(p, blocks) for p in plans if self._rank in p.computing}
        owned = [p for p in plans if p.owner == self._rank]
        send = [[mine[p.name] for p in plans if p.owner == k and p.name in mine] for k in everyone]
        coming = [[p for p in owned if k in p.computing] for k in everyone]
        arrived = self._comm.exchange(
            send, [sum(p.short**2 for p in c) for c in coming], self._gram_dtype, "Gram matrices"
        )
        totals: dict[str, Tensor] = {}
        for parts, values in zip(coming, arrived):
            for plan, part in zip(parts, values.split([p.short**2 for p in parts])):
                square = part.view(plan.short, plan.short)
                totals[plan.name] = totals[plan.name].add_(square) if plan.name in totals else square
        return totals

    def _tell(self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Basis | None]) -> dict[str, Verdict]:
        """Owners tell every rank what they decided."""
        everyone = range(self._comm.ranks.size)
        said = []
        for plan in plans:
            if plan.owner == self._rank:
                basis = drawn[plan.name]
                indices = torch.full((plan.rank,), -1) if basis is None else basis.indices
                said.append(Verdict(basis is not None, indices).pack())
        sizes = [[_HEADER + p.rank for p in plans if p.owner == k] for k in everyone]
        arrived = self._comm.exchange(
            [said for _ in everyone], [sum(s) for s in sizes], torch.float64, "refresh verdicts"
        )
        verdicts: dict[str, Verdict] = {}
        for k, values in zip(everyone, arrived):
            owned = [p for p in plans if p.owner == k]
            for plan, packed in zip(owned, values.cpu().split(sizes[k])):
                verdicts[plan.name] = Verdict.unpack(packed)
        return verdicts

    def _send_bases(
        self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Basis | None], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        everyone = range(self._comm.ranks.size)
        send: list[list[Tensor]] = [[] for _ in everyone]
        for plan in plans:
            basis = drawn.get(plan.name)
            if plan.owner == self._rank and basis is not None:
                for k in plan.computing:
                    send[k].append(basis.vectors)
        coming = [[p for p in plans if p.owner == k and self._rank in p.computing] for k in everyone]
        arrived = self._comm.exchange(send, [sum(p.short * p.rank for p in c) for c in coming], dtype, "bases")
        bases: dict[str, Tensor] = {}
        for parts, values in zip(coming, arrived):
            for plan, part in zip(parts, values.split([p.short * p.rank for p in parts])):
                bases[plan.name] = part.view(plan.short, plan.rank)
        return bases


def _int(state: MatrixState, key: str) -> int:
    value = state[key]
    assert isinstance(value, int)
    return value


def _tensor(state: MatrixState, key: str) -> Tensor:
    value = state[key]
    assert isinstance(value, Tensor)
    return value
