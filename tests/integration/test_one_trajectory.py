"""launch/pretrain.py by every launcher and configuration: the weights that ZeRO-2 ends with.

Same seed, data and global batches; only who holds what differs. zero1.json is started by test_pretrain.py.
"""

from __future__ import annotations

import json

import pretrain
import pytest
import torch
from launching import EIGHT_STEPS, FSDP_ON_CPU, PRETRAIN, config, flags, launch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

pytestmark = pytest.mark.launcher

# Launcher, configuration, what the run must find itself to be: a layout that accelerate dropped would agree, too.
RUNS = {
    "zero3": ("deepspeed", "zero3", "ZeRO-3 on 2 ranks"),
    "zero2_offload": ("deepspeed", "zero2_offload", "ZeRO-1/2 on 2 ranks"),
    "fsdp2": ("torchrun", "fsdp2", "FSDP2 on 2 ranks"),
    "ddp": ("accelerate", None, "DDP on 2 ranks"),
}


@pytest.fixture(scope="module")
def run(workplace):
    """Runs by name, each started when it is first asked for."""
    done = {}

    def get(name):
        if name not in done:
            launcher, file, _ = RUNS[name]
            options = {**EIGHT_STEPS, **({"save_every": 4} if name == "zero3" else {})}
            argv = [*(config(file) if file else []), *flags(workplace, name, **options)]
            script = FSDP_ON_CPU if name == "fsdp2" else PRETRAIN
            done[name] = launch(workplace, launcher, *argv, script=script)
        return workplace / name, done[name]

    return get


def same_end(folder, reference):
    """Perplexity and weights of two runs agree, and the model that was saved can be loaded."""
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, reference))
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert (ours["parameters"], ours["tokens"]) == (theirs["parameters"], theirs["tokens"])
    here, there = (load_file(f / "model.safetensors") for f in (folder, reference))
    assert set(here) == set(there)
    set_seed(7)
    start = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(reference)).state_dict()
    for name, weight in here.items():  # seen: up to 5e-4 where Adam divides by the smallest gradients, else 1e-5
        assert (weight - there[name]).norm() < 5e-3 * (there[name] - start[name]).norm(), name
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in here.items())


@pytest.mark.parametrize("name", RUNS)
def test_every_layout_ends_where_zero2_ends(run, zero2_run, name):
    folder, printed = run(name)
    assert f"layout: {RUNS[name][2]}" in printed
    same_end(folder, zero2_run[0])


def test_one_process_ends_where_zero2_ends(workplace, zero2_run, capfd):
    options = {**EIGHT_STEPS, "batch_size": 2 * EIGHT_STEPS["batch_size"]}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launched runs
    try:
        assert pretrain.main(flags(workplace, "one", **options)) == 0
    finally:
        torch.set_num_threads(threads)
    assert "layout: one process on 1 rank" in capfd.readouterr().out
    same_end(workplace / "one", zero2_run[0])


def test_zero3_goes_on_from_a_checkpoint_bit_by_bit(run, workplace):
    whole, _ = run("zero3")
    options = {**EIGHT_STEPS, "resume_from_checkpoint": whole / "checkpoint-4"}
    printed = launch(workplace, "deepspeed", *config("zero3"), *flags(workplace, "resumed", **options))
    assert "step      4 " not in printed, "it began anew"
    here, there = (load_file(f / "model.safetensors") for f in (workplace / "resumed", whole))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())
