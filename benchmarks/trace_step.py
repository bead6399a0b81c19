"""How many Python calls of this package does the step of one projected matrix make?

    python benchmarks/trace_step.py --json out.json
    python benchmarks/trace_step.py --cases one --tree
    python benchmarks/trace_step.py --bound one 45 10 --bound "fsdp2 wide" 100

A model of one matrix, its third step: layout, states and basis are there, and nothing refreshes. ``calls`` is how
often a function of the package is entered (methods, properties, lambdas, and a generator every time that it goes on),
``files`` in how many files these are. Comprehensions and generator expressions are no calls here: from Python 3.12 on
most of them run within the function around them. ``frames`` has them too, as this Python runs them. On several ranks
the figures are those of the rank that makes most calls. ``--tree`` prints who calls whom. More than a bound allows ends
the script with an error; without ``--bound`` it is held against ``BOUNDS``, as the tests are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from harness import start
from llama import Matrices, Setting
from rank_pool import RankPool
from table import Row, json_argument, show

import ds_lowrank

TALL, WIDE = (24, 10), (10, 24)
RANK = 4
# Name -> layout, ranks, shape. What lies whole on a rank, what is cut, and what turns columns into rows.
CASES: dict[str, tuple[str, int, tuple[int, int]]] = {
    "one": ("one", 1, TALL),
    "ddp": ("ddp", 2, TALL),
    "zero2": ("zero2", 2, TALL),
    "zero3": ("zero3", 2, TALL),
    "zero3 wide": ("zero3", 2, WIDE),
    "fsdp2": ("fsdp2", 2, TALL),
    "fsdp2 wide": ("fsdp2", 2, WIDE),
}
# Case -> most calls, and most files if they are bounded. To be lowered with what a step takes, never raised.
BOUNDS: dict[str, tuple[int, int | None]] = {"one": (45, 10), "fsdp2 wide": (100, None)}

_PACKAGE = str(Path(ds_lowrank.__file__).parent) + "/"


@dataclass
class Node:
    """A function, called by the one above it.

    Attributes:
        file, name: of the function, the file within the package.
        count: how often it was entered from there.
        below: what it called.
    """

    file: str = ""
    name: str = ""
    count: int = 0
    below: dict[tuple[str, str], Node] = field(default_factory=dict)

    def all(self) -> Iterator[Node]:
        """Everything below."""
        for node in self.below.values():
            yield node
            yield from node.all()

    def lines(self, indent: str = "") -> Iterator[str]:
        """Everything below, indented."""
        for node in self.below.values():
            yield f"{indent}{node.file}:{node.name}" + (f" x{node.count}" if node.count > 1 else "")
            yield from node.lines(indent + "  ")


class Figures(NamedTuple):
    """Counts of one step, see the file."""

    calls: int
    files: int
    frames: int

    @classmethod
    def of(cls, root: Node) -> Figures:
        """Those of a tree."""
        nodes = list(root.all())
        named = [n for n in nodes if not n.name.startswith("<") or n.name == "<lambda>"]
        return cls(sum(n.count for n in named), len({n.file for n in named}), sum(n.count for n in nodes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--tree", action="store_true", help="print who calls whom")
    parser.add_argument(
        "--bound", nargs="+", action="append", metavar="CASE CALLS [FILES]", help="in the place of BOUNDS"
    )
    json_argument(parser)
    args = parser.parse_args()
    bounds = BOUNDS
    if args.bound:
        if any(len(words) not in (2, 3) or words[0] not in CASES for words in args.bound):
            parser.error(f"--bound takes a case ({', '.join(CASES)}), its calls, and its files perhaps")
        bounds = {case: (int(calls), int(files[0]) if files else None) for case, calls, *files in args.bound}
    pools: dict[int, RankPool] = {}
    rows: list[Row] = []
    found: dict[str, Figures] = {}

    def pool(size: int) -> RankPool:
        if size not in pools:
            pools[size] = RankPool(size)
        return pools[size]

    for case in args.cases:
        layout, ranks, shape = CASES[case]
        root = measure(case, pool)
        found[case] = Figures.of(root)
        if args.tree:
            print(f"{case}: {found[case]}\n" + "\n".join(root.lines("  ")), flush=True)
        rows.append({"layout": layout, "ranks": ranks, "matrix": "{}x{}".format(*shape), **found[case]._asdict()})
    for started in pools.values():
        started.close()
    show(rows, "Calls of the third step of one matrix", args.json)
    sys.exit("\n".join(faults(found, bounds)) or None)


def faults(found: Mapping[str, Figures], bounds: Mapping[str, tuple[int, int | None]]) -> list[str]:
    """What exceeds its bound."""
    return [
        f"{case}: {made.calls} calls in {made.files} files, allowed are {calls}" + (f" in {files}" if files else "")
        for case, made in found.items()
        for calls, files in [bounds.get(case, (made.calls, None))]
        if made.calls > calls or (files is not None and made.files > files)
    ]


def measure(case: str, pools: Callable[[int], RankPool]) -> Node:
    """The calls of a case, those of the rank that makes most."""
    layout, ranks, shape = CASES[case]
    if ranks == 1:
        return third_step(layout, shape)
    return max(pools(ranks).run(third_step, layout, shape), key=Figures.of)


def third_step(layout: str, shape: tuple[int, int]) -> Node:
    """Train a model of one matrix; the calls of its third step on this rank. Collective."""
    options = {"rank": RANK, "update_proj_gap": 1000, "lr": 0.01, "gram_dtype": "float64"}
    run = start(Setting(layout, options), Matrices([[shape]]))
    for seed in range(2):
        run.step([{"seed": seed}])
    step, found = run.optimizer.step, []
    # Wherever the framework calls it from.
    run.optimizer.step = lambda *args: found.append(trace(lambda: step(*args)))  # type: ignore[method-assign]
    run.step([{"seed": 2}])
    run.close()
    (root,) = found
    return root


def trace(run: Callable[[], Any]) -> Node:
    """The calls of this package's functions in this thread while ``run`` runs."""
    root = Node()
    stack: list[tuple[FrameType | None, Node]] = [(None, root)]

    def event(frame: FrameType, kind: str, _: Any) -> None:
        code = frame.f_code
        if not code.co_filename.startswith(_PACKAGE):
            return
        if kind == "call":
            key = code.co_filename.removeprefix(_PACKAGE), code.co_name
            node = stack[-1][1].below.setdefault(key, Node(*key))
            node.count += 1
            stack.append((frame, node))
        elif kind == "return" and stack[-1][0] is frame:
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(event)
    try:
        run()
    finally:
        sys.setprofile(before)
    return root


if __name__ == "__main__":
    main()
