"""Do the projected matrices do the learning? The default run beside full-rank AdamW and a frozen control.

    python benchmarks/first_run.py --json out.json

Three arms, same tokens, data order and schedule: ``lowrank`` (SARA), ``adamw`` (full rank), and ``frozen`` (the
matrices that ``lowrank`` projects stay as initialised, AdamW trains the rest). The learning rate of each arm is chosen
on a seed of its own over ``--learning-rates``, then three other seeds run with it. Rows: one a run; the summary prints
mean and spread (smallest, largest) of the validation perplexity. A run is ``launch/pretrain.py`` with its defaults,
by the ``deepspeed`` launcher; further arguments go to every run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from table import Row, json_argument, show

ROOT = Path(__file__).resolve().parent.parent
GRIDS = {"lowrank": [0.005, 0.01, 0.02], "adamw": [0.002, 0.004, 0.008], "frozen": [0.004, 0.008, 0.016]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tuning-seed", type=int, default=100)
    for arm, grid in GRIDS.items():
        parser.add_argument(f"--{arm}-lrs", type=float, nargs="+", default=grid, metavar="LR")
    json_argument(parser)
    args, passed_on = parser.parse_known_args()
    rows: list[Row] = []
    chosen: dict[str, float] = {}
    for arm in GRIDS:
        rates = getattr(args, f"{arm}_lrs")
        tuning = [run(arm, lr, args.tuning_seed, args.ranks, passed_on, "tuning") for lr in rates]
        rows += tuning
        chosen[arm] = min(tuning, key=lambda row: row["perplexity"])["learning_rate"]
    for seed in args.seeds:
        rows += [run(arm, lr, seed, args.ranks, passed_on, "measured") for arm, lr in chosen.items()]
    show(rows, "Runs", args.json)
    show(summary(rows, chosen), f"Validation perplexity over {len(args.seeds)} seeds, learning rate tuned for each")


def run(arm: str, lr: float, seed: int, ranks: int, passed_on: list[str], phase: str) -> Row:
    """One run of the launch script; its metrics.json as a row."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            *(["--num_accelerators", str(ranks)]),
            str(ROOT / "launch" / "pretrain.py"),
            *("--deepspeed", str(ROOT / "configs" / "zero2.json")),
            *("--optimizer", arm, "--learning_rate", str(lr), "--seed", str(seed), "--output_dir", folder),
            *("--report_to", "none", "--disable_tqdm", "true"),
            *passed_on,
        ]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": path}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
    row = {
        "optimizer": arm,
        "phase": phase,
        "learning_rate": lr,
        "seed": seed,
        "perplexity": metrics["perplexity"],
        "eval_loss": metrics["eval_loss"],
        "tokens": metrics["tokens"],
    }
    print(*row.values(), flush=True)
    return row


def summary(rows: list[Row], chosen: dict[str, float]) -> list[Row]:
    """Mean and spread of each arm, and its ratio to AdamW's mean."""
    by_arm = {
        arm: [r["perplexity"] for r in rows if r["optimizer"] == arm and r["phase"] == "measured"] for arm in chosen
    }
    base = statistics.mean(by_arm["adamw"])
    return [
        {
            "optimizer": arm,
            "learning_rate": chosen[arm],
            "perplexity": statistics.mean(values),
            "smallest": min(values),
            "largest": max(values),
            "ratio_to_adamw": statistics.mean(values) / base,
        }
        for arm, values in by_arm.items()
    ]


if __name__ == "__main__":
    main()
