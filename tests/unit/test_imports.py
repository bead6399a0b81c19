"""What ``import ds_lowrank`` loads, and how long it takes."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import ds_lowrank

# Beside the standard library and what ``import torch`` has loaded.
OURS = {"ds_lowrank"}
# DTensors bring sympy, distributed checkpoints their own parts of torch.
DTENSORS = OURS | {"torch", "sympy", "mpmath"}
STAGES = [
    ("import ds_lowrank", OURS),
    ("ds_lowrank.by_hand_is_refused", OURS),
    ("ds_lowrank.describe", OURS | {"rich"}),
    ("ds_lowrank.long_side_placement", DTENSORS),
    ("ds_lowrank.load_checkpoint", DTENSORS | {"safetensors", "zstandard", "_remote_module_non_scriptable"}),
]
PROGRAM = """
import json, sys, types
import torch
seen = set(sys.modules)

def stage(name):
    new = {module.partition(".")[0] for module in set(sys.modules) - seen} - set(sys.stdlib_module_names)
    seen.update(sys.modules)
    print(json.dumps([name, sorted(new), "torch._dynamo" in sys.modules]))

import ds_lowrank
stage("import ds_lowrank")

# What TrainingArguments with a DeepSpeed configuration leave behind; nothing of ours for the Trainer was imported.
class HfTrainerDeepSpeedConfig: pass
found = HfTrainerDeepSpeedConfig()
fake = types.ModuleType("transformers.integrations.deepspeed")
fake._hf_deepspeed_config_weak_ref = lambda: found
sys.modules["transformers.integrations.deepspeed"] = fake
seen.add("transformers.integrations.deepspeed")
try:
    ds_lowrank.LowRankAdamW([])
except ValueError as error:
    assert "does not reach a Trainer" in str(error), error
    stage("ds_lowrank.by_hand_is_refused")
for name in ("describe", "long_side_placement", "load_checkpoint"):
    getattr(ds_lowrank, name)
    stage(f"ds_lowrank.{name}")
"""
TIMES = """
import time
begin = time.process_time()
import torch
torch_alone = time.process_time() - begin
import ds_lowrank
print((time.process_time() - begin) / torch_alone)
"""


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


def test_what_is_loaded():
    answers = [json.loads(line) for line in run(PROGRAM).splitlines()]
    assert [name for name, _, _ in answers] == [name for name, _ in STAGES]
    for (name, loaded, dynamo), (_, allowed) in zip(answers, STAGES):
        assert set(loaded) <= allowed, name
        assert not dynamo or "torch" in allowed, name


def test_it_takes_little_longer_than_torch():
    """1.07 on the machine where it was written; 5 with Transformers' Trainer, datasets and pandas."""
    assert statistics.median(float(run(TIMES)) for _ in range(3)) <= 1.3


def test_every_public_name_is_there_and_known_to_type_checkers():
    late = ds_lowrank._LATE
    tree = ast.parse(Path(ds_lowrank.__file__).read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name))
    assert {alias.name: n.module for n in checked.body for alias in n.names} == {
        name: f"ds_lowrank.{module}" for name, module in late.items()
    }
    assert set(late) <= set(ds_lowrank.__all__) <= set(dir(ds_lowrank))
    assert [name for name in ds_lowrank.__all__ if not hasattr(ds_lowrank, name)] == []
    assert callable(ds_lowrank.param_groups)  # and not the module of that name
