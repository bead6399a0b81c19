"""Bases that lie in slices on several ranks: sent to their keepers after a refresh, joined just ahead of their use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm import Comm, Pending, done
from ds_lowrank.plan import MatrixPlan


class Bases:
    """Sends and joins bases.

    Args:
        comm: the collectives.
    """

    def __init__(self, comm: Comm):
        self._comm = comm
        self._rank = comm.ranks.rank
        self._mates = comm.ranks.mates
        self._everyone = range(comm.ranks.size)

    def scatter(self, plans: Sequence[MatrixPlan], drawn: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring new bases from their owners to their keepers. Collective over all ranks.

        Args:
            plans: shared matrices of one dtype that have a new basis.
            drawn: name -> basis (short × r) of those that this rank owns.

        Returns:
            name -> the rows that this rank is to keep, for those of which it keeps some.
        """
        send = [
            [drawn[p.name][slice(*rows)] for p in plans if p.owner == self._rank and (rows := p.slices[k])]
            for k in self._everyone
        ]
        coming = [
            [(p, rows[1] - rows[0]) for p in plans if p.owner == k and (rows := p.slices[self._rank])]
            for k in self._everyone
        ]
        sizes = [[count * p.rank for p, count in c] for c in coming]
        arrived = self._comm.exchange(send, [sum(s) for s in sizes], plans[0].dtype, "bases").wait()
        found: dict[str, Tensor] = {}
        for parts, size, values in zip(coming, sizes, arrived):
            for (plan, count), part in zip(parts, values.split(size)):
                found[plan.name] = part.view(count, plan.rank)
        for plan in plans:
            # Whoever keeps all of a basis gets it in slices too, joined once: a broadcast that uses every link evenly.
            if not plan.spread and len(plan.witnesses) > 1:
                whole = self._join(plan, found.pop(plan.name, None)).wait()
                if whole is not None:
                    found[plan.name] = whole
        return found

    def stream(self, plans: Sequence[MatrixPlan], kept: Mapping[str, Tensor]) -> Iterator[Tensor | None]:
        """The whole basis of one matrix after the other, the next one on its way while one is used.

        Collective over the ranks of one copy of the model where bases are spread; the caller takes all of them.

        Args:
            plans: in the order of their use; those with a spread basis are the same on all ranks.
            kept: name -> the rows that this rank keeps.

        Yields:
            short × r on the ranks' device; ``None`` where this rank computes no row of the matrix.
        """
        ahead: list[Pending[Tensor | None]] = [self._start(plan, kept) for plan in plans[:1]]
        for i in range(len(plans)):
            current = ahead.pop()
            if i + 1 < len(plans):
                ahead.append(self._start(plans[i + 1], kept))
            yield current.wait()

    def _start(self, plan: MatrixPlan, kept: Mapping[str, Tensor]) -> Pending[Tensor | None]:
        mine = kept.get(plan.name)
        if plan.spread:
            return self._join(plan, mine)
        return done(None if mine is None else mine.to(self._comm.ranks.device))

    def _join(self, plan: MatrixPlan, mine: Tensor | None) -> Pending[Tensor | None]:
        """Whole basis on every rank that computes rows of the matrix, from the slices of its copy of the model."""
        device = self._comm.ranks.device
        counts = {k: (rows[1] - rows[0]) * plan.rank if (rows := plan.slices[k]) else 0 for k in self._mates}
        part = torch.empty(0, dtype=plan.dtype, device=device) if mine is None else mine.reshape(-1).to(device)
        takers = [k for k in self._mates if plan.shares[k] is not None]
        if takers == self._mates:
            gathering = self._comm.all_gather(part, list(counts.values()), "bases joined")
            return Pending(lambda: torch.cat(gathering.wait()).view(plan.short, plan.rank))
        # Few ranks need it: only they send and receive.
        taking = self._rank in takers
        send = [[part] if taking and k in takers else [] for k in self._everyone]
        receive = [counts[k] if taking and k in takers else 0 for k in self._everyone]
        exchange = self._comm.exchange(send, receive, plan.dtype, "bases joined")

        def joined() -> Tensor | None:
            slices = exchange.wait()
            return torch.cat(slices).view(plan.short, plan.rank) if taking else None

        return Pending(joined)
