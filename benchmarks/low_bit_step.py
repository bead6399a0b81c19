"""What do narrow states cost on a CPU, over a step's own matrix products?

    OMP_NUM_THREADS=1 python benchmarks/low_bit_step.py --json out.json [--shapes 512x1376x128]

Two matrices of each shape (m × n × r) with random gradients, an ordinary step in every pair of formats and the products
alone (project, lift), in turns within a repetition. ``wall_ratio`` and ``cpu_ratio`` are medians over the products': by
the clock, and by the CPU time of all threads, which is what to read where other work shares the cores (with one thread;
of several, those that wait are counted too).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from step import _ours, _products
from table import Row, json_argument, show

SHAPES = ["512x1376x128", "1376x512x128", "768x768x192", "768x2048x256", "2048x768x256"]
FORMATS = [("fp32", "fp32"), ("bf16", "bf16"), ("int8", "bf16"), ("int8", "int8"), ("int8", "int4")]
MATRICES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="MxNxR")
    parser.add_argument("--steps", type=int, default=15, help="repetitions")
    json_argument(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    for shape in args.shapes:
        rows += measure(shape, args.steps)
        print(f"{shape}: done", flush=True)
    show(rows, f"One step on a CPU, medians of {args.steps} interleaved repetitions", args.json)


def measure(shape: str, steps: int) -> list[Row]:
    """Rows of all formats on matrices of one shape."""
    m, n, r = (int(number) for number in shape.split("x"))
    shapes = [(m, n)] * MATRICES
    runs = {"products": _products(shapes, r, "cpu")}
    for moments, bases in FORMATS:
        optimizer, _ = _ours(shapes, r, "cpu", "float32", state_dtype=moments, basis_dtype=bases)
        optimizer.step()  # makes states and bases
        runs[f"{moments} {bases}"] = optimizer.step
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            seen[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    medians = {name: [statistics.median(clock) for clock in zip(*times)] for name, times in seen.items()}
    base = medians["products"]
    return [
        {
            "moments": moments,
            "bases": bases,
            "shape": f"{m}x{n}",
            "rank": r,
            "threads": torch.get_num_threads(),
            "products_ms": base[0],
            "step_ms": medians[f"{moments} {bases}"][0],
            "wall_ratio": medians[f"{moments} {bases}"][0] / base[0],
            "cpu_ratio": medians[f"{moments} {bases}"][1] / base[1],
        }
        for moments, bases in FORMATS
    ]


if __name__ == "__main__":
    main()
