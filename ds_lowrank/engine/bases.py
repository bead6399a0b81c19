"""Bases that lie in slices on several ranks: sent to their keepers after a refresh, joined just ahead of their use.

A new basis travels as it was computed; its keepers round their rows to the format in which bases are kept, each row by
itself. What is joined is what is kept, and every rank decodes it: the same basis, bit by bit, wherever it is used. What
a selection does not store is made again from its key instead, on a CPU once a refresh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.state import MatrixState, number_of
from ds_lowrank.methods import Method
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.selections import Key
from ds_lowrank.states.packing import pack, unpack


class Bases:
    """Sends and joins bases.

    Args:
        comm: the collectives.
        method: how they are chosen and kept.
    """

    def __init__(self, comm: Comm, method: Method):
        self._comm = comm
        self._method = method
        self._format = method.formats.basis
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._group = comm.ranks.shard_group
        self._everyone = range(comm.ranks.size)
        # Those that are not stored, with the number of the refresh.
        self._drawn: dict[str, tuple[int, Tensor]] = {}

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
        # Whoever keeps all of a basis gets it in slices too, joined once: a broadcast that uses every link evenly.
        for plan in plans:
            if not plan.basis_sharded and len(plan.contributors) > 1:
                mine = found.pop(plan.name, None)
                (whole,) = self._join([plan], [mine], [plan.r], plan.dtype).wait()
                if whole is not None:
                    found[plan.name] = whole
        return found

    def whole(self, plan: MatrixPlan, state: MatrixState) -> Tensor | None:
        """A basis that this rank keeps whole, or that nobody keeps: short × r; ``None`` where no row is computed."""
        if plan.shares[self._rank] is None and not plan.projected:
            return None
        kept = state.get("basis")
        if isinstance(kept, Tensor) and kept.dtype == plan.dtype and kept.device == self._device:
            return kept  # as it is computed with
        if not self._method.selection.stored:
            return self._draw(plan, number_of(state, "refreshes") - 1)
        return self._format.decode(self._stored(state), plan.r, plan.dtype)

    def _draw(self, plan: MatrixPlan, refresh: int) -> Tensor:
        known = self._drawn.get(plan.name)
        if known is not None and known[0] == refresh:
            return known[1]
        self._drawn.pop(plan.name, None)  # before the next is made
        key = Key(self._method.seed, plan.name, refresh)
        found = self._method.selection.draw(key, plan.short, plan.r, plan.dtype, self._device)
        assert found is not None
        if self._method.keeps_drawn(self._device):
            self._drawn[plan.name] = (refresh, found.vectors)
        return found.vectors

    def join(self, plans: Sequence[MatrixPlan], states: Mapping[str, MatrixState]) -> Pending[dict[str, Tensor | None]]:
        """Whole bases of the matrices of a batch. Collective over the ranks of one copy of the model.

        Args:
            plans: shared; those with a sharded basis are the same on all ranks.
            states: name -> state, with the rows that this rank keeps.

        Returns:
            name -> short × r on the ranks' device; ``None`` where this rank neither computes a row of the matrix nor
            projects a gradient of its own.
        """
        sharded = [p for p in plans if p.basis_sharded and self._method.selection.stored]
        # Those that all ranks use travel in one all-gather, those that few use among these.
        parts = [part for few in (False, True) if (part := [p for p in sharded if p.few is few])]
        joining = []
        for part in parts:
            stored = [self._stored(states[p.name]) for p in part]
            kinds = [list(self._format.rows("basis", p.r, p.dtype).values()) for p in part]
            widths = [sum(tensor.bytes for tensor in kind) for kind in kinds]
            packed = [pack(tensors) if tensors else None for tensors in stored]
            joining.append((part, kinds, self._join(part, packed, widths, torch.uint8)))

        def bases() -> dict[str, Tensor | None]:
            found: dict[str, Tensor | None] = {}
            for part, kinds, pending in joining:
                for plan, kind, raw in zip(part, kinds, pending.wait()):
                    decode = self._format.decode
                    found[plan.name] = None if raw is None else decode(unpack(raw, kind), plan.r, plan.dtype)
            for plan in plans:
                if plan.name not in found:
                    found[plan.name] = self.whole(plan, states[plan.name])
            return found

        return Pending(bases)

    def _stored(self, state: MatrixState) -> list[Tensor]:
        found = [state.get(key) for key in self._format.keys("basis")]
        return [tensor.to(self._device) for tensor in found if isinstance(tensor, Tensor)]

    def _join(
        self, plans: Sequence[MatrixPlan], mine: Sequence[Tensor | None], widths: Sequence[int], dtype: torch.dtype
    ) -> Pending[list[Tensor | None]]:
        """Slices (rows × width) of one copy of the model, joined on every rank that computes rows of the matrices.

        Args:
            plans: all of them are used by all ranks of the copy, or none is.
            mine: this rank's slice of each.
            widths: numbers a row of each.
            dtype: of the numbers.
        """
        counts = [
            [(rows[1] - rows[0]) * width if (rows := p.slices[k]) else 0 for p, width in zip(plans, widths)]
            for k in self._everyone
        ]
        held = [part.reshape(-1).to(self._device) for part in mine if part is not None]
        if not plans[0].few:
            nothing = torch.empty(0, dtype=dtype, device=self._device)
            packed = held[0] if len(held) == 1 else torch.cat(held or [nothing])
            gathering = self._comm.all_gather(packed, [sum(counts[k]) for k in self._group], "bases joined")

            def gathered() -> list[Tensor | None]:
                parts = [values.split(counts[k]) for k, values in zip(self._group, gathering.wait())]
                return [torch.cat(slices).view(p.short, w) for p, w, slices in zip(plans, widths, zip(*parts))]

            return Pending(gathered)
        # Few ranks need these: only they send and receive.
        takes = [{k for k in self._group if p.shares[k] is not None} for p in plans]
        mine_of = dict(zip((p.name for p in plans), mine))
        send = [
            [
                part
                for p, takers in zip(plans, takes)
                if self._rank in takers and k in takers and (part := mine_of[p.name]) is not None
            ]
            for k in self._everyone
        ]
        coming = [[j for j, takers in enumerate(takes) if self._rank in takers and k in takers] for k in self._everyone]
        sizes = [[counts[k][j] for j in wanted] for k, wanted in enumerate(coming)]
        exchange = self._comm.exchange(send, [sum(s) for s in sizes], dtype, "bases joined")

        def joined() -> list[Tensor | None]:
            slices: list[list[Tensor]] = [[] for _ in plans]
            for wanted, size, values in zip(coming, sizes, exchange.wait()):
                for j, part in zip(wanted, values.split(size)):
                    slices[j].append(part)
            whole = zip(plans, widths, slices)
            return [torch.cat(found).view(p.short, w) if found else None for p, w, found in whole]

        return Pending(joined)
