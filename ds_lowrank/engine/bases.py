"""Bases that lie in slices on several ranks: sent to their keepers after a refresh, joined just ahead of their use.

A new basis travels as it was computed; its keepers round their rows to the format in which bases are kept, each row by
itself. What is joined is what is kept, and every rank decodes it: the same basis, bit by bit, wherever it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.states.formats import Format
from ds_lowrank.states.packing import pack, unpack


class Bases:
    """Sends and joins bases.

    Args:
        comm: the collectives.
        format: how they are kept.
    """

    def __init__(self, comm: Comm, format: Format):
        self._comm = comm
        self._format = format
        self._rank = comm.ranks.rank
        self._mates = comm.ranks.shard_group
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
        sizes = [[count * p.r for p, count in c] for c in coming]
        arrived = self._comm.exchange(send, [sum(s) for s in sizes], plans[0].dtype, "bases").wait()
        found: dict[str, Tensor] = {}
        for parts, size, values in zip(coming, sizes, arrived):
            for (plan, count), part in zip(parts, values.split(size)):
                found[plan.name] = part.view(count, plan.r)
        for plan in plans:
            # Whoever keeps all of a basis gets it in slices too, joined once: a broadcast that uses every link evenly.
            if not plan.basis_sharded and len(plan.contributors) > 1:
                whole = self._join(plan, found.pop(plan.name, None), plan.r, plan.dtype).wait()
                if whole is not None:
                    found[plan.name] = whole
        return found

    def stream(self, plans: Sequence[MatrixPlan], states: Mapping[str, Mapping[str, Any]]) -> Iterator[Tensor | None]:
        """The whole basis of one matrix after the other, the next one on its way while one is used.

        Collective over the ranks of one copy of the model where bases are sharded; the caller takes all of them.

        Args:
            plans: in the order of their use; those with a sharded basis are the same on all ranks.
            states: name -> state, with the rows that this rank keeps.

        Yields:
            short × r on the ranks' device; ``None`` where this rank computes no row of the matrix.
        """
        ahead: list[Pending[Tensor | None]] = [self._start(plan, states) for plan in plans[:1]]
        for i in range(len(plans)):
            current = ahead.pop()
            if i + 1 < len(plans):
                ahead.append(self._start(plans[i + 1], states))
            yield current.wait()

    def _start(self, plan: MatrixPlan, states: Mapping[str, Mapping[str, Any]]) -> Pending[Tensor | None]:
        form, r, dtype = self._format, plan.r, plan.dtype
        found = [states[plan.name].get(key) for key in form.keys("basis")]
        stored = [tensor.to(self._comm.ranks.device) for tensor in found if isinstance(tensor, Tensor)]
        if not plan.basis_sharded:
            return Pending(lambda: form.decode(stored, r, dtype) if stored else None)
        rows = form.rows("basis", r, dtype).values()
        joining = self._join(plan, pack(stored) if stored else None, sum(t.bytes for t in rows), torch.uint8)

        def decoded() -> Tensor | None:
            whole = joining.wait()
            return None if whole is None else form.decode(unpack(whole, rows), r, dtype)

        return Pending(decoded)

    def _join(self, plan: MatrixPlan, mine: Tensor | None, width: int, dtype: torch.dtype) -> Pending[Tensor | None]:
        """Slices (rows × width) of one copy of the model, joined on every rank that computes rows of the matrix."""
        device = self._comm.ranks.device
        counts = {k: (rows[1] - rows[0]) * width if (rows := plan.slices[k]) else 0 for k in self._mates}
        part = torch.empty(0, dtype=dtype, device=device) if mine is None else mine.reshape(-1).to(device)
        takers = [k for k in self._mates if plan.shares[k] is not None]
        if takers == self._mates:
            gathering = self._comm.all_gather(part, list(counts.values()), "bases joined")
            return Pending(lambda: torch.cat(gathering.wait()).view(plan.short, width))
        # Few ranks need it: only they send and receive.
        taking = self._rank in takers
        send = [[part] if taking and k in takers else [] for k in self._everyone]
        receive = [counts[k] if taking and k in takers else 0 for k in self._everyone]
        exchange = self._comm.exchange(send, receive, dtype, "bases joined")

        def joined() -> Tensor | None:
            slices = exchange.wait()
            return torch.cat(slices).view(plan.short, width) if taking else None

        return Pending(joined)
