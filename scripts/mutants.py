"""Is a fault in the arithmetic noticed by the tests that take minutes? Puts faults in, one at a time, and asks them.

python scripts/mutants.py [--jobs 2] [--only WORD]

Each mutant is one change of a line or two in a copy of the package; the fast tests (ranks as threads, and unit tests of
what these use) run on the copy until the first that fails. A copy without a fault runs as well and has to pass. The
exit code is 1 where a mutant survives, its text is no longer in the file once, or the copy without a fault fails.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch  # noqa: F401  # as the tests do, before they are forked
import torch.distributed.checkpoint.state_dict
import torch.distributed.tensor  # noqa: F401
from faults_between_ranks import MOVES, PLANS
from faults_of_arithmetic import ARITHMETIC, METHODS, Mutant
from faults_of_projection import PROJECTION

ROOT = Path(__file__).resolve().parents[1]
# What is copied, and the tests in the order in which they are asked: the quickest first.
COPIED = ("ds_lowrank", "benchmarks", "tests", "launch", "pyproject.toml")
TESTS = (
    *(
        f"tests/threads/test_thread_{name}.py"
        for name in ("update", "method_layouts", "agreement", "layerwise", "ranks", "traffic", "formats", "resume")
    ),
    *(
        f"tests/unit/test_{name}.py"
        for name in ("geometry", "plan", "selection", "rounding", "subspace", "states", "methods", "engine_edges")
    ),
)
TIMED = "tests/unit/test_plan.py::test_a_plan_for_1024_ranks_takes_no_longer_than_importing_torch"
TIMEOUT = 3600  # seconds; a mutant that runs longer counts as caught


@dataclass(frozen=True)
class Answer:
    """What the tests say of a mutant (``None``: of no fault): caught, by which test; or not, and why."""

    mutant: Mutant | None
    caught: bool
    said: str
    seconds: float

    def row(self) -> str:
        """A line of the table."""
        file, breaks = ("", "(no fault)") if self.mutant is None else (self.mutant.file, self.mutant.breaks)
        said = "every test passes" if self.mutant is None and not self.caught else self.said
        return f"{file:32}{breaks:68}{said}, {self.seconds:.0f} s"


MUTANTS = [*ARITHMETIC, *METHODS, *PLANS, *MOVES, *PROJECTION]


def main() -> int:
    """Try all of them; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies that are tested side by side")
    parser.add_argument("--only", default="", help="mutants whose file or effect has this word")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if args.only in f"{m.file} {m.breaks}"]
    waiting: list[Mutant | None] = [*chosen, None]
    running: dict[int, Trial] = {}
    wrong = 0
    while waiting or running:
        while waiting and len(running) < args.jobs:
            trial = Trial(waiting.pop(0))
            running[trial.process] = trial
        process, status = os.wait()
        answer = running.pop(process).answer(status)
        wrong += answer.caught != (answer.mutant is not None)
        print(answer.row(), flush=True)
    print(f"{len(chosen)} mutants, {wrong} answers that should not be")
    return int(bool(wrong))


class Trial:
    """A copy of the package with a fault, and a process that runs the tests on it.

    The process is a fork of this one, which has imported what takes most of a test's start.

    Args:
        mutant: the fault; ``None``: none.
    """

    def __init__(self, mutant: Mutant | None):
        self._mutant, self._begin = mutant, time.monotonic()
        self._folder = tempfile.TemporaryDirectory()
        copy = Path(self._folder.name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, copy / part)
        self._fault = "" if mutant is None else put_into(copy, mutant)
        self._output = copy / "output.txt"
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            os._exit(2 if self._fault else _run_tests(copy, self._output, "" if mutant is None else mutant.first))

    def answer(self, status: int) -> Answer:
        """What the tests say, from the status with which the process has ended."""
        said = self._output.read_text() if self._output.is_file() else ""
        self._folder.cleanup()
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        caught = True
        if self._fault:
            caught, text = False, self._fault
        elif os.WIFSIGNALED(status):
            text = f"nothing ended within {TIMEOUT} s"
        elif os.WEXITSTATUS(status) == 0:
            caught, text = False, "SURVIVED"
        elif os.WEXITSTATUS(status) != 1 or found is None:
            caught, text = False, f"NOT TESTED: {said.strip()[-300:]}"
        else:
            text = f"caught by {found[1]}"
        return Answer(self._mutant, caught, text, time.monotonic() - self._begin)


def put_into(copy: Path, mutant: Mutant) -> str:
    """Put a fault into a copy of the package; returns what is wrong with it, if anything."""
    path = copy / "ds_lowrank" / mutant.file
    text = path.read_text() if path.is_file() else ""
    if text.count(mutant.old) != 1:
        return f"DOES NOT APPLY: its text is there {text.count(mutant.old)} times"
    path.write_text(text.replace(mutant.old, mutant.new))
    return ""


def _run_tests(copy: Path, output: Path, first: str) -> int:
    """In the process of a copy: until the first test that fails; pytest's exit code."""
    signal.alarm(TIMEOUT)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    sys.path[0] = str(copy)
    sys.dont_write_bytecode = True
    import ds_lowrank

    if not str(ds_lowrank.__file__).startswith(str(copy)):
        print(f"{ds_lowrank.__file__} is not the copy")
        return 2
    # What measures times says nothing of a fault.
    options = ["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(copy), f"--deselect={TIMED}"]
    code = 0
    if first:
        code = int(pytest.main([*options, *f"tests/{first}".split(maxsplit=2)]))
    if code == 0:
        code = int(pytest.main([*options, *TESTS]))
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
