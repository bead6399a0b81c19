"""Two hosts with addresses of their own, as network namespaces: torchrun and deepspeed start a rank on each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launching import PRETRAIN, config, flags
from safetensors.torch import load_file

SECONDS = 300
STEPS = {"max_steps": 4, "update_proj_gap": 2, "lr": 0.01, "batch_size": 2, "report_to": "none"}
HOSTS = {"dslr-a": "10.211.7.1", "dslr-b": "10.211.7.2"}


def _why_not() -> str | None:
    if os.geteuid():
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no ip (Debian: iproute2)"
    tried = subprocess.run(["ip", "netns", "add", "dslr-try"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "dslr-try"], capture_output=True, check=False)
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


WHY_NOT = _why_not()
pytestmark = [
    pytest.mark.launcher,
    pytest.mark.slow,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[dict[str, str]]:
    """Names and addresses of two namespaces that a cable joins; nothing else can be reached from them."""
    try:
        for name in HOSTS:
            ip("netns", "add", name)
        (first, here), (second, there) = HOSTS.items()
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in ((first, here), (second, there)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield HOSTS
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(workplace: Path, host: str, *command: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *command],
        cwd=workplace,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def torchrun(number: int, head: str, workplace: Path) -> list[str]:
    return [
        "torchrun",
        *("--nnodes", "2", "--node-rank", str(number), "--nproc-per-node", "1"),
        *("--rdzv-backend", "static", "--rdzv-endpoint", f"{head}:29611"),
    ]


def deepspeed(number: int, head: str, workplace: Path) -> list[str]:
    hostfile = workplace / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in HOSTS.values()))
    return [
        "deepspeed",
        *("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(number)),
        *("--master_addr", head, "--master_port", "29612"),
    ]


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_both_hosts_train_one_model(workplace, hosts, launcher):
    output = f"hosts_{launcher.__name__}"
    head = hosts["dslr-a"]
    script = [str(PRETRAIN), *config("zero2"), *flags(workplace, output, **STEPS)]
    processes = [
        start(workplace, host, *launcher(number, head, workplace), *script) for number, host in enumerate(hosts)
    ]
    printed = []
    try:
        printed = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    assert "2 ranks" in printed[0]
    assert "validation perplexity" in printed[0]
    model = load_file(workplace / output / "model.safetensors")
    assert all(torch.isfinite(weight).all() for weight in model.values())


def test_both_launchers_end_with_the_same_weights(workplace, hosts):
    here, there = (load_file(workplace / f"hosts_{name}" / "model.safetensors") for name in ("torchrun", "deepspeed"))
    assert here.keys() == there.keys()
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())
