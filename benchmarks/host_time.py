"""What does a step cost outside of its products: in Python, and in operators that it launches?

    python benchmarks/host_time.py --json out.json [--device cuda]

Ordinary steps (nothing refreshes) of random gradients on one process, timed by the clock of the thread that makes
them: waiting for other work on the machine does not count, nor what a GPU is still computing. ``bare`` is what a step
computes and nothing else: for one matrix after the other its two products and AdamW's direction between them, by the
calls of torch that the optimizer makes, on views that lie ready. ``ratio`` is the step over that; of matrices of 24x10
all is host time. AdamW (foreach, fused) on the same weights stands beside it. Medians of interleaved repetitions;
``fastest_ratio`` is that of the fastest ones, which other work on the machine (it evicts Python from the caches) shows
least in.

``launches`` (``a_matrix``: over matrices) are the operators of torch that compute something, as a TorchDispatchMode
sees them: on a GPU a kernel each, or more. ``views`` are those that do not (memory that is allocated too), ``reads``
numbers that Python takes from tensors.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from llama import LAYER, LAYERS
from step import ADAMW, Shapes, _adamw, _ours, _wait, _weights
from table import Row, json_argument, show
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SMALL = (24, 10)
# A layer of configs/llama_9m.json.
LAYER_9M = ((128, 128),) * 4 + ((352, 128), (352, 128), (128, 352))
# Name -> shapes, r, repetitions.
MODELS: dict[str, tuple[Shapes, int, int]] = {
    "1 of 24x10": ([SMALL], 4, 2000),
    "32 of 24x10": ([SMALL] * 32, 4, 300),
    "llama-9m": ([*LAYER_9M] * 4, 32, 100),
    "llama-60m": ([*LAYER] * LAYERS, 128, 10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bound", type=float, help="an error if 32 of 24x10 take more, by their ratio")
    json_argument(parser)
    args = parser.parse_args()
    rows = [measure(model, *MODELS[model], args.device) for model in args.models]
    show(rows, f"Host time and launches of a step, {args.device}, {torch.get_num_threads()} threads", args.json)
    ratio = {row["model"]: row["ratio"] for row in rows}.get("32 of 24x10", 0.0)
    if args.bound is not None and ratio > args.bound:
        parser.exit(1, f"32 of 24x10: {ratio:.2f} times the bare step, allowed is {args.bound}\n")


def measure(model: str, shapes: Shapes, rank: int, repetitions: int, device: str) -> Row:
    """The row of one set of matrices."""
    ours, _ = _ours(shapes, rank, device, "float32")
    foreach, _ = _adamw(shapes, device)
    fused, _ = _adamw(shapes, device, fused=True)
    alone = bare(shapes, rank, device)
    runs: dict[str, Callable[[], Any]] = {
        "ours": ours.step,
        "bare": alone,
        "foreach": foreach.step,
        "fused": fused.step,
    }
    host_times(runs, 3, device)  # the first step makes states and bases
    seen = host_times(runs, repetitions, device)
    times = {name: statistics.median(values) for name, values in seen.items()}
    counted, counted_alone = operators(ours.step), operators(alone)
    return {
        "model": model,
        "matrices": len(shapes),
        "r": rank,
        "step_ms": times["ours"],
        "bare_ms": times["bare"],
        "ratio": times["ours"] / times["bare"],
        "fastest_ratio": min(seen["ours"]) / min(seen["bare"]),
        "foreach_ms": times["foreach"],
        "fused_ms": times["fused"],
        "launches": counted["launch"],
        "a_matrix": counted["launch"] / len(shapes),
        "bare_launches": counted_alone["launch"],
        "views": counted["view"],
        "reads": counted["read"],
    }


def host_times(runs: Mapping[str, Callable[[], Any]], repetitions: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of this thread for each, one repetition of all after another."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = time.thread_time()
            run()
            seen[name].append(1e3 * (time.thread_time() - start))
            _wait(device)
    return seen


def bare(shapes: Shapes, rank: int, device: str) -> Callable[[], None]:
    """A step of every matrix: R = A_grad B, AdamW's N from it, A <- keep A - s N B^T. Nothing is looked up."""
    beta1, beta2 = ADAMW["betas"]
    keep, step_size = 1 - ADAMW["lr"] * ADAMW["weight_decay"], ADAMW["lr"] * 0.25
    matrices: list[tuple[Tensor, ...]] = []
    for weight in _weights(shapes, device):
        assert weight.grad is not None
        tall = weight.shape[0] >= weight.shape[1]
        a, grad = (weight.data, weight.grad) if tall else (weight.data.mT, weight.grad.mT)
        basis = torch.linalg.qr(torch.randn(a.shape[1], rank, device=device))[0].contiguous()
        moments = torch.zeros(2, a.shape[0], rank, device=device)
        matrices.append((a, grad, basis, basis.mT, *moments))
    made = 0

    @torch.no_grad()
    def run() -> None:
        nonlocal made
        made += 1
        correction1, correction2 = 1 - beta1**made, 1 - beta2**made
        for a, grad, basis, transposed, exp_avg, exp_avg_sq in matrices:
            projected = grad @ basis
            exp_avg.lerp_(projected, 1 - beta1)
            exp_avg_sq.mul_(beta2).addcmul_(projected, projected, value=1 - beta2)
            denominator = torch.sqrt(exp_avg_sq, out=projected)
            denominator.mul_(correction1 / math.sqrt(correction2)).add_(ADAMW["eps"] * correction1)
            direction = torch.div(exp_avg, denominator, out=denominator)
            a.addmm_(direction, transposed, beta=keep, alpha=-step_size)

    return run


class _Count(TorchDispatchMode):
    """Counts operators by what they do: ``view``, ``read`` or ``launch``."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            self.seen["read"] += 1
        elif (aliases and not any(alias.is_write for alias in aliases)) or "empty" in name:
            self.seen["view"] += 1
        elif name.startswith("aten::"):  # torch's optimizers record themselves for its profiler
            self.seen["launch"] += 1
        return func(*args, **(kwargs or {}))


def operators(run: Callable[[], Any]) -> Counter[str]:
    """What ``run`` dispatches to torch in this thread: how many of each kind."""
    with _Count() as count:
        run()
    return count.seen


if __name__ == "__main__":
    main()
