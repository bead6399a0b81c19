"""What does a step cost, beside AdamW and the packages of the methods' authors?

    python benchmarks/step.py --json out.json [--device cuda] [--layers 130m 1b] [--clock cpu]

One decoder layer's matrices with random gradients. The optimizers take turns within a repetition, so that a slow
moment of the machine hits all of them; medians over repetitions. ``step_ms`` is an ordinary step, ``refresh_ms`` one
in which every matrix refreshes. Ratios are to AdamW (foreach), ``fused_ratio`` is to AdamW (fused); ``gemm_ratio`` is
the step over its own two matrix products alone (project, lift); ``vs_package`` columns are the time of the method's
own package over ours, of the fastest repetitions in ``fastest_vs_package``: other work on the machine shows least in
these. Grams has no package with a subspace, and online PCA, whose basis moves in every step, has none.

The rows of single matrices are there because what a refresh gains depends on the shape. What narrow states cost on a
CPU is in ``low_bit_step.py``. ``--clock cpu`` counts the time that processors worked for this process, all threads
together: for a machine that does other work as well.
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
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
# Method of ours beside GaLore and SARA -> its options, the package of its own, r if it is not the model's.
METHODS: dict[str, tuple[dict[str, str], str | None, int | None]] = {
    "fira": ({"rule": "fira", "selection": "dominant"}, "fira", None),
    "apollo": ({"rule": "apollo", "selection": "gaussian"}, "apollo-torch", None),
    "apollo_mini": ({"rule": "apollo_mini", "selection": "gaussian"}, "apollo-torch, mini", 1),
    "grams": ({"rule": "grams"}, None, None),
    "online_pca": ({"selection": "online_pca"}, None, None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
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
            refreshes = 0 if whole else args.refreshes
            rows += measure(label, shapes, rank, args.device, args.steps, refreshes, CLOCKS[args.clock])
            print(f"{label}: done", flush=True)
    made = f"medians of {args.steps} interleaved repetitions, {args.clock} clock"
    show(rows, f"One step on {args.device}, {torch.get_num_threads()} threads, {made}", args.json)


def measure(
    label: str,
    shapes: Shapes,
    rank: int,
    device: str,
    steps: int,
    refreshes: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Rows of all optimizers on one set of matrices."""
    contestants = {
        "AdamW foreach": _adamw(shapes, device),
        "AdamW fused": _adamw(shapes, device, fused=True),
        "galore-torch": _galore(shapes, rank, device),
        "fira": _fira(shapes, rank, device),
        "apollo-torch": _apollo(shapes, rank, device),
        "apollo-torch, mini": _apollo(shapes, 1, device, "tensor"),
        "ours, fp32 Gram": _ours(shapes, rank, device, "float32"),
    }
    packages: dict[str, str | None] = {"ours, fp32 Gram": "galore-torch"}
    if refreshes:  # an ordinary step has no Gram
        contestants["ours, fp64 Gram"] = _ours(shapes, rank, device, "float64")
        packages["ours, fp64 Gram"] = "galore-torch"
    else:
        contestants["ours, int8 states"] = _ours(
            shapes, rank, device, "float32", state_dtype="int8", basis_dtype="bf16"
        )
        packages["ours, int8 states"] = "galore-torch"
    ranks = {"apollo-torch, mini": 1}
    for method, (options, package, own_rank) in METHODS.items():
        name = f"ours, {method}"
        ranks[name] = own_rank or rank
        contestants[name] = _ours(shapes, ranks[name], device, "float32", **options)
        packages[name] = package
    products = _products(shapes, rank, device)
    for optimizer, _ in contestants.values():  # the first step makes states and bases
        optimizer.step()
    seen = _interleaved(
        {**{name: optimizer.step for name, (optimizer, _) in contestants.items()}, "products": products},
        steps,
        device,
        clock,
    )
    due = {name: _due_step(optimizer, make_due) for name, (optimizer, make_due) in contestants.items() if make_due}
    refreshing = _interleaved(due, refreshes, device, clock) if refreshes else {}
    times = {name: statistics.median(values) for name, values in seen.items()}
    refresh = {name: statistics.median(values) for name, values in refreshing.items()}
    base = times["AdamW foreach"]
    adamw_bytes = state_bytes(contestants["AdamW foreach"][0].state)
    rows = []
    for name, (optimizer, _) in contestants.items():
        package = packages.get(name)
        state = state_bytes(optimizer.state)
        rows.append(
            {
                "optimizer": name,
                "package": package,
                "shapes": label,
                "rank": None if name.startswith("AdamW") else ranks.get(name, rank),
                "step_ms": times[name],
                "refresh_ms": refresh.get(name),
                "state_bytes": state,
                "step_ratio": times[name] / base,
                "fused_ratio": times[name] / times["AdamW fused"],
                "refresh_ratio": refresh[name] / base if name in refresh else None,
                "state_ratio": state / adamw_bytes,
                # Of the products with a basis of this r.
                "gemm_ratio": times[name] / times["products"] if name in packages and name not in ranks else None,
                "step_vs_package": times[package] / times[name] if package else None,
                "fastest_vs_package": min(seen[package]) / min(seen[name]) if package else None,
                "refresh_vs_package": refresh[package] / refresh[name] if package and refresh else None,
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
    return optimizer, lambda: _set_steps(optimizer, weights)


def _fira(shapes: Shapes, rank: int, device: str) -> Contestant:
    from fira import FiraAdamW

    weights = _weights(shapes, device)
    group = {"params": weights, "rank": rank, "update_proj_gap": GAP, "alpha": 0.25, "proj_type": "std"}
    optimizer = FiraAdamW([group], no_deprecation_warning=True, **ADAMW)
    return optimizer, lambda: _set_steps(optimizer, weights)


def _apollo(shapes: Shapes, rank: int, device: str, kind: str = "channel") -> Contestant:
    from apollo_torch import APOLLOAdamW

    weights = _weights(shapes, device)
    group = {"params": weights, "rank": rank, "update_proj_gap": GAP, "proj": "random", "proj_type": "std"}
    optimizer = APOLLOAdamW([{**group, "scale": 1.0, "scale_type": kind}], **ADAMW)
    return optimizer, lambda: _set_steps(optimizer, weights)


def _set_steps(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> None:
    """Make every matrix due; the packages count the steps of each."""
    for weight in weights:
        optimizer.state[weight]["step"] = GAP


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


def _interleaved(
    runs: dict[str, Callable[[], Any]], repetitions: int, device: str, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds of each, one repetition of all after another."""
    seen: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            _wait(device)
            start = clock()
            run()
            _wait(device)
            seen[name].append(1e3 * (clock() - start))
    return seen


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
