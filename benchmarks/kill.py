"""Is anything lost when a rank is killed, at whatever moment?

Ranks of ``launch/pretrain.py`` are started without a launcher, as ``srun`` does. Again and again a random one gets
SIGKILL: at a random moment after the start, at a random moment while it trains, or just after a checkpoint's folder
has appeared, while it is written, marked, or while an old one is deleted. Then everything that is left is killed and
the same command, with ``--resume`` in it, is run again. When a run gets to its end all the same, its final weights are
compared bitwise with those of a run that nobody disturbed, and the next one begins.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attempts import ROOT, Attempt, Ruins, newest_step, unfinished, write_corpus
from safetensors.torch import load_file
from table import Row, json_argument, show

from ds_lowrank import manifest

LAYOUTS = {"zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "zero2_offload": "zero2_offload", "one": None}
PATIENCE = 600.0
# Shares of the three kinds of moments.
AIMS = {"start": 0.15, "training": 0.25, "save": 0.6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="kill no more after so many")
    parser.add_argument("--layout", choices=LAYOUTS, default="zero2", help="configs/*.json, or one process")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--keep", type=int, default=2, help="--save_total_limit")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    json_argument(parser)
    args = parser.parse_args()
    if args.layout == "one":
        args.ranks = 1
    with tempfile.TemporaryDirectory() as folder:
        rows = run_all(args, Path(folder))
    show(rows, f"Killed and started again: {args.layout} on {args.ranks} ranks", args.json)


def run_all(args: argparse.Namespace, folder: Path) -> list[Row]:
    """Runs until the kills are used up; one row each, and one of all."""
    write_corpus(folder / "corpus.txt")
    clock = time.monotonic()
    undisturbed = Attempt(folder, command(args, folder, "undisturbed"), args.ranks)
    codes = undisturbed.wait(PATIENCE)
    if any(codes):
        raise SystemExit(f"the undisturbed run ended with {codes}:\n{undisturbed.printed()[-3000:]}")
    seconds = time.monotonic() - clock
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    chance = random.Random(args.seed)
    rows: list[Row] = []
    left, end = args.kills, clock + 60 * args.minutes
    while left and (not rows or time.monotonic() < end):
        row = disturb(args, folder, partial(wanted, left, end), seconds, chance)
        left -= row["kills"]
        rows.append({"run": f"run {len(rows) + 1}", **row})
        print(rows[-1], flush=True)
    total: Row = {"run": "all"}
    for key in list(rows[0])[1:]:
        values = [row[key] for row in rows]
        total[key] = all(values) if isinstance(values[0], bool) else sum(values)
    return [*rows, total]


def wanted(left: int, end: float, kills: int) -> bool:
    """Whether to kill once more, after ``kills`` of ``left`` and before the time is up."""
    return kills < left and time.monotonic() < end


def command(args: argparse.Namespace, folder: Path, output: str) -> list[str]:
    """The command line of every attempt at one run."""
    config = LAYOUTS[args.layout]
    options = {
        "train_file": folder / "corpus.txt",
        "cache_dir": folder / "cache",
        "output_dir": folder / output,
        "vocab_size": 512,
        "max_length": 64,
        "batch_size": 2,
        "eval_sequences": 16,
        "rank": 8,
        "update_proj_gap": 3,
        "lr": 0.01,
        "max_steps": args.steps,
        "save_every": args.save_every,
        "save_total_limit": args.keep,
        "logging_steps": 1,
        "report_to": "none",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    if config is not None:
        flags += ["--deepspeed", str(ROOT / "configs" / f"{config}.json")]
    return [*flags, "--resume"]


def disturb(
    args: argparse.Namespace, folder: Path, more: Callable[[int], bool], seconds: float, chance: random.Random
) -> Row:
    """One run, killed as long as ``more`` wants (given the kills so far) and started again until it gets to its end."""
    output = folder / "disturbed"
    argv = command(args, folder, output.name)
    counts: Counter[str] = Counter()
    attempts = repeated = reached = 0
    while True:
        begin, before = newest_step(output), unfinished(output)
        attempt = Attempt(folder, argv, args.ranks)
        attempts += 1
        armed = more(counts["kills"])
        if armed:
            wait_for_the_moment(attempt, output, before, seconds, chance)
        if armed and attempt.running:
            attempt.kill(chance.randrange(args.ranks))
            attempt.end()
            counts["kills"] += 1
            newest = newest_step(output)
            made = [step for step, ruin in unfinished(output).items() if before.get(step) != ruin]
            counts["inside_save"] += any(step > newest for step in made)
            counts["inside_deletion"] += any(step < newest for step in made)
            counts["incomplete"] += len(made)
            repeated += max(0, min(reached, attempt.last_step()) - begin)
            reached = max(reached, attempt.last_step())
            for _, checkpoint in manifest.checkpoints(output):
                if manifest.is_complete(checkpoint):
                    manifest.verify(checkpoint)  # whatever is marked is whole, at every moment
            continue
        codes = attempt.wait(PATIENCE)
        if any(codes):
            raise SystemExit(f"attempt {attempts} ended by itself with {codes}:\n{attempt.printed()[-3000:]}")
        repeated += max(0, reached - begin)
        break
    equal = same_weights(output, folder / "undisturbed")
    shutil.rmtree(output)
    return {
        "kills": counts["kills"],
        "inside_save": counts["inside_save"],
        "inside_deletion": counts["inside_deletion"],
        "restarts": attempts - 1,
        "incomplete_found": counts["incomplete"],
        "steps": args.steps,
        "steps_repeated": repeated,
        "weights_equal": equal,
    }


def wait_for_the_moment(attempt: Attempt, output: Path, before: Ruins, seconds: float, chance: random.Random) -> None:
    """Wait until it is time to kill, or until a rank has ended by itself."""
    aim = chance.choices(list(AIMS), list(AIMS.values()))[0]
    if aim == "start":
        doze(attempt, chance.uniform(0, seconds))
        return
    if aim == "training":
        while attempt.running and not attempt.last_step():
            time.sleep(0.02)
        doze(attempt, chance.uniform(0, 2))
        return
    wanted = chance.choice((1, 1, 2))  # later ones bring the run forward
    seen: set[int] = set()
    while attempt.running and len(seen) < wanted:
        seen |= {step for step, ruin in unfinished(output).items() if before.get(step) != ruin}
        time.sleep(0.002)
    doze(attempt, chance.uniform(0, 0.5))


def doze(attempt: Attempt, seconds: float) -> None:
    """Sleep as long as the ranks run."""
    end = time.monotonic() + seconds
    while attempt.running and time.monotonic() < end:
        time.sleep(0.005)


def same_weights(ours: Path, theirs: Path) -> bool:
    """Whether two runs ended with bitwise the same model."""
    here, there = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    return set(here) == set(there) and all(torch.equal(weight, there[name]) for name, weight in here.items())


if __name__ == "__main__":
    main()
