"""Does a run with states in 8 bits end where it ends with states in fp32?

    python benchmarks/low_bit_loss.py --json out.json

The default run (see ``first_run.py``, whose arguments this takes) over three seeds, same tokens, data order, learning
rate and draws of the sampler; only the formats of moments and bases differ. ``loss_ratio`` is the final validation loss
over that of the fp32 states with the same seed, ``between_seeds`` the largest over the smallest loss of the fp32 runs.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from first_run import run
from table import Row, json_argument, show

FORMATS = (("fp32", "fp32"), ("int8", "bf16"), ("int8", "int8"), ("int8", "int4"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--formats", type=int, default=len(FORMATS), help="how many of the formats, fp32 first")
    json_argument(parser)
    args, passed_on = parser.parse_known_args()

    def one(wanted: tuple[int, str, str]) -> Row:
        seed, moments, bases = wanted
        flags = ["--state_dtype", moments, "--basis_dtype", bases, *passed_on]
        loss = run("lowrank", args.lr, seed, args.ranks, flags)["eval_loss"]
        return {"moments": moments, "bases": bases, "seed": seed, "eval_loss": loss}

    wanted = [(seed, *formats) for seed in args.seeds for formats in FORMATS[: args.formats]]
    with ThreadPoolExecutor(args.jobs) as jobs:
        rows = list(jobs.map(one, wanted))
    wide = {r["seed"]: r["eval_loss"] for r in rows if (r["moments"], r["bases"]) == FORMATS[0]}
    spread = max(wide.values()) / min(wide.values())
    rows = [{**r, "loss_ratio": r["eval_loss"] / wide[r["seed"]], "between_seeds": spread} for r in rows]
    show(rows, "Validation loss by format of the states", args.json)


if __name__ == "__main__":
    main()
