"""Moves rows of A: gradients to where they are computed, updates to where the weights lie.

What lies where it is computed is a view: no copy, no traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending
from ds_lowrank.engine.held import Held
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.subspace.sides import as_rows

# name -> blocks of rows of A's gradient (rows × short each): those that lie here first, then those brought together.
Blocks = dict[str, list[Tensor]]
# Boxes of W with what arrived for them, flat.
Arrived = list[tuple[MatrixPlan, Box, Tensor]]
# Ranks with boxes that go there, and with boxes that come from there.
Route = tuple[list[tuple[int, Box]], list[tuple[int, Box]]]


class RowExchange:
    """Moves gradients and updates of the matrices of one batch together.

    Args:
        comm: the collectives.
        held: what this rank holds.
    """

    def __init__(self, comm: Comm, held: Held):
        self._comm = comm
        self._held = held
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._routes: dict[tuple[str, bool], Route] = {}

    def local(self, plan: MatrixPlan) -> list[Tensor]:
        """The block of rows that lies where it is computed, if there is one; zeros where the gradient is missing."""
        rows = self._held.gradient_rows(plan)
        if rows is None:
            rows = self._held.missing_rows(plan)
        return [] if rows is None else [rows]

    def collect(self, plans: Sequence[MatrixPlan]) -> Pending[Blocks]:
        """Bring the rows of A together that this rank computes. Collective when rows of one of ``plans`` move.

        Args:
            plans: matrices of one dtype; those that move are the same on all ranks.
        """
        arrived = self._move([p for p in plans if p.moves], True, self._held.gradients, "gradient rows")

        def blocks() -> Blocks:
            found: Blocks = {}
            for plan in plans:
                share = plan.shares[self._rank]
                if share is not None:
                    found[plan.name] = [] if share.view is None else self.local(plan)
            whole: dict[str, Tensor] = {}
            for plan, box, values in arrived():
                frame = plan.shares[self._rank].buffer  # type: ignore[union-attr]
                assert frame is not None
                if plan.name not in whole:
                    whole[plan.name] = torch.empty(frame.shape, dtype=plan.dtype, device=self._device)
                    found[plan.name].append(as_rows(whole[plan.name], plan.side))
                _inside(whole[plan.name], frame, box).copy_(values.view(box.shape))
            return found

        return Pending(blocks)

    def send_back(self, plans: Sequence[MatrixPlan], updates: Mapping[str, Tensor]) -> Callable[[], Arrived]:
        """Bring what was computed elsewhere to who holds the weights. Collective as :meth:`collect`.

        Args:
            plans: those of the batch that make a step; the shared ones are the same on all ranks.
            updates: name -> what is added to the buffered rows of a matrix, in W's orientation.

        Returns:
            What waits for it.
        """

        def read(plan: MatrixPlan, boxes: Sequence[Box]) -> list[Tensor]:
            frame = plan.shares[self._rank].buffer  # type: ignore[union-attr]
            assert frame is not None
            return [_inside(updates[plan.name], frame, box) for box in boxes]

        return self._move([p for p in plans if p.moves], False, read, "updates")

    def hand_round(self, plans: Sequence[MatrixPlan]) -> list[Pending[None]]:
        """Where every rank holds matrices whole, copy the rows that other ranks have computed: weights and not updates,
        so that all ranks end up equal. Collective.
        """
        replicated = [p for p in plans if p.replicated]
        dtypes = dict.fromkeys(p.weight_dtype for p in replicated)
        return [self._hand_round([p for p in replicated if p.weight_dtype == dtype]) for dtype in dtypes]

    def spread(
        self, plans: Sequence[MatrixPlan], mine: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Pending[dict[str, Tensor]]:
        """Where every rank holds matrices whole, give it the directions of all rows, also of those that others have
        computed. Collective.

        Args:
            plans: of one r.
            mine: name -> N of the rows that this rank computes, rows × r.
            dtype: of the numbers on the wire.

        Returns:
            name -> N of all rows, long × r in ``dtype``: the same numbers on all ranks.
        """
        group = self._comm.ranks.shard_group
        counts = [[p.rows_of(k) * p.r for p in plans] for k in group]
        parts = [mine[p.name].reshape(-1) for p in plans if p.name in mine]
        packed = torch.cat([part.to(self._device, dtype) for part in parts]) if parts else self._none(dtype)
        gathering = self._comm.all_gather(packed, [sum(c) for c in counts], "directions")

        def whole() -> dict[str, Tensor]:
            pieces = zip(*(values.split(count) for values, count in zip(gathering.wait(), counts)))
            return {p.name: torch.cat(of).view(p.long, p.r) for p, of in zip(plans, pieces)}

        return Pending(whole)

    def _none(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype, device=self._device)

    def _hand_round(self, plans: Sequence[MatrixPlan]) -> Pending[None]:
        boxes = [[(p, s.view) for p in plans if (s := p.shares[k]) and s.view] for k in range(self._comm.ranks.size)]
        sizes = [sum(box.numel for _, box in mine) for mine in boxes]
        mine = torch.empty(sizes[self._rank], dtype=plans[0].weight_dtype, device=self._device)
        for (plan, box), room in zip(boxes[self._rank], _split(mine, boxes[self._rank])):
            room.copy_(self._held.weights(plan, box))
        gathering = self._comm.all_gather(mine, sizes, "weights")

        def copy() -> None:
            for rank, values in enumerate(gathering.wait()):
                if rank != self._rank:
                    for (plan, box), rows in zip(boxes[rank], _split(values, boxes[rank])):
                        self._held.weights(plan, box).copy_(rows)

        return Pending(copy)

    def _move(
        self,
        plans: Sequence[MatrixPlan],
        out: bool,
        read: Callable[[MatrixPlan, Sequence[Box]], list[Tensor]],
        purpose: str,
    ) -> Callable[[], Arrived]:
        """Bring what ranks of my copy hold of buffered rows to those that compute them (``out``), or back."""
        if not plans:
            return list
        everyone = range(self._comm.ranks.size)
        outgoing: list[list[Tensor]] = [[] for _ in everyone]
        coming: list[list[tuple[MatrixPlan, Box]]] = [[] for _ in everyone]
        sizes: list[list[int]] = [[] for _ in everyone]
        for plan in plans:
            to, origin = self._routes.get((plan.name, out)) or self._find_route(plan, out)
            for (rank, _), values in zip(to, read(plan, [box for _, box in to]) if to else ()):
                outgoing[rank].append(values)
            for rank, box in origin:
                coming[rank].append((plan, box))
                sizes[rank].append(box.numel)
        exchange = self._comm.exchange(outgoing, [sum(s) for s in sizes], plans[0].dtype, purpose)

        def arrived() -> Arrived:
            found: Arrived = []
            for parts, size, values in zip(coming, sizes, exchange.wait()):
                found += [(plan, box, part) for (plan, box), part in zip(parts, values.split(size))]
            return found

        return arrived

    def _find_route(self, plan: MatrixPlan, out: bool) -> Route:
        """Boxes that go to other ranks, and that come: the same in every step, and most ranks have nothing to do."""
        source, target = (_held_boxes, _buffer_boxes) if out else (_buffer_boxes, _held_boxes)
        mine, group = self._rank, self._comm.ranks.shard_group
        route = self._routes[plan.name, out] = (
            [(k, b) for k in group for b in _meets(source(plan, mine), target(plan, k))],
            [(k, b) for k in group for b in _meets(source(plan, k), target(plan, mine))],
        )
        return route


def _held_boxes(plan: MatrixPlan, rank: int) -> Sequence[Box]:
    part = plan.parts[rank]
    return () if part is None else part.boxes


def _buffer_boxes(plan: MatrixPlan, rank: int) -> Sequence[Box]:
    share = plan.shares[rank]
    return () if share is None or share.buffer is None else (share.buffer,)


def _meets(some: Sequence[Box], others: Sequence[Box]) -> list[Box]:
    return [box for a in some for b in others if (box := a.meet(b)) is not None]


def _inside(whole: Tensor, frame: Box, box: Box) -> Tensor:
    """The part ``box`` of a tensor that covers ``frame``."""
    return whole[box.top - frame.top : box.bottom - frame.top, box.left - frame.left : box.right - frame.left]


def _split(values: Tensor, boxes: Sequence[tuple[MatrixPlan, Box]]) -> list[Tensor]:
    parts = values.split([box.numel for _, box in boxes])
    return [part.view(box.shape) for part, (_, box) in zip(parts, boxes)]
