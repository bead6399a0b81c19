"""The default run as a slurm job that is preempted at random moments, beside one that nobody disturbs.

    python tests/integration/slurm/long_run.py FOLDER --markdown result.md

Both run at the same time, on two nodes each of a slurm of four on this machine. A job of higher priority takes the
first's nodes at moments drawn from --seed, each between --soonest and --latest seconds after the run has made its first
steps since it was started or queued again. Ends with 1 where perplexities or weights differ.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))

from cluster import Cluster, missing
from jobs import SCRIPTS, Job, same_weights

# A line for every message of launch/slurm and of checkpoints: the rest are steps and libraries' warnings.
TOLD = re.compile(
    r"^(SIGTERM: |preempted by |job \d+: |--resume: |.*CANCELLED AT |.*validation perplexity|.*step +\d+ )"
)
STEP = re.compile(r"step +(\d+) ")


def steps_of(job: Job) -> list[int]:
    return [int(number) for number in STEP.findall(job.printed())]


def preempt(cluster: Cluster, job: Job, draw: random.Random, soonest: float, latest: float, began: float) -> str:
    """Wait for a random moment after the job makes steps, take its nodes, and wait until it runs again."""
    restarts, seen = job.restarts, len(steps_of(job))
    job.until(lambda: len(steps_of(job)) > seen)
    wait = draw.uniform(soonest, latest)
    time.sleep(wait)
    if job.ended() or job.state != "RUNNING":
        raise SystemExit(f"the job ended before it could be preempted {restarts + 1} times: give it more --steps")
    at = time.monotonic() - began
    last = steps_of(job)[-1]
    wanted = ["-p", "high", "-w", "node-[1-2]", "-N2", "-o", "/dev/null", "--wrap", "sleep 5"]
    urgent = int(cluster.run("sbatch", "--parsable", *wanted, cwd=cluster.folder))
    job.until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED")

    def again() -> bool:
        job.hurry()
        return job.restarts > restarts and job.state == "RUNNING"

    job.until(again)
    return (
        f"- {at / 60:.1f} minutes after the start, behind step {last}: job {urgent} took its nodes; "
        f"job {job.number} ran again {time.monotonic() - began - at:.0f} s later"
    )


def excerpt(job: Job) -> list[str]:
    """What the job's log says of preemptions and the end, with the last line of steps before and the first after."""
    lines = [line.strip() for line in job.printed().splitlines() if TOLD.match(line.strip())]
    stepping = [bool(STEP.search(line)) for line in lines]
    return [
        line
        for i, line in enumerate(lines)
        if not stepping[i] or not all(stepping[max(i - 1, 0) : i + 2]) or i + 1 == len(lines)
    ]


def perplexity(job: Job) -> str:
    found = re.findall(r"validation perplexity: (\S+)", job.printed())
    return found[-1] if found else "none"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="empty, or not there yet")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--preemptions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--soonest", type=float, default=30.0)
    parser.add_argument("--latest", type=float, default=540.0)
    parser.add_argument("--minutes", type=int, default=120, help="that the jobs are waited for")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args(argv)
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    draw = random.Random(args.seed)
    with Cluster(args.folder, nodes=4) as cluster:

        def submit(name: str, *options: str) -> Job:
            output = cluster.folder / name
            argv = ["--max_steps", str(args.steps), "--output_dir", str(output), "--report_to", "none"]
            return Job(cluster, SCRIPTS["deepspeed"], *argv, options=options, minutes=args.minutes)

        began = time.monotonic()
        undisturbed = submit("undisturbed", "-w", "node-[3-4]")
        job = submit("preempted", "-w", "node-[1-2]")
        events = []
        for _ in range(args.preemptions):
            events.append(preempt(cluster, job, draw, args.soonest, args.latest, began))
            print(events[-1], flush=True)
        state, restarts = job.wait(), job.restarts
        took = (time.monotonic() - began) / 60
        other = undisturbed.wait()
        took_other = (time.monotonic() - began) / 60
    given = " ".join(
        f"--{name} {getattr(args, name)}" for name in ("steps", "preemptions", "seed", "soonest", "latest", "minutes")
    )
    same = state == other == "COMPLETED" and same_weights(cluster.folder / "undisturbed", cluster.folder / "preempted")
    text = [
        "# A slurm job of two nodes, preempted at random moments, beside one that nobody disturbed",
        "",
        f"`python tests/integration/slurm/long_run.py FOLDER {given}`, {time.strftime('%Y-%m-%d')}",
        "",
        f"The default run of {args.steps} steps under ZeRO-2, `launch/slurm/pretrain_deepspeed.sbatch`, a CPU rank on",
        "each node. Both jobs ran at the same time.",
        "",
        "| job | state | restarts | minutes | validation perplexity |",
        "|---|---|--:|--:|--:|",
        f"| undisturbed | {other} | 0 | at most {took_other:.1f} | {perplexity(undisturbed)} |",
        f"| preempted | {state} | {restarts} | {took:.1f} | {perplexity(job)} |",
        "",
        f"Final weights equal bit by bit: {'yes' if same else 'NO'}.",
        "",
        *events,
        "",
        "From the log of the preempted job (of steps, the last before and the first after each of its messages):",
        "",
        "```",
        *excerpt(job),
        "```",
    ]
    print("\n".join(text))
    if args.markdown:
        args.markdown.write_text("\n".join(text).replace(str(cluster.folder), "FOLDER") + "\n")
    return 0 if same and restarts == args.preemptions and perplexity(job) == perplexity(undisturbed) != "none" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
