"""What does a step cost, beside AdamW and galore-torch?

    python benchmarks/step.py --json out.json [--device cuda] [--layers 130m 1b]

One decoder layer's matrices with random gradients. The optimizers take turns within a repetition, so that a slow
moment of the machine hits all of them; medians over repetitions. ``step_ms`` is an ordinary step, ``refresh_ms`` one
in which every matrix refreshes. Ratios are to AdamW (foreach), ``fused_ratio`` is to AdamW (fused); ``gemm_ratio`` is
the step over its own two matrix products alone (project, lift); ``vs_galore`` columns are galore-torch's time over
ours. The rows of single matrices are there because what a refresh gains depends on the shape. What
narrow states cost on a CPU is in ``low_bit_step.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from storage import state_bytes
from table import Row, json_argument, show
from torch import nn

from ds_lowrank import LowRankAdamW
from ds_lowrank.optimizer import STATE_KEY

GAP = 10_000
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
LAYERS = {"130m": (768, 2048, 192), "1b": (2048, 5461, 512)}
Shapes = list[tuple[int, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=15, help="repetitions of an ordinary step")
    parser.add_argument("--refreshes", type=int, default=3, help="repetitions of a refresh")
    json_argument(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    for name in args.layers:
        hidden, inner, rank = LAYERS[name]
        square, tall, wide = (hidden, hidden), (inner, hidden), (hidden, inner)
        cases = {
            f"llama-{name} layer": [square] * 4 + [tall, tall, wide],
            f"{hidden}x{hidden}": [square],
            f"{inner}x{hidden}": [tall],
            f"{hidden}x{inner}": [wide],
        }
        for label, shapes in cases.items():
            # Of a whole layer the refresh is the sum of what the single matrices show.
            whole = len(shapes) > 1
            rows += measure(label, shapes, rank, args.device, args.steps, 0 if whole else args.refreshes)
            print(f"{label}: done", flush=True)
    title = (
        f"One step on {args.device}, {torch.get_num_threads()} threads, medians of {args.steps} interleaved repetitions"
    )
    show(rows, title, args.json)


def measure(label: str, shapes: Shapes, rank: int, device: str, steps: int, refreshes: int) -> list[Row]:
    """Rows of all optimizers on one set of matrices."""
    contestants = {
        "AdamW foreach": _adamw(shapes, device),
        "AdamW fused": _adamw(shapes, device, fused=True),
        "galore-torch": _galore(shapes, rank, device),
        "ours, fp32 Gram": _ours(shapes, rank, device, "float32"),
    }
    if refreshes:  # an ordinary step has no Gram
        contestants["ours, fp64 Gram"] = _ours(shapes, rank, device, "float64")
    else:
        contestants["ours, int8 states"] = _ours(
            shapes, rank, device, "float32", state_dtype="int8", basis_dtype="bf16"
        )
    products = _products(shapes, rank, device)
    for optimizer, _ in contestants.values():  # the first step makes states and bases
        optimizer.step()
    times = _interleaved(
        {**{name: optimizer.step for name, (optimizer, _) in contestants.items()}, "products": products}, steps, device
    )
    due = {name: _due_step(optimizer, make_due) for name, (optimizer, make_due) in contestants.items() if make_due}
    refresh = _interleaved(due, refreshes, device) if refreshes else {}
    base = times["AdamW foreach"]
    adamw_bytes = state_bytes(contestants["AdamW foreach"][0].state)
    rows = []
    for name, (optimizer, _) in contestants.items():
        ours = name.startswith("ours")
        state = state_bytes(optimizer.state)
        rows.append(
            {
                "optimizer": name,
                "shapes": label,
                "rank": None if name.startswith("AdamW") else rank,
                "step_ms": times[name],
                "refresh_ms": refresh.get(name),
                "state_bytes": state,
                "step_ratio": times[name] / base,
                "fused_ratio": times[name] / times["AdamW fused"],
                "refresh_ratio": refresh[name] / base if name in refresh else None,
                "state_ratio": state / adamw_bytes,
                "gemm_ratio": times[name] / times["products"] if ours else None,
                "step_vs_galore": times["galore-torch"] / times[name] if ours else None,
                "refresh_vs_galore": refresh["galore-torch"] / refresh[name] if ours and refresh else None,
            }
        )
    return rows


def _due_step(optimizer: torch.optim.Optimizer, make_due: Callable[[], None]) -> Callable[[], Any]:
    def run() -> None:
        make_due()
        optimizer.step()

    return run


Contestant = tuple[torch.optim.Optimizer, Callable[[], None] | None]


def _weights(shapes: Shapes, device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    weights = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for weight in weights:
        m, n = weight.shape
        spectrum = torch.logspace(0, -2, n, device=device)  # a decaying spectrum, as gradients have
        weight.grad = 1e-3 * torch.randn(m, n, device=device) * spectrum
    return weights


def _adamw(shapes: Shapes, device: str, fused: bool = False) -> Contestant:
    return torch.optim.AdamW(_weights(shapes, device), foreach=not fused, fused=fused, **ADAMW), None


def _galore(shapes: Shapes, rank: int, device: str) -> Contestant:
    from galore_torch import GaLoreAdamW

    weights = _weights(shapes, device)
    group = {"params": weights, "rank": rank, "update_proj_gap": GAP, "scale": 0.25, "proj_type": "std"}
    optimizer = GaLoreAdamW([group], no_deprecation_warning=True, **ADAMW)

    def make_due() -> None:
        for weight in weights:
            optimizer.state[weight]["step"] = GAP

    return optimizer, make_due


def _ours(shapes: Shapes, rank: int, device: str, gram_dtype: str, **formats: Any) -> Contestant:
    named = [(f"w{k}", weight) for k, weight in enumerate(_weights(shapes, device))]
    group = {"params": named, "rank": rank, "update_proj_gap": GAP, "scale": 0.25}
    optimizer = LowRankAdamW([group], **ADAMW, stagger=False, gram_dtype=gram_dtype, **formats)

    def make_due() -> None:
        for state in optimizer.state[STATE_KEY].values():  # type: ignore[index]
            state["step"] = GAP

    return optimizer, make_due


def _products(shapes: Shapes, rank: int, device: str) -> Callable[[], None]:
    """The two matrix products of a step, alone: R = A_grad B and A ← keep·A − s·N Bᵀ."""
    weights = _weights(shapes, device)
    views = []
    for weight in weights:
        assert weight.grad is not None
        tall = weight.shape[0] >= weight.shape[1]
        a, grad = (weight.data, weight.grad) if tall else (weight.data.mT, weight.grad.mT)
        basis = torch.linalg.qr(torch.randn(a.shape[1], rank, device=device))[0].contiguous()
        views.append((a, grad, basis))

    def run() -> None:
        for a, grad, basis in views:
            a.addmm_(grad @ basis, basis.mT, beta=0.99999, alpha=-1e-3)

    return run


def _interleaved(runs: dict[str, Callable[[], Any]], repetitions: int, device: str) -> dict[str, float]:
    """Median milliseconds of each, one repetition of all after another."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seen[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in seen.items()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
