"""How much faster do projected gradients train where the network is the bottleneck?

    python benchmarks/network.py --json out.json        # as root, on Linux with iproute2

Two ranks in two network namespaces, joined by a link that is shaped to 100 Mb/s, 1 Gb/s and 10 Gb/s in each direction
(``link.py``). The layers of LLaMA-60M, fp32, gloo, one micro-batch a step. All ways of training are in the same
processes and take turns step by step, so that a slow moment of the machine hits all of them; the first step, where
everything is due, does not count.

``ms`` is the median of steps without a refresh, ``refresh_ms`` of those in which a wave refreshes; ``tokens_s`` is of a
period of 200 steps, with as many of the second kind as the model has waves. ``over_full`` is the median over the
repetitions of the time of ``full`` over this one's, of steps without a refresh, ``tokens_over_full`` the ratio of
``tokens_s``. ``cpu_ms`` is the first rank's processor time in a step without a refresh: what of ``ms`` is neither that
nor the link's is other work on the machine. ``sent_mb`` is what a rank sent in such a step, by the kernel's count;
``link_mbps`` what a plain connection reached. ``planned_s`` is the plan's estimate for sending. On this many cores two
ranks also share the processors, and at 10 Gb/s the link is not the bottleneck.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from link import ADDRESSES, INTERFACE, MEGABIT, inside, link, why_not
from table import Row, json_argument, show

PORT = 29613
PERIOD = 200
HIDDEN, VOCABULARY, LENGTH = 512, 2048, 128
LAYOUTS = ("ddp", "fsdp2")
WAYS = ("full", "projected", "projected, whole bases", "AdamW", "PowerSGD")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["ddp"])
    parser.add_argument("--mbps", type=int, nargs="+", default=[100, 1000, 10000], help="of the link")
    parser.add_argument("--ranks", type=int, nargs="+", default=[HIDDEN // 4, HIDDEN // 8], help="r")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["full", "projected", "projected, whole bases"])
    parser.add_argument("--repetitions", type=int, default=8)
    parser.add_argument("--as_rank", help=argparse.SUPPRESS)
    json_argument(parser)
    args = parser.parse_args()
    if args.as_rank is not None:
        as_rank(json.loads(args.as_rank))
        return
    if (reason := why_not()) is not None:
        raise SystemExit(f"network.py shapes a link between two network namespaces: {reason}")
    rows: list[Row] = []
    for layout in args.layouts:
        for mbps in args.mbps:
            for rank in args.ranks:
                found = run(layout, mbps, rank, args.ways, args.repetitions)
                rows += rows_of(found, layout, mbps, rank)
                print(*(f"{row['gradients']}: {row['tokens_s']:.0f} tokens/s" for row in rows[-len(args.ways) :]))
                sys.stdout.flush()
    show(rows, "Two hosts, LLaMA-60M's layers", args.json)


def run(layout: str, mbps: int, rank: int, ways: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Two ranks on a link of their own; what the first one measured."""
    with link(mbps * MEGABIT) as names, tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        task = {"layout": layout, "rank": rank, "ways": list(ways), "repetitions": repetitions, "answer": str(answer)}
        command = [sys.executable, __file__, "--as_rank", json.dumps(task)]
        ranks = [subprocess.Popen(inside(name, command), env=environment(number)) for number, name in enumerate(names)]
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for process in ranks:
                process.kill()
        if any(codes):
            raise SystemExit(f"the ranks ended with {codes}")
        return json.loads(answer.read_text())


def environment(number: int) -> dict[str, str]:
    """Of one of the two ranks."""
    return {
        **os.environ,
        "RANK": str(number),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": ADDRESSES[0],
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",
    }


def rows_of(found: dict[str, Any], layout: str, mbps: int, rank: int) -> list[Row]:
    """A row for each way of training."""
    full = summary(found["steps"]["full"], found["waves"]) if "full" in found["steps"] else None
    rows = []
    for way, steps in found["steps"].items():
        own = summary(steps, found["waves"] if way in found["refreshing"] else 0)
        row: Row = {"layout": layout, "mbps": mbps, "link_mbps": round(found["link_mbps"]), "rank": rank}
        row |= {"gradients": way, "ms": 1e3 * own["seconds"], "refresh_ms": None, "tokens_s": own["tokens_s"]}
        if own["refresh_seconds"] is not None:
            row["refresh_ms"] = 1e3 * own["refresh_seconds"]
        row["over_full"] = paired(found["steps"]["full"], steps) if full else None
        row["tokens_over_full"] = own["tokens_s"] / full["tokens_s"] if full else None
        row["cpu_ms"] = 1e3 * statistics.median(cpu for _, refreshes, _, cpu in steps if not refreshes)
        row["sent_mb"] = statistics.median(sent for _, refreshes, sent, _ in steps if not refreshes) / 1e6
        row["planned_s"] = planned_seconds(layout, mbps, rank, way)
        rows.append(row)
    return rows


def summary(steps: Sequence[Sequence[Any]], waves: int) -> dict[str, Any]:
    """Medians of steps of both kinds, and the tokens a second of a period in which ``waves`` steps refresh.

    Args:
        steps: (seconds, whether something refreshed, bytes sent, seconds of a processor) of each.
        waves: in a period.
    """
    ordinary = statistics.median(seconds for seconds, refreshes, *_ in steps if not refreshes)
    with_refresh = [seconds for seconds, refreshes, *_ in steps if refreshes]
    refresh = statistics.median(with_refresh) if with_refresh else None
    slow = waves if refresh is not None else 0
    period = (PERIOD - slow) * ordinary + slow * (refresh or 0.0)
    return {"seconds": ordinary, "refresh_seconds": refresh, "tokens_s": 2 * LENGTH * PERIOD / period}


def paired(one: Sequence[Sequence[Any]], other: Sequence[Sequence[Any]]) -> float:
    """Median over repetitions of one's seconds over the other's, where neither refreshed."""
    return statistics.median(a[0] / b[0] for a, b in zip(one, other) if not a[1] and not b[1])


def planned_seconds(layout: str, mbps: int, rank: int, way: str) -> float | None:
    """Seconds of sending that ``ds-lowrank plan --network`` tells of a step; None where it has no such way."""
    from llama import Llama
    from wire import OURS

    from ds_lowrank import planner
    from ds_lowrank.config import LowRankConfig

    compare: Any = getattr(planner, "compare", None)
    if compare is None or way not in (*OURS, "AdamW"):
        return None
    options = {k: v for k, v in OURS.get(way, {}).items() if k != "gradients"}
    config = LowRankConfig(rank=rank, update_proj_gap=PERIOD, gram_dtype="float32", **options)
    setup = planner.Setup(layout, 2, LENGTH, dtype="fp32", master="fp32", units="layers", device="cpu")
    model = planner.read_model(Llama("llama_60m", vocab_size=VOCABULARY))
    found = compare(model, planner.plan_setup(model, config, setup.replace(communication_dtype="fp32")))
    traffic = {"full": found.full.traffic, "AdamW": found.adamw}.get(way)
    return (traffic or found.projected.traffic).seconds(mbps / 1000)


def as_rank(task: dict[str, Any]) -> None:
    """One rank's part."""
    import torch
    import torch.distributed as dist

    import ds_lowrank

    torch.set_num_threads(1)
    ds_lowrank.prepare_cpu()
    dist.init_process_group("gloo")
    speed = link_speed(dist.get_rank())
    found = measure(task["layout"], task["rank"], task["ways"], task["repetitions"])
    if dist.get_rank() == 0:
        Path(task["answer"]).write_text(json.dumps({**found, "link_mbps": speed}))
    dist.barrier()
    dist.destroy_process_group()


def link_speed(rank: int, seconds: float = 2.0) -> float:
    """Mb/s of one connection from rank 1 to rank 0, as rank 0 sees it."""
    address = (ADDRESSES[0], PORT + 1)
    if rank == 0:
        with socket.create_server(address) as server:
            connection, _ = server.accept()
            with connection:
                received, start = 0, time.perf_counter()
                while part := connection.recv(1 << 20):
                    received += len(part)
                return received * 8 / 1e6 / (time.perf_counter() - start)
    for _ in range(100):
        try:
            connection = socket.create_connection(address)
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    with connection:
        stop = time.perf_counter() + seconds
        while time.perf_counter() < stop:
            connection.sendall(bytes(1 << 18))
    return 0.0


def measure(layout: str, rank: int, ways: Sequence[str], repetitions: int) -> dict[str, Any]:
    """Steps of every way, in turns, as :func:`summary` takes them. Collective."""
    import torch.distributed as dist
    from llama import Llama
    from sockets import sent_bytes
    from text import batch
    from wire import OURS, Traffic, start_run

    matrices = 0
    runs: dict[str, Any] = {}
    for way in ways:
        model = Llama("llama_60m", vocab_size=VOCABULARY)
        matrices = sum(p.ndim == 2 for p in model.layers.parameters())
        waves = -(-matrices // 8)
        # Every second step refreshes a wave: as many of one kind as of the other are seen.
        runs[way] = start_run(Traffic(layout, "llama_60m", rank, way, 2 * waves, repetitions), model)
    steps: dict[str, list[tuple[float, bool, int, float]]] = {way: [] for way in ways}
    for repetition in range(repetitions + 1):
        tokens = batch(repetition, dist.get_rank(), 2, 1, LENGTH)
        for way in ways if repetition % 2 else reversed(ways):
            before = refreshes(runs[way])
            dist.barrier()
            sent, start, worked = sent_bytes(), time.perf_counter(), time.process_time()
            runs[way].step([{"tokens": tokens}])
            dist.barrier()
            seconds, worked = time.perf_counter() - start, time.process_time() - worked
            if repetition:
                steps[way].append((seconds, refreshes(runs[way]) > before, sent_bytes() - sent, worked))
    return {"steps": steps, "waves": waves, "refreshing": [way for way in ways if way in OURS]}


def refreshes(run: Any) -> int:
    """How often matrices have got a basis so far, all of them together."""
    from ds_lowrank.optimizer import STATE_KEY

    states = run.optimizer.state.get(STATE_KEY, {})
    return sum(int(state["refreshes"]) for state in states.values())


if __name__ == "__main__":
    main()
