"""What a framework holds on a rank beside activations and the optimizer: weights, masters, gradients, buffers.

From DeepSpeed 0.19.8 (``stage_1_and_2.py``, ``stage3.py``), torch 2.13 (``_fsdp_collectives.py``) and
DistributedDataParallel; docs/memory.md names the lines' origin term by term.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from ds_lowrank.layouts.base import Piece
from ds_lowrank.layouts.cuts import Shape
from ds_lowrank.planner.arrangement import Arrangement, padded_share, partition_size
from ds_lowrank.planner.live import live_elements
from ds_lowrank.planner.model import Model
from ds_lowrank.planner.setup import DTYPES, Setup

_NORM = 8  # DeepSpeed widens one gradient at a time to fp64 for the norm


@dataclass(frozen=True)
class Frame:
    """Bytes of the framework on one rank.

    Attributes:
        weights: what the model computes with, between steps.
        master: the copy that the optimizer steps.
        gradients: after the backward pass.
        gradients_stay: they are there between steps too.
        local: gradients that passes before the last of a step leave whole on the rank that made them.
        buckets: that gradients are reduced in, while the backward pass runs.
        buckets_stay: bytes of them that are there between steps too.
        forward, loss, head, backward, embedding: whole parameters, gradients of them and copies on their way: in the
            forward pass, where the loss is computed, and in the backward pass of the head, the layers, and at its end.
        by_layer: index of a layer -> what is there beside ``backward`` in its backward pass.
        norm: while the norm of all gradients is computed.
        copies: number of a call of ``step()`` -> the gradient that is made for it, at its start and while it runs.
        host: on the CPU.
    """

    weights: int
    master: int
    gradients: int
    gradients_stay: bool = False
    local: int = 0
    buckets: int = 0
    buckets_stay: int = 0
    forward: int = 0
    loss: int = 0
    head: int = 0
    backward: int = 0
    embedding: int = 0
    by_layer: dict[int, int] = field(default_factory=dict)
    norm: int = 0
    copies: dict[int, tuple[int, int]] = field(default_factory=dict)
    host: int = 0


def frames(model: Model, arrangement: Arrangement, setup: Setup, reduced: Model | None = None) -> list[Frame]:
    """What the framework of ``setup`` holds on each rank.

    Args:
        model, arrangement, setup: the run.
        reduced: of the model, what the framework steps or reduces gradients of; default: all. Of ZeRO-1 and 2 the
            rest is not in the figures at all.
    """
    if setup.kind in ("zero1", "zero2"):
        return _zero12(reduced or model, arrangement, setup)
    if setup.kind == "zero3":
        alike = _zero3(model, arrangement, setup, reduced or model)
    elif setup.kind == "fsdp2":
        alike = _fsdp2(model, setup, reduced or model)
    else:
        alike = _replicated(model, setup, reduced or model)
    return [alike] * setup.ranks


def _largest(shapes: Iterable[Shape]) -> int:
    return max(map(math.prod, shapes), default=0)


def _zero12(model: Model, arrangement: Arrangement, setup: Setup) -> list[Frame]:
    b, m, n = setup.width, setup.master_width, setup.ranks
    partitions = [partition_size(group, n) for group in arrangement.groups]
    weights = sum(size * n for size in partitions) * b + model.buffer_bytes
    apart = setup.accumulation_dtype == "fp32" and setup.dtype != "fp32"  # one fp32 buffer a partition
    largest = _largest(model.shapes.values())
    buckets = (2 if setup.overlap else 1) * setup.reduce_bucket * b
    sending, by_layer, at_end = _sent_of(model, setup)
    late = setup.kind == "zero1" and (setup.accumulation > 1 or not setup.overlap)
    passing = model.numel * b if late else 0  # stage 1 reduces all at the end, or has accumulated all
    again = setup.kind == "zero2" and setup.accumulation > 1 and not apart  # those of the micro-steps before
    copies = {}
    for index, size in enumerate(partitions):
        # fp32 gradients lie flattened; others are flattened. What is not in the master's dtype is then converted.
        during = 0 if apart and m == 4 else m * size
        start = during + (b * size if b != m and not apart else 0)
        copies[index] = (start, during)
    numels = {name: math.prod(shape) for name, shape in model.shapes.items()}

    def on_rank(held: dict[str, Piece]) -> Frame:
        # A parameter that a boundary cuts lies whole in the gradients of each rank that has a part of it.
        gradients = 4 * sum(partitions) if apart else b * sum(numels[name] for name in held)
        before = gradients if again else passing
        if setup.offload:
            # Gradients go to the CPU as they are reduced; a buffer of the largest parameter stays on the device.
            return Frame(
                weights=weights,
                master=0,
                gradients=0,
                buckets=buckets + b * largest,
                buckets_stay=b * largest,
                head=before + b * largest,
                backward=before + sending,
                by_layer=by_layer,
                embedding=before + at_end,
                norm=0,  # taken parameter by parameter, as they are reduced
                copies={},
                host=(2 * m + b) * sum(partitions) + b * largest,
            )
        return Frame(
            weights=weights,
            master=m * sum(partitions),
            gradients=gradients,
            buckets=buckets,
            head=before + b * largest,
            backward=before + sending,
            by_layer=by_layer,
            embedding=before + at_end,
            norm=_NORM * max((p.stop - p.start for p in held.values()), default=0),
            copies=copies,
        )

    return [on_rank(held) for held in arrangement.pieces]


def _sending(numels: list[int], setup: Setup) -> int:
    """Gradients of parameters of ``numels`` on their way.

    One that is too large for the bucket is reduced where it is; others as a copy of the bucket. In another dtype than
    the model's they are copied once more.
    """
    b = setup.width
    again = DTYPES[setup.communication_dtype] if setup.communication_dtype != setup.dtype else 0
    inside = max((n for n in numels if n <= setup.reduce_bucket), default=0)
    alone = max((n for n in numels if n > setup.reduce_bucket), default=0)
    return max((b + again) * alone, (b + again) * min(setup.reduce_bucket, sum(numels)) + b * inside)


def _sent_of(model: Model, setup: Setup) -> tuple[int, dict[int, int], int]:
    """Gradients on their way in the layers; by layer what comes to that (the head's beside the last); at the end."""
    inside = {name for layer in model.layers for name in layer}
    layers = _sending([model.numel_of([n]) for n in model.shapes if n in inside], setup)
    rest = _sending([math.prod(s) for s in model.shapes.values()], setup)
    by_layer = dict.fromkeys(range(max(len(model.layers), 1)), 0)
    by_layer[max(by_layer)] = max(rest - layers, 0)
    return layers, by_layer, rest


def _zero3(model: Model, arrangement: Arrangement, setup: Setup, reduced: Model) -> Frame:
    b, m = setup.width, setup.master_width
    share = {name: padded_share(shape, setup) for name, shape in model.shapes.items()}
    total = sum(share[name] for name in reduced.shapes)
    stay = sum(math.prod(s) for s in model.shapes.values() if math.prod(s) <= setup.persistence)
    g = DTYPES[setup.accumulation_dtype]
    wire = DTYPES[setup.communication_dtype]
    largest = _largest(reduced.shapes.values())
    live = live_elements(model, setup)
    sending, by_layer, at_end = _sent_of(reduced, setup)
    copies = {}
    for unit, names in arrangement.units().items():
        size = sum(share[name] for name in names)
        start = m * size + (g * size if g != m else 0)
        copies[unit] = (start, m * size)
    weights = b * (sum(share.values()) + stay) + model.buffer_bytes
    host = 0
    if setup.offload:
        # Masters, their gradients and the partitions of the gradients lie on the CPU.
        host = (2 * m + g) * total
        copies = {}
    return Frame(
        weights=weights,
        master=0 if setup.offload else m * total,
        gradients=0 if setup.offload else g * total,
        gradients_stay=not setup.offload,
        buckets=setup.reduce_bucket * wire,
        buckets_stay=setup.reduce_bucket * wire,
        forward=b * live.forward,
        loss=b * live.turn,
        head=b * (live.turn + largest),
        # Gradients are woven into one tensor for the reduce-scatter.
        backward=sending,
        by_layer={layer: more + b * live.layers.get(layer, 0) for layer, more in by_layer.items()},
        embedding=b * live.end + at_end,
        norm=_NORM * max((share[name] for name in reduced.shapes), default=0),
        copies=copies,
        host=host,
    )


def _fsdp2(model: Model, setup: Setup, reduced: Model) -> Frame:
    b, m, n = setup.width, setup.master_width, setup.shards
    share = {name: padded_share(shape, setup) for name, shape in model.shapes.items()}
    layers = [sum(n * share[name] for name in layer) for layer in model.layers]
    inside = {name for layer in model.layers for name in layer}
    rest = [name for name in model.shapes if name not in inside]
    embedding = [name for name in rest if setup.units == "accelerate" and "embed" in name]
    tail = [name for name in rest if name not in embedding]  # whole until its backward pass
    whole = n * sum(share[name] for name in tail)
    first = n * sum(share[name] for name in embedding)
    widest = max(layers, default=0)
    sending = max((sum(n * share[name] for name in layer) for layer in reduced.layers), default=0)
    kept = 0 if setup.reshard else sum(layers)
    # What a reduce-scatter is given; gloo works in a copy of it.
    r = DTYPES[setup.communication_dtype] * (2 if setup.device == "cpu" and n > 1 else 1)
    last = embedding or tail
    # Forward: what is gathered for one unit and for the next, or the parameters copied out of it.
    forward = b * (whole + max(2 * max(widest, first), kept))
    # Backward: a unit's parameters, the next gathered ahead, its gradients, and what was sent before; then, its
    # parameters gone, what is sent of it.
    sent = DTYPES[setup.communication_dtype] * sending
    through = 0 if embedding else b * whole
    backward = through + b * (kept + 2 * widest) + sent + max(b, r) * sending
    # Of a unit that has been copied for sending the last parameter's gradient is still held, on several ranks.
    end = r * (first or whole) + (b * math.prod(model.shapes[last[-1]]) if last and n > 1 else 0)
    return Frame(
        weights=m * sum(share.values()) + model.buffer_bytes,
        master=0,
        gradients=m * sum(share[name] for name in reduced.shapes),
        local=b * reduced.numel if setup.local_passes else 0,
        forward=forward,
        # The backward pass of the loss has the last layer gathered ahead.
        loss=b * (whole + (kept or widest)),
        head=b * (whole + (kept or widest)) + b * math.prod(model.shapes[tail[-1]]) + (r * whole if embedding else 0)
        if tail
        else 0,
        backward=backward,
        embedding=end + (sent if embedding else 0),
    )


def _replicated(model: Model, setup: Setup, reduced: Model) -> Frame:
    """DDP and one process: fp32 weights, autocast to 16 bits unless they are bf16 themselves."""
    m = setup.master_width
    cast = 2 * model.numel if setup.dtype != "fp32" and m == 4 else 0  # autocast keeps them for the pass
    largest = _largest(reduced.shapes.values())
    return Frame(
        weights=m * model.numel + model.buffer_bytes,
        master=0,
        gradients=m * reduced.numel,
        buckets=m * reduced.numel if setup.kind == "ddp" else 0,
        buckets_stay=m * reduced.numel if setup.kind == "ddp" else 0,
        forward=cast,
        loss=cast,
        head=cast + m * largest,
        backward=cast,
        embedding=cast + m * largest,
    )
