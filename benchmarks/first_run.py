"""Do the projected matrices do the learning? The default run beside full-rank AdamW and a frozen control.

    python benchmarks/first_run.py --json out.json

Three arms, same tokens, data order and schedule: ``lowrank`` (SARA), ``adamw`` (full rank), and ``frozen`` (the
matrices that ``lowrank`` projects stay as initialised, AdamW trains the rest). The learning rate of each arm is chosen
over a grid on the first seed; the other seeds run with the chosen one. Rows: one a run; the summary prints mean and
spread (smallest, largest) of the validation perplexity over the seeds. A run is ``launch/pretrain.py`` with its
defaults, by the ``deepspeed`` launcher; further arguments go to every run.

``--ranks 1 --jobs 2`` is twice as fast on two cores: one rank takes the batch of two, and two runs go side by side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rank_pool import free_port
from table import Row, json_argument, show

ROOT = Path(__file__).resolve().parent.parent
GRIDS = {"lowrank": [0.0025, 0.005, 0.01], "adamw": [0.001, 0.002, 0.003], "frozen": [0.0025, 0.005, 0.01]}
SEQUENCES = 4  # a step's, over all ranks, as in the default run of two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for arm, grid in GRIDS.items():
        parser.add_argument(f"--{arm}-lrs", type=float, nargs="+", default=grid, metavar="LR")
    json_argument(parser)
    args, passed_on = parser.parse_known_args()

    def run_all(wanted: list[tuple[str, float, int]]) -> list[Row]:
        with ThreadPoolExecutor(args.jobs) as jobs:
            runs = [jobs.submit(run, arm, lr, seed, args.ranks, passed_on) for arm, lr, seed in wanted]
            return [one.result() for one in runs]

    rows = run_all([(arm, lr, args.seeds[0]) for arm in GRIDS for lr in getattr(args, f"{arm}_lrs")])
    chosen = {
        arm: min((r for r in rows if r["optimizer"] == arm), key=lambda r: r["perplexity"])["learning_rate"]
        for arm in GRIDS
    }
    rows += run_all([(arm, lr, seed) for seed in args.seeds[1:] for arm, lr in chosen.items()])
    show(rows, "Runs", args.json)
    show(summary(rows, chosen), f"Validation perplexity over {len(args.seeds)} seeds, learning rate tuned for each")


def run(arm: str, lr: float, seed: int, ranks: int, passed_on: list[str]) -> Row:
    """One run of the launch script; its metrics.json as a row."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            str(Path(sys.executable).with_name("deepspeed")),
            *("--num_accelerators", str(ranks), "--master_port", str(free_port())),
            str(ROOT / "launch" / "pretrain.py"),
            *("--deepspeed", str(ROOT / "configs" / "zero2.json")),
            *("--optimizer", arm, "--learning_rate", str(lr), "--seed", str(seed), "--output_dir", folder),
            *("--batch_size", str(SEQUENCES // ranks), "--report_to", "none", "--disable_tqdm", "true"),
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
        arm: [r["perplexity"] for r in rows if (r["optimizer"], r["learning_rate"]) == (arm, lr)]
        for arm, lr in chosen.items()
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
