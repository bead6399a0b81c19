"""Rules and selections of a user's own: files outside the package, imported by path or by name."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import HfArgumentParser

import ds_lowrank
from ds_lowrank.registry import import_methods
from ds_lowrank.rules import RULES
from ds_lowrank.selections import SELECTIONS

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from arguments import LowRankArguments, parse_arguments

ROOT = Path(__file__).resolve().parents[2]
LION, AXES = (str(ROOT / "tests" / "data" / "outside" / f"{name}.py") for name in ("lion", "axes"))
BLOCK = {"rank": 32, "rule": "lion", "selection": "axes", "state_dtype": "int8"}


@pytest.mark.parametrize("file", [LION, AXES])
def test_a_method_is_one_file_of_thirty_lines(file):
    text = Path(file).read_text()
    assert len(text.splitlines()) <= 30
    assert "distributed" not in text


@pytest.mark.parametrize(("title", "file"), [("Add a rule", LION), ("Add a selection", AXES)])
def test_it_is_the_example_of_contributing(title, file):
    section = (ROOT / "CONTRIBUTING.md").read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert block == Path(file).read_text()


def test_a_file_is_imported_once_and_says_what_it_is():
    import_methods([LION, AXES])
    rule = type(RULES.make("lion"))
    import_methods([os.path.relpath(LION)])
    assert type(RULES.make("lion")) is rule
    assert ds_lowrank.LowRankConfig(**BLOCK).rule == "lion"
    assert "axes" in SELECTIONS


@pytest.mark.parametrize(
    ("source", "message"),
    [("nowhere.py", "--import nowhere.py: no such file"), ("no_such_module", "a file is named with its .py")],
)
def test_what_cannot_be_imported_is_told(source, message):
    with pytest.raises(ValueError, match=message):
        import_methods([source])


def test_a_file_that_takes_a_name_of_the_package_is_refused_every_time(tmp_path):
    taken = tmp_path / "taken.py"
    taken.write_text(Path(LION).read_text().replace('"lion"', '"adamw"'))
    for _ in range(2):
        with pytest.raises(ValueError, match="there is a rule 'adamw' already"):
            import_methods([str(taken)])


def test_the_command_line_knows_them_after_import(tmp_path):
    """In a process of its own, in which nothing has been imported yet."""
    import_methods([LION, AXES])
    model = nn.Linear(24, 40, bias=False)
    optimizer = ds_lowrank.build_optimizer(model, {"rank": 4, **{k: v for k, v in BLOCK.items() if k != "rank"}})
    model.weight.grad = torch.randn(40, 24)
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    files = {}
    for rule in ("lion", "adamw"):
        files[rule] = tmp_path / f"{rule}.json"
        content = json.loads((ROOT / "configs" / "zero2.json").read_text())
        files[rule].write_text(json.dumps({**content, "lowrank": {**BLOCK, "rule": rule}}))
    plan = ["plan", "--model_config", str(ROOT / "configs" / "llama_9m.json"), "--gpus", "2", "--gpu_memory", "8"]
    plan += ["--json", "--deepspeed"]
    imports = ["--import", LION, "--import", AXES]
    calls = [[*plan, str(files["lion"])], ["inspect", str(tmp_path)]]
    calls += [[*plan, str(files[rule]), *imports] for rule in files] + [["inspect", str(tmp_path), "--json", *imports]]
    calls += [[*plan, str(files["adamw"]), *imports, "--rule", "lion"]]
    program = f"""
import contextlib, io, json
from ds_lowrank.cli import main
for call in {calls!r}:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(call)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(said) == len(calls), done.stderr
    unknown, unread, lion, adamw, shown, asked = said
    assert (unknown[0], unread[0]) == (2, 2)
    assert "must be one of adamw" in unknown[2]
    assert "momentum" in unread[2]
    assert "import what registers it first" in unread[2]
    assert [code for code, *_ in (lion, adamw, shown)] == [0, 0, 0]
    states = []
    for _, out, _ in (lion, adamw):
        states.append(json.loads(out)["optimizers"]["ds_lowrank"]["moments"]["resident"]["states"])
    # Lion keeps one moment of two: 4 layers of (4 · 128 + 3 · 352) rows of A on two ranks, 32 codes and a scale each.
    assert states[1] - states[0] == 4 * (4 * 128 + 3 * 352) * (32 + 4) // 2
    assert "momentum" in shown[1]
    assert json.loads(asked[1])["optimizers"] == json.loads(lion[1])["optimizers"]


def test_the_script_imports_them_before_it_reads_the_block():
    _, _, options, _ = parse_arguments(["--import", LION, AXES, "--rule", "lion", "--selection", "axes"])
    assert (options["rule"], options["selection"]) == ("lion", "axes")
    assert "methods" not in options


@pytest.mark.parametrize("imports", [["--import", LION, AXES], ["--import", LION, "--import", AXES]])
def test_the_script_takes_several_files_at_once_and_one_by_one(imports):
    (parsed,) = HfArgumentParser(LowRankArguments).parse_args_into_dataclasses(imports)
    assert parsed.methods == [LION, AXES]
