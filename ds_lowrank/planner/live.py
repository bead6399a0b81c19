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


def live_elements(model: Model, setup: Setup) -> tuple[int, int]:
    """Elements of whole parameters alive at most, flat buffers included: in the forward and in the backward pass.

    Small parameters that stay on every rank are not in them, nor anything on one rank, where the partition is whole.
    """
    numel = {name: math.prod(shape) for name, shape in model.shapes.items()}
    padded = {name: -(-n // setup.ranks) * setup.ranks for name, n in numel.items()}
    order, backward = module_order(model, setup.checkpointing)
    kept = {name for name, n in numel.items() if n <= setup.persistence}
    if setup.ranks == 1:
        return 0, 0
    queue = deque((name, step) for step, module in enumerate(order) for name in module)
    used_at: dict[str, int] = {}
    live: set[str] = set()
    flying: dict[str, list[str]] = {}  # parameter -> those that it was fetched with
    buffers: dict[int, int] = {}  # fetched set -> elements of its flat buffer
    highest = [0, 0]

    def note(step: int) -> None:
        now = sum(padded[n] for n in live) + sum(buffers.values())
        phase = int(step >= backward)
        highest[phase] = max(highest[phase], now)

    for step, module in enumerate(order):
        wanted = [n for n in module if n not in kept]
        for name in wanted:
            if name not in live and name not in flying:
                live.add(name)  # alone: gathered in its place
        note(step)
        for name in wanted:
            if name in flying:
                together = flying.pop(name)
                live.update(together)
                note(step)
                if not any(flying.get(other) is together for other in together):
                    buffers.pop(id(together), None)
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
        if len(ahead) == 1:
            flying[ahead[0]] = ahead
            buffers[id(ahead)] = padded[ahead[0]]
        elif ahead:
            flying.update(dict.fromkeys(ahead, ahead))
            buffers[id(ahead)] = sum(padded[n] for n in ahead)
        note(step)
        soon = _used_soon(order[step + 1 :], numel, setup.max_reuse)
        live -= {n for n in wanted if n not in soon and used_at.get(n, -1) <= step}
    return highest[0], highest[1]


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
