"""Does decomposing the Grams of equal shapes in one call pay?

    python benchmarks/decompositions.py --json out.json [--device cuda]

A wave has up to 8 matrices. ``torch.linalg.eigh`` of 8 Grams stacked against one call for each, in turns within a
repetition; ``batch_over_loop`` is the ratio of the medians: below 1 a batch gains. The engine makes one call a matrix.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from table import Row, json_argument, show
from torch import Tensor

WAVE = 8
SIDES = (10, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    json_argument(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    for dtype in (torch.float64, torch.float32):
        for side in SIDES:
            matrices = torch.randn(WAVE, 2 * side, side, dtype=dtype, device=args.device)
            rows.append(measure(matrices.mT @ matrices, args.repetitions))
    show(rows, f"Decompositions of {WAVE} Grams of one shape on {args.device}", args.json)


def measure(grams: Tensor, repetitions: int) -> Row:
    runs: dict[str, Callable[[], object]] = {
        "loop": lambda: [torch.linalg.eigh(gram) for gram in grams],
        "batch": lambda: torch.linalg.eigh(grams),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):  # the first warms up
        for name, run in runs.items():
            if grams.is_cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            if grams.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    loop, batch = (statistics.median(times[name][1:]) for name in ("loop", "batch"))
    return {
        "dtype": str(grams.dtype).removeprefix("torch."),
        "side": grams.shape[-1],
        "threads": torch.get_num_threads(),
        "loop_ms": 1e3 * loop,
        "batch_over_loop": batch / loop,
    }


if __name__ == "__main__":
    main()
