"""A rank that has done its work ends with exit code 0, however late gloo's threads let go of the last tensors."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import ds_lowrank

ROUNDS = 4

# Gloo's threads run only while nothing else wants their processor: the program always gets further than they do, as
# now and then on a machine that others use. Without await_gloo_at_exit() nine of ten ranks abort here (torch 2.13,
# Python 3.11).
SCRIPT = """
import os, sys
import torch
import torch.distributed as dist

sys.path.append(sys.argv[1])  # that module alone: what else ends with a larger program gives gloo time
from gloo import await_gloo_at_exit

def work(rank, port):
    await_gloo_at_exit()
    processor = sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    os.sched_setaffinity(0, {processor})
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/comm") as name:
            if name.read().startswith("pt_gloo_runloop"):
                os.sched_setaffinity(int(task), {processor})
                os.sched_setscheduler(int(task), os.SCHED_IDLE, os.sched_param(0))
    kept.append(dist.group.WORLD)
    for _ in range(3):
        part, whole = torch.ones(50_000), torch.empty(100_000)
        dist.all_gather_into_tensor(whole, part, async_op=True).wait()
        del part, whole
    dist.barrier()
    dist.destroy_process_group()
    sys.exit(0)  # through Python's whole shutdown, kept groups and all

codes, kept = [], []  # as DeepSpeed keeps groups, which destroying them does not end
for port in sys.argv[2:]:
    children = [os.fork() or work(rank, port) for rank in range(2)]
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's schedulers")
def test_ranks_end_with_0_when_gloo_is_late():
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(ROUNDS)]
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(Path(ds_lowrank.__file__).parent / "comm"), *ports]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == str([0] * 2 * ROUNDS), done.stderr[-3000:]
