"""Moves rows of A: gradients to where they are computed, updates to where the weights lie.

What lies where it is computed is a view: no copy, no traffic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ds_lowrank.comm.collectives import Comm, Pending, done
from ds_lowrank.plan.geometry import Box
from ds_lowrank.plan.matrices import MatrixPlan
from ds_lowrank.subspace.sides import as_rows

# 1-D memory of what this rank holds of a parameter.
Memory = Callable[[MatrixPlan], Tensor]
Blocks = dict[str, list[Tensor]]


class RowExchange:
    """Moves gradients and updates of the matrices of one batch together.

    Args:
        comm: the collectives.
    """

    def __init__(self, comm: Comm):
        self._comm = comm
        self._rank = comm.ranks.rank
        self._device = comm.ranks.device
        self._routes: dict[tuple[str, str], tuple[list[tuple[int, Box]], list[tuple[int, Box]]]] = {}

    def collect(self, plans: Sequence[MatrixPlan], gradient: Memory) -> Pending[Blocks]:
        """Bring the rows of A together that this rank computes. Collective when rows of one of ``plans`` move.

        Args:
            plans: matrices of one dtype; those that move are the same on all ranks.
            gradient: of this rank's piece of a matrix's parameter.

        Returns:
            name -> blocks of rows of A (rows × short each), the view first, then the buffer.
        """
        moving = [p for p in plans if p.moves]
        arriving = self._move(
            moving,
            source=_held_boxes,
            target=_buffer_boxes,
            read=lambda plan, box: self._held_view(plan, gradient, box),
            purpose="gradient rows",
        )

        def blocks() -> Blocks:
            arrived = arriving.wait()
            found: Blocks = {}
            for plan in plans:
                share = plan.shares[self._rank]
                if share is None:
                    continue
                parts = [] if share.view is None else [self._held_view(plan, gradient, share.view)]
                if share.buffer is not None:
                    whole = torch.empty(share.buffer.shape, dtype=plan.dtype, device=self._device)
                    for box, values in arrived[plan.name]:
                        _inside(whole, share.buffer, box).copy_(values.view(box.shape))
                    parts.append(whole)
                found[plan.name] = [as_rows(part, plan.side) for part in parts]
            return found

        return Pending(blocks)

    def deliver(
        self,
        plans: Sequence[MatrixPlan],
        update: Callable[[MatrixPlan], Tensor],
        weights: Memory,
        apply: Callable[[MatrixPlan, Tensor, Tensor, Box], None],
    ) -> Pending[None]:
        """Bring what was computed elsewhere to the weights that this rank holds. Collective as ``collect``.

        Args:
            plans: those of the batch that make a step; the shared ones are the same on all ranks.
            update: what is added to the buffered rows of a matrix, in W's orientation.
            weights: of this rank's piece of a matrix's parameter; read at once and written at the end.
            apply: changes a view of the weights, those of a box of W, by an update of its shape.
        """
        moving = [p for p in plans if p.moves]
        arriving = self._move(
            moving,
            source=_buffer_boxes,
            target=_held_boxes,
            read=lambda plan, box: _inside(update(plan), _buffer_boxes(plan, self._rank)[0], box),
            purpose="updates",
        )
        replicated = [p for p in plans if p.replicated]
        handed = [
            self._hand_round([p for p in replicated if p.weight_dtype == d], weights) for d in _dtypes(replicated)
        ]

        def finish() -> None:
            for plan in moving:
                for box, values in arriving.wait().get(plan.name, []):
                    apply(plan, self._held_view(plan, weights, box), values.view(box.shape), box)
            for copy in handed:
                copy.wait()

        return Pending(finish)

    def _hand_round(self, plans: Sequence[MatrixPlan], weights: Memory) -> Pending[None]:
        """Copy the rows that other ranks have computed: weights and not updates, so that all ranks end up equal."""
        boxes = [[(p, s.view) for p in plans if (s := p.shares[k]) and s.view] for k in range(self._comm.ranks.size)]
        sizes = [sum(box.numel for _, box in mine) for mine in boxes]
        mine = torch.empty(sizes[self._rank], dtype=plans[0].weight_dtype, device=self._device)
        for (plan, box), room in zip(boxes[self._rank], _split(mine, boxes[self._rank])):
            room.copy_(self._held_view(plan, weights, box))
        gathering = self._comm.all_gather(mine, sizes, "weights")

        def copy() -> None:
            for rank, values in enumerate(gathering.wait()):
                if rank != self._rank:
                    for (plan, box), rows in zip(boxes[rank], _split(values, boxes[rank])):
                        self._held_view(plan, weights, box).copy_(rows)

        return Pending(copy)

    def _held_view(self, plan: MatrixPlan, memory: Memory, box: Box) -> Tensor:
        part = plan.parts[self._rank]
        assert part is not None
        return part.view(memory(plan), box)

    def _move(
        self,
        plans: Sequence[MatrixPlan],
        source: Callable[[MatrixPlan, int], Sequence[Box]],
        target: Callable[[MatrixPlan, int], Sequence[Box]],
        read: Callable[[MatrixPlan, Box], Tensor],
        purpose: str,
    ) -> Pending[dict[str, list[tuple[Box, Tensor]]]]:
        """Send every part of my ``source`` boxes to the ranks of my copy whose ``target`` boxes contain it."""
        if not plans:
            return done({})
        everyone = range(self._comm.ranks.size)
        outgoing: list[list[Tensor]] = [[] for _ in everyone]
        coming: list[list[tuple[MatrixPlan, Box]]] = [[] for _ in everyone]
        for plan in plans:
            # The same in every step, and most ranks have nothing for each other.
            key = (plan.name, purpose)
            if key not in self._routes:
                mine = self._rank
                self._routes[key] = (
                    [(k, b) for k in self._comm.ranks.shard_group for b in _meets(source(plan, mine), target(plan, k))],
                    [(k, b) for k in self._comm.ranks.shard_group for b in _meets(source(plan, k), target(plan, mine))],
                )
            to, origin = self._routes[key]
            for rank, box in to:
                outgoing[rank].append(read(plan, box))
            for rank, box in origin:
                coming[rank].append((plan, box))
        exchange = self._comm.exchange(outgoing, [sum(b.numel for _, b in c) for c in coming], plans[0].dtype, purpose)

        def boxes() -> dict[str, list[tuple[Box, Tensor]]]:
            found: dict[str, list[tuple[Box, Tensor]]] = {}
            for parts, values in zip(coming, exchange.wait()):
                for (plan, box), part in zip(parts, values.split([b.numel for _, b in parts])):
                    found.setdefault(plan.name, []).append((box, part))
            return found

        return Pending(boxes)


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


def _dtypes(plans: Sequence[MatrixPlan]) -> list[torch.dtype]:
    return list(dict.fromkeys(p.weight_dtype for p in plans))
