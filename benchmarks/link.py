"""Two hosts on this machine, joined by a cable of a given speed: network namespaces, a veth pair and tbf."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

ADDRESSES = ("10.211.8.1", "10.211.8.2")
INTERFACE = "eth0"
MEGABIT = 1_000_000


def why_not() -> str | None:
    """Why this machine can make no such link, or None."""
    if os.geteuid():
        return "network namespaces and shaped links need root"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"no {program} (Debian: iproute2)"
    try:
        with link(100 * MEGABIT):
            return None
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextmanager
def link(rate: int | None) -> Iterator[list[str]]:
    """Names of two network namespaces that see each other alone, with ``ADDRESSES`` on ``INTERFACE``.

    Args:
        rate: bits a second, in each direction; None: as fast as the kernel copies.

    Raises:
        subprocess.CalledProcessError: ``ip`` or ``tc`` refused.
    """
    names = [f"dslr-{os.getpid()}-{end}" for end in "ab"]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        ends = (INTERFACE, "netns", names[0], "type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        _run("ip", "link", "add", *ends)
        for name, address in zip(names, ADDRESSES):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            _run("ip", "-n", name, "link", "set", INTERFACE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            if rate is not None:
                _run("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *shape(rate))
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def shape(rate: int) -> list[str]:
    """Arguments of ``tc`` for a bucket of tokens that fills at ``rate`` bits a second.

    The bucket holds four milliseconds of them, what the slowest of the kernel's clocks lets through at once, and at
    least two of the packets of 64 KiB that veth passes; what waits for it at most 50 ms and at least 1 MiB.
    """
    burst = max(rate // 8 // 250, 2 * 65536)
    return ["tbf", "rate", f"{rate}bit", "burst", str(burst), "limit", str(burst + max(rate // 8 // 20, 1 << 20))]


def inside(name: str, command: Sequence[str]) -> list[str]:
    """The command line that runs another one in a namespace."""
    return ["ip", "netns", "exec", name, *command]


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
