"""PyTorch's own tests of optimizers, of FSDP2's training and of state dicts, with LowRankAdamW in the place of AdamW.

python scripts/torch_tests.py --tests FOLDER

FOLDER is the ``test`` folder of PyTorch's source, best of the version that is installed; a wheel of torch has none. The
tests need ``expecttest`` and ``pytest``. Each runs with torch's own AdamW as well: what fails there says nothing about
us (a test of another version, or a GPU that is missing). Without a GPU the tests of FSDP2 and of state dicts run on two
CPU processes with gloo: their text is read with "cpu" for "cuda". The exit code is 1 where a test fails with ours,
passes with AdamW, and is not in EXPECTED.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lowrank import LowRankAdamW

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("passed", "failed", "expected", "failed with AdamW too", "skipped")
AS_ENVIRONMENT = "TORCH_TESTS_OPTIMIZER"
PROCESSES = 2
RANK = 2
LACKING = {"amsgrad", "maximize", "capturable", "differentiable", "foreach", "fused"}
NAMES = "a state with names is not taken by an optimizer without: bases are drawn by the names"
# What a test asks for and we do not offer, by a pattern of its name.
EXPECTED = {
    r"named_state_dict_is_named_optim0_True_is_named_optim1_False": NAMES,
    r"deterministic_is_named_optim0_True_is_named_optim1_False": NAMES,
    r"deepcopy_copies_all_public_attrs": "a copy finds its layout, and what hangs on that, at its first use",
    r"test_to_float64_after_init": "its ranks are threads of one process, whose group takes no collective of ours",
    r"FullRank .*test_non_empty_state": "the place of the low-rank states is empty where nothing is projected",
    r"LowRank .*test_load_nontensor_step": "a low-rank state never had a step that is a number",
    r"LowRank .*test_complex_cpu": "a complex vector seen as real numbers is a matrix, and projected here",
    r"LowRank .*test_flattened_osd": "flatten_optimizer_state_dict=True cannot hold low-rank states, and is refused",
    r"LowRank .*test_non_root_forward_backward": "where a model is sharded a missing gradient counts as zero",
    r"LowRank .*test_train_parity_hsdp": "gradients that differ by 1e-7 part by 3e-5 of the way in a tail direction",
}


class FullRank(LowRankAdamW):
    """Nothing is projected. AdamW's choice of a kernel is taken and means nothing."""

    def __init__(self, params: Any, lr: Any = 1e-3, **options: Any):
        for kernel in ("foreach", "fused"):
            options.pop(kernel, None)
        super().__init__(self.groups(params), lr, **{"eps": 1e-8, **options})

    @staticmethod
    def groups(params: Any) -> Any:
        """The groups that the test gave."""
        return params

    def state_dict(self) -> dict[str, Any]:
        """What docs/checkpoints.md asks for under DistributedDataParallel comes first."""
        if torch.distributed.is_initialized():
            self.consolidate_state_dict(None)
        return super().state_dict()


class LowRank(FullRank):
    """Every real matrix is projected."""

    @staticmethod
    def groups(params: Any) -> Any:
        """Each group of the test in two: its matrices and the rest."""
        if params is None or isinstance(params, Tensor):
            return params  # which torch refuses
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        found = []
        for group in groups:
            members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
            matrices = [m for m in members if is_matrix(m[1] if isinstance(m, tuple) else m)]
            rest = [m for m in members if all(m is not taken for taken in matrices)]
            sides = [min((m[1] if isinstance(m, tuple) else m).shape) for m in matrices]
            ranks = [min(RANK, side) for side in sides]
            found += [{**group, "params": matrices, "rank": ranks}] if matrices else []
            found += [{**group, "params": rest}] if rest else []
        return found


def is_matrix(tensor: Tensor) -> bool:
    """Two dimensions, real numbers."""
    return tensor.dim() == 2 and not tensor.is_complex()


@dataclass(frozen=True)
class Suite:
    """A file of PyTorch's tests.

    Attributes:
        file: within the folder of tests.
        select: of its tests, pytest's -k.
        distributed: its tests start processes, and make the optimizer by its name in ``torch.optim``.
    """

    file: str
    select: str
    distributed: bool


SUITES = (
    Suite("test_optim.py", "TestOptimRenewed", False),
    Suite("distributed/_composable/fsdp/test_fully_shard_training.py", "", True),
    Suite("distributed/checkpoint/test_state_dict.py", "", True),
)
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"AdamW": torch.optim.AdamW}
OURS: dict[str, type[FullRank]] = {"FullRank": FullRank, "LowRank": LowRank}
OPTIMIZERS.update(OURS)


def install() -> None:
    """Called by the copies of the tests in every process: put the chosen optimizer into AdamW's place."""
    from importlib import import_module

    internal = "torch.testing._internal.common_"
    names = ("distributed", "fsdp", "optimizers", "utils")
    modules: list[Any] = [import_module(internal + name) for name in names]
    common_distributed, common_fsdp, common_optimizers, common_utils = modules
    name = os.environ[AS_ENVIRONMENT]
    infos = common_optimizers.optim_db
    info = next(i for i in infos if i.optim_cls is torch.optim.AdamW)
    if name != "AdamW":
        info = common_optimizers.OptimizerInfo(
            OPTIMIZERS[name],
            optim_inputs_func=offered(info.optim_inputs_func),
            optim_error_inputs_func=offered(info.optim_error_inputs_func),
            supported_impls=(),
            not_og_supported_flags=(),
            supports_complex=True,
        )
        torch.optim.Adam = torch.optim.AdamW = OPTIMIZERS[name]  # type: ignore[assignment, misc]
    infos[:] = [info]
    # Without the variants that compile the model, which take minutes each; torch 2.6 has the first name.
    common_fsdp.test_compiled_fsdp = common_fsdp.compiled_fsdp_test = lambda *_, **__: lambda test: test
    if torch.accelerator.is_available():
        return

    def skip_above(count: int, **_: Any) -> Callable[[Any], Any]:
        few = count <= PROCESSES
        return lambda test: test if few else unittest.skip(f"needs {count} GPUs; {PROCESSES} processes here")(test)

    common_distributed.skip_if_lt_x_gpu = skip_above
    common_fsdp.DEVICE_COUNT = PROCESSES
    common_utils.get_cycles_per_ms = lambda: 0.0  # of delays that tests put into CUDA's streams
    torch.cuda._sleep = lambda cycles: None
    torch.cuda.synchronize = lambda *device: None
    for module in (torch.cpu, torch.accelerator):
        module.device_count = lambda: PROCESSES  # type: ignore[attr-defined]


def offered(inputs: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """AdamW's inputs without those that set an option we lack."""

    def ours(*args: Any, **kwargs: Any) -> list[Any]:
        found = inputs(*args, **kwargs)
        options = [getattr(i, "optimizer_error_input", i).kwargs for i in found]
        for given in found:
            if getattr(given, "error_type", None) is ValueError:
                given.error_regex = ""  # what is refused is torch's choice, the words are ours
        return [i for i, chosen in zip(found, options) if not LACKING.intersection(chosen)]

    return ours


def copy_of(source: str, to_cpu: bool) -> str:
    """Text of a test file that installs an optimizer first, and runs without a GPU."""
    if to_cpu:
        source = source.replace("torch.cuda.device_count()", str(PROCESSES))
        source = re.sub(r'"cuda(:\d+)?"', '"cpu"', source).replace(".cuda()", ".cpu()")
        source = re.sub(r"(import|from) (.*)\bTEST_CUDA$", r"\1 \2TEST_CUDA; TEST_CUDA = True", source, flags=re.M)
        source = source.replace("device_ids=[self.rank]", "device_ids=None")
    return f"import torch_tests\n\ntorch_tests.install()\n{source}"


def run(suite: Suite, folder: Path, optimizer: str, extra: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Outcome and reason of each test: ``passed``, ``failed`` or ``skipped``."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / Path(suite.file).name
        to_cpu = suite.distributed and not torch.accelerator.is_available()
        file.write_text(copy_of((folder / suite.file).read_text(), to_cpu))
        report = Path(place) / "report.xml"
        paths = [place, str(Path(__file__).parent), str(ROOT), str(folder), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, AS_ENVIRONMENT: optimizer, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.setdefault("DISTRIBUTED_TESTS_DEFAULT_TIMEOUT", "120")  # seconds; torch has 300
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junitxml={report}", str(file)]
        command += ["-k", suite.select] if suite.select else []
        log = Path(tempfile.gettempdir()) / f"torch_tests_{file.stem}_{optimizer}.log"
        with log.open("w") as out:
            subprocess.run([*command, *extra], cwd=place, env=environment, stdout=out, stderr=subprocess.STDOUT)
        if not report.exists():
            raise SystemExit(f"{suite.file} did not run:\n{log.read_text()[-4000:]}")
        return outcomes(xml.parse(report).getroot())


def outcomes(report: xml.Element) -> dict[str, tuple[str, str]]:
    """Read pytest's report. Names lack the optimizer's, so that runs can be compared."""
    found = {}
    for case in report.iter("testcase"):
        where = case.get("classname", "").split(".")[-1]
        name = re.sub(r"_(AdamW|FullRank|LowRank)_", "_", f"{where}.{case.get('name')}")
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "skipped" if child.tag == "skipped" else "failed"
                reason = last_error(child.text or "") or child.get("message") or ""
                reason = child.get("message") or "" if outcome == "skipped" else reason
        found[name] = (outcome, " ".join(reason.split())[:160])
    return found


def last_error(text: str) -> str:
    """The last exception that a traceback names; of several processes the first one's."""
    named = re.findall(r"^(?:E\s+)?(\w*(?:Error|Exception|Warning)\b.*)$", text, flags=re.M)
    named = [line for line in named if "Process" not in line] or named
    return named[-1] if named else ""


def exact(name: str, names: Iterable[str]) -> bool:
    """Whether no other test's name begins so: pytest leaves those out as well."""
    return not any(other != name and other.startswith(name) for other in names)


def judge(optimizer: str, test: str, outcome: str, base: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """One of KINDS, and a reason where it is not the failure's own."""
    if outcome != "failed":
        return outcome, ""
    if base.get(test, ("passed",))[0] == "failed":
        return "failed with AdamW too", base[test][1]
    why = next((why for pattern, why in EXPECTED.items() if re.search(pattern, f"{optimizer} {test}")), "")
    return ("expected", why) if why else ("failed", "")


def main() -> int:
    """Run the suites and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    installed = Path(torch.__file__).parent / "test"
    parser.add_argument("--tests", type=Path, default=installed, help="PyTorch's folder test")
    parser.add_argument("--only", default="", help="run the suites whose file has this in its path")
    parser.add_argument("pytest", nargs="*", help="passed on to pytest, after --")
    options = parser.parse_args()
    suites = [suite for suite in SUITES if options.only in suite.file]
    absent = [suite.file for suite in suites if not (options.tests / suite.file).exists()]
    if absent:
        print(f"not in {options.tests}: {', '.join(absent)}")
        version = torch.__version__.split("+")[0]
        print(f"A wheel of torch has no tests: give the folder test of PyTorch's source, v{version}, with --tests")
        return 2
    unexpected = 0
    details = []
    print(f"torch {torch.__version__}\n\n| tests | optimizer | " + " | ".join(KINDS) + " |\n" + "|---" * 7 + "|")
    for suite in suites:
        base = run(suite, options.tests, "AdamW", options.pytest)
        # Starting processes takes long: what says nothing there is not run again, and matrices stand beside vectors.
        useless = [name for name, (outcome, _) in base.items() if outcome != "passed" and suite.distributed]
        left_out = [
            f"--deselect={Path(suite.file).name}::{name.replace('.', '::')}" for name in useless if exact(name, base)
        ]
        for optimizer in ["LowRank"] if suite.distributed else OURS:
            found = {name: base[name] for name in useless}
            found.update(run(suite, options.tests, optimizer, [*options.pytest, *left_out]))
            counts: Counter[str] = Counter()
            for test, (outcome, reason) in found.items():
                kind, why = judge(optimizer, test, outcome, base)
                counts[kind] += 1
                if kind != "passed":
                    details.append((kind, optimizer, test, why or reason))
            unexpected += counts["failed"]
            print(f"| {suite.file} | {optimizer} | " + " | ".join(str(counts[k]) for k in KINDS) + " |", flush=True)
    print("\n| kind | optimizer | test | reason |\n|---|---|---|---|")
    for kind, optimizer, test, reason in details:
        print(f"| {kind} | {optimizer} | {test} | {reason.replace('|', '/')} |")
    return 1 if unexpected else 0


if __name__ == "__main__":
    raise SystemExit(main())
