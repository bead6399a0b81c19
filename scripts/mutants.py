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

ROOT = Path(__file__).resolve().parents[1]
# What is copied, and the tests in the order in which they are asked: the quickest first.
COPIED = ("ds_lowrank", "benchmarks", "tests", "launch", "pyproject.toml")
TESTS = (
    *(
        f"tests/threads/test_thread_{name}.py"
        for name in ("update", "agreement", "layerwise", "ranks", "traffic", "formats", "resume")
    ),
    *(f"tests/unit/test_{name}.py" for name in ("geometry", "plan", "selection", "rounding", "subspace", "states")),
)
TIMED = "tests/unit/test_plan.py::test_a_plan_for_1024_ranks_takes_no_longer_than_importing_torch"
TIMEOUT = 3600  # seconds; a mutant that runs longer counts as caught


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        file: in ``ds_lowrank``.
        old, new: what is there, once, and what takes its place.
        breaks: what that does.
        first: which test file is asked first, behind ``tests/``, with pytest's options.
    """

    file: str
    old: str
    new: str
    breaks: str
    first: str = "threads/test_thread_update.py"


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


# The arithmetic of one rank: products, spectra, rules, formats.
ARITHMETIC = [
    Mutant(
        "subspace/project.py",
        "beta=keep, alpha=-step_size)\n    elif",
        "beta=keep, alpha=step_size)\n    elif",
        "the step goes uphill",
    ),
    Mutant(
        "subspace/project.py",
        "wide = rows.to(basis.dtype).addmm_(part, basis.mT, beta=keep, alpha=-step_size)",
        "wide = rows.to(basis.dtype).addmm_(part, basis.mT, beta=1.0, alpha=-step_size)",
        "bf16 weights do not decay",
        "threads/test_thread_formats.py -k rounded_alike",
    ),
    Mutant(
        "subspace/project.py",
        "beta=0 if first == 0 else 1)",
        "beta=0)",
        "a Gram has the last rows only",
        "threads/test_thread_update.py -k llama",
    ),
    Mutant(
        "subspace/project.py",
        "out[right:, left:right].copy_(out[left:right, right:].mT)",
        "pass",
        "half of a large Gram is not mirrored",
        "threads/test_thread_update.py -k llama",
    ),
    Mutant(
        "subspace/project.py",
        "(product.abs() <= floor) & drawn",
        "(product.abs() <= 0 * floor) & drawn",
        "what rounding made of nothing becomes a step",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "subspace/basis.py",
        "exp_avg.copy_(exp_avg @ cross)",
        "exp_avg.copy_(exp_avg @ cross.mT)",
        "moments turn the wrong way",
    ),
    Mutant(
        "subspace/basis.py",
        "torch.arange(rank) < found",
        "torch.arange(rank) <= found",
        "a drawn direction counts as the gradient's",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "subspace/selection.py",
        "keys += torch.log(weights)",
        "keys -= torch.log(weights)",
        "small directions are the likely ones",
    ),
    Mutant("subspace/selection.py", "[:rank].sort().values", "[:rank]", "kept directions are not in order"),
    Mutant(
        "subspace/selection.py",
        'f"{seed}\\0{name}\\0{refresh}"',
        'f"{seed}\\0{name}\\0{0}"',
        "every refresh draws the same",
    ),
    Mutant(
        "subspace/selection.py",
        "for _ in range(2):  # once",
        "for _ in range(0):  # once",
        "a drawn direction is not orthogonal to the kept ones",
        "threads/test_thread_update.py -k directions",
    ),
    Mutant(
        "subspace/spectrum.py",
        "torch.where(peaks < 0, -vectors, vectors)",
        "vectors",
        "signs of a basis are left to the decomposition",
    ),
    Mutant(
        "subspace/spectrum.py",
        "values, vectors = values.flip(0), vectors.flip(1)",
        "values = values.flip(0)",
        "the least directions are kept for the largest",
    ),
    Mutant(
        "subspace/sides.py",
        'return "right" if m >= n else "left"',
        'return "right" if m > n else "left"',
        "square matrices are projected on their other side",
    ),
    Mutant(
        "states/dynamic.py",
        "codes = torch.where((x > 0) & (codes == 0), 1, codes)",
        "pass",
        "small second moments become zero",
        "unit/test_states.py",
    ),
    Mutant(
        "states/dynamic.py",
        "return values * expand(scales, codes.shape[1], block)",
        "return values * scales[:, :1]",
        "all of a row has its first block's scale",
        "unit/test_states.py",
    ),
    Mutant(
        "states/linear.py",
        "halves[:, 0::2] | halves[:, 1::2] << 4",
        "halves[:, 1::2] | halves[:, 0::2] << 4",
        "two codes of a byte change places",
        "unit/test_states.py",
    ),
    Mutant(
        "states/packing.py",
        "part.contiguous().view(tensor.dtype) for part",
        "part.flip(0).contiguous().view(tensor.dtype) for part",
        "rows of a quantised basis travel in another order",
        "threads/test_thread_formats.py -k rounds_where",
    ),
    Mutant(
        "states/rounding.py",
        "return replace(self, first=self.first + rows * self.strides[0])",
        "return self",
        "all blocks of rows are rounded by the same bits",
        "threads/test_thread_formats.py -k many_rows",
    ),
    Mutant(
        "states/rounding.py",
        "index = torch.arange(start, stop, device=x.device)[:, None] * place.strides[0] + across",
        "index = torch.arange(start, stop, device=x.device)[:, None] * len(across) + across",
        "bits depend on how a matrix is cut",
        "threads/test_thread_formats.py -k rounded_alike",
    ),
]

# Who holds, computes and decomposes what, and when.
PLANS = [
    Mutant(
        "plan/matrices.py",
        "cuts = [long * k // size for k in range(size + 1)]",
        "cuts = [(long - 1) * k // size for k in range(size + 1)]",
        "nobody computes the last row under DDP",
    ),
    Mutant(
        "plan/matrices.py",
        "top, bottom = -(-start // n), -(-stop // n)",
        "top, bottom = start // n, stop // n",
        "a row that a boundary cuts is computed where it ends",
    ),
    Mutant(
        "plan/matrices.py",
        "Box(whole, bottom, 0, n) if whole < bottom else None,",
        "None,",
        "a row that a boundary cuts is not brought together",
    ),
    Mutant(
        "plan/matrices.py",
        "chunk = -(-short // len(ranks))",
        "chunk = short // len(ranks)",
        "the last rows of a basis are kept by nobody",
    ),
    Mutant(
        "plan/matrices.py",
        "if self.copy[k] == self.copy[self.owner]]",
        "]",
        "an owner waits for Grams of other copies of the model",
    ),
    Mutant(
        "plan/matrices.py",
        "for part in self.parts) > 1",
        "for part in self.parts) > 2",
        "what two ranks share is taken for one rank's own",
    ),
    Mutant(
        "plan/matrices.py",
        "return self.long < self.short",
        "return False",
        "the larger Gram is made where the longer side is projected",
        "threads/test_thread_traffic.py -k longer",
    ),
    Mutant(
        "plan/geometry.py",
        "return Part(boxes_of(start, stop, n), first - piece.start, n, (start, stop))",
        "return Part(boxes_of(start, stop, n), first - piece.start - n * (piece.start > 0), n, (start, stop))",
        "what is not the first rank's is read a row too early",
    ),
    Mutant(
        "plan/geometry.py",
        "at * m * (right - left) - left, right - left",
        "at * m * (right - left), right - left",
        "a block of columns is read shifted",
    ),
    Mutant(
        "plan/geometry.py",
        "max(self.left, other.left)",
        "min(self.left, other.left)",
        "more columns are sent than two ranks have in common",
    ),
    Mutant(
        "subspace/schedule.py", "(step - phase) % gap == 0", "(step + phase) % gap == 0", "waves come at other steps"
    ),
    Mutant(
        "subspace/schedule.py",
        "wave * gap // count if stagger",
        "wave * gap // (count + 1) if stagger",
        "waves are not spread over the period",
    ),
    Mutant(
        "subspace/schedule.py",
        "load[w] += costs[j]",
        "load[w] += 1",
        "waves are not balanced by their cost",
        "unit/test_plan.py",
    ),
]

# What moves between ranks, and what is saved.
MOVES = [
    Mutant(
        "comm/collectives.py",
        "lambda: [part[:size] for part, size in zip(whole.split(most), sizes)]",
        "lambda: [part[-size:] for part, size in zip(whole.split(most), sizes)]",
        "of parts of unequal size the padding is taken",
    ),
    Mutant(
        "comm/collectives.py",
        "(sum(sizes) - sizes[self.ranks.rank]) * dtype.itemsize",
        "sum(sizes) * dtype.itemsize",
        "what a rank sends itself counts as sent",
        "threads/test_thread_traffic.py",
    ),
    Mutant(
        "comm/collectives.py",
        "dist.get_global_rank(group, self.ranks.shard_group.index(owner)) if group is not None else owner",
        "0",
        "Grams are added up on another rank than their owner",
    ),
    Mutant(
        "comm/collectives.py",
        "lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX, group",
        "lambda: dist.all_reduce(tensor, group",
        "scales of cut blocks are added up",
        "threads/test_thread_formats.py -k not_projected",
    ),
    Mutant(
        "engine/rows.py",
        "for k in self._comm.ranks.shard_group for b in _meets(source(plan, mine)",
        "for k in self._comm.ranks.shard_group[:2] for b in _meets(source(plan, mine)",
        "the third rank is sent no rows",
    ),
    Mutant(
        "engine/rows.py",
        "whole[box.top - frame.top : box.bottom - frame.top, ",
        "whole[: box.bottom - box.top, ",
        "rows lie at the beginning of a buffer",
    ),
    Mutant(
        "engine/rows.py",
        "if rank != self._rank:",
        "if rank > self._rank:",
        "weights of lower ranks are not taken over under DDP",
    ),
    Mutant(
        "engine/bases.py",
        "ahead.append(self._start(plans[i + 1], states))",
        "ahead.append(self._start(plans[i], states))",
        "a matrix is stepped with the basis before its own",
    ),
    Mutant(
        "engine/bases.py",
        "if not plan.basis_sharded and len(plan.contributors) > 1:",
        "if False:",
        "who keeps all of a basis has a slice of it",
    ),
    Mutant(
        "engine/refresh.py", "elif plan.owner in shard_group:", "else:", "copies of the model add up their gradients"
    ),
    Mutant(
        "engine/refresh.py", "sums[plan.name].add_(square)", "sums[plan.name]", "of Grams of few ranks the first counts"
    ),
    Mutant(
        "engine/refresh.py",
        'state["refreshes"] = _int(state, "refreshes") + 1',
        'state["refreshes"] = max(1, _int(state, "refreshes"))',
        "refreshes are not counted",
    ),
    Mutant(
        "engine/refresh.py",
        'if cross is not None and self._moments != "keep":',
        "if False:",
        "moments are kept where they should be projected",
    ),
    Mutant(
        "engine/step.py",
        "return [portions[key] for key in sorted(portions)]",
        "return [portions[key] for key in sorted(portions)[:1]]",
        "of waves that are due together only the first is refreshed",
    ),
    Mutant(
        "engine/step.py",
        'return 1.0 - float(group["lr"]) * group["weight_decay"]',
        'return 1.0 + float(group["lr"]) * group["weight_decay"]',
        "weights grow instead of decaying",
    ),
    Mutant(
        "engine/step.py",
        "lift_(as_rows(update, plan.side), direction[whole_rows:], basis",
        "lift_(as_rows(update, plan.side), direction[: len(direction) - whole_rows], basis",
        "a buffered row has the update of another",
    ),
    Mutant(
        "state_dict/parameter_states.py",
        "moved[key][start - first : stop - first] = part",
        "moved[key][: stop - start] = part",
        "rows of a saved state lie at another place",
        "threads/test_thread_resume.py",
    ),
    Mutant(
        "checkpoint/sources.py",
        "found[a - start : b - start] = tensor[a - first : b - first]",
        "found[a - start : b - start] = tensor[: b - a]",
        "a rank's first rows are loaded for its last",
        "threads/test_thread_resume.py",
    ),
    Mutant(
        "full_rank/adamw8bit.py",
        "codes, scale = (states[name][key] for key in form.keys(quantity))\n                mine",
        "codes, scale = (states[name][key].clone() for key in form.keys(quantity))\n                mine",
        "cut blocks keep the scale of a part",
        "threads/test_thread_formats.py -k not_projected",
    ),
]
MUTANTS = [*ARITHMETIC, *PLANS, *MOVES]


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
