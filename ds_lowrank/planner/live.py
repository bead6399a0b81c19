"""Whole parameters that ZeRO-3 has on a rank at once: DeepSpeed's coordinator replayed with numbers.

Follows ``partitioned_param_coordinator.py`` of 0.19.8 from the second step on, when it knows the order of modules: what
a module needs is fetched, the next ``prefetch_bucket`` elements are fetched ahead while fewer than ``max_live`` are
there, and a module's parameters stay if they are used again within ``max_reuse`` elements. Parameters fetched together
come in one flat buffer, from which each is copied; the buffer stays until the last of them has been used.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import Setup


def module_order(model: Model, checkpointing: bool) -> tuple[list[list[str]], int]:
    """Parameters of one module after the other through a step, and where the backward pass begins.

    With checkpointing a layer is run forward again ahead of its backward pass.
    """
    forward = model.modules
    layer_of = {name: index for index, layer in enumerate(model.layers) for name in layer}
    order = list(forward)
    backward = list(reversed(forward))
    if not checkpointing:
        return order + backward, len(order)
    again: set[int] = set()
    for module in backward:
        layer = layer_of.get(module[0])
        if layer is not None and layer not in again:
            again.add(layer)
            order += [m for m in forward if layer_of.get(m[0]) == layer]
        order.append(module)
    return order, len(forward)


@dataclass(frozen=True)
class Live:
    """Elements of whole parameters alive at most, flat buffers included.

    Small parameters that stay on every rank are not in them, nor anything on one rank, where the partition is whole.

    Attributes:
        forward: in the forward pass.
        turn: between the passes.
        layers: index of a layer -> in its backward pass.
        end: after the layers.
    """

    forward: int = 0
    turn: int = 0
    layers: dict[int, int] = field(default_factory=dict)
    end: int = 0


def live_elements(model: Model, setup: Setup) -> Live:
    """Replay a step of ``model`` from the second on."""
    numel = {name: math.prod(shape) for name, shape in model.shapes.items()}
    padded = {name: -(-n // setup.ranks) * setup.ranks for name, n in numel.items()}
    order, backward = module_order(model, setup.checkpointing)
    kept = {name for name, n in numel.items() if n <= setup.persistence}
    if setup.ranks == 1:
        return Live()
    layer_of = {name: index for index, layer in enumerate(model.layers) for name in layer}
    queue = deque((name, step) for step, module in enumerate(order) for name in module)
    used_at: dict[str, int] = {}
    live: set[str] = set()
    flying: dict[str, int] = {}  # parameter -> number of the set that it was fetched with, until it is used
    fetched: list[list[str]] = []
    buffers: dict[int, int] = {}  # number of a set -> elements of its flat buffer
    forward = turn = end = 0
    layers: dict[int, int] = {}

    def note(step: int) -> None:
        nonlocal forward, end
        now = sum(padded[n] for n in live) + sum(buffers.values())
        layer = layer_of.get(order[step][0])
        if step < backward:
            forward = max(forward, now)
        elif layer is not None:
            layers[layer] = max(layers.get(layer, 0), now)
        elif layers:
            end = max(end, now)

    for step, module in enumerate(order):
        wanted = [n for n in module if n not in kept]
        for name in wanted:
            if name not in live and name not in flying:
                live.add(name)  # alone: gathered in its place
        note(step)
        for name in wanted:
            if name in flying:
                number = flying.pop(name)
                if len(fetched[number]) == 1:  # gathered in its place
                    buffers.pop(number)
                live.update(fetched[number])
                fetched[number] = []  # all of them are there now
                note(step)
                if number not in flying.values():
                    buffers.pop(number, None)
        fresh = {n for n in module if used_at.get(n, -1) < step}
        while queue and fresh:
            name, at = queue.popleft()
            used_at[name] = at
            fresh.discard(name)
        ahead: list[str] = []
        room = min(setup.max_live - sum(numel[n] for n in live | set(flying)), setup.prefetch_bucket)
        while queue and sum(numel[n] for n in ahead) < room:
            name, at = queue.popleft()
            used_at[name] = max(used_at.get(name, -1), at)
            if name not in kept and name not in live and name not in flying and name not in ahead:
                ahead.append(name)
        if ahead:
            flying.update(dict.fromkeys(ahead, len(fetched)))
            buffers[len(fetched)] = sum(padded[n] for n in ahead)
            fetched.append(ahead)
        note(step)
        soon = _used_soon(order[step + 1 :], numel, setup.max_reuse)
        live -= {n for n in wanted if n not in soon and used_at.get(n, -1) <= step}
        if step == backward - 1:
            turn = sum(padded[n] for n in live) + sum(buffers.values())
    return Live(forward, turn, layers, end)


def _used_soon(coming: Sequence[Sequence[str]], numel: dict[str, int], distance: int) -> set[str]:
    """Parameters of the modules that come within ``distance`` elements."""
    found: set[str] = set()
    passed = 0
    for module in coming:
        if passed >= distance:
            break
        found.update(module)
        passed += sum(numel[n] for n in module)
    return found
