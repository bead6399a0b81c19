"""launch/pretrain.py by every launcher and configuration: the weights that ZeRO-2 ends with. One of each is not slow.

Same seed, data and global batches; only who holds what differs. zero1.json is started by test_pretrain.py.
"""

from __future__ import annotations

import json

import pretrain
import pytest
import torch
from launching import EIGHT_STEPS, FSDP_ON_CPU, PRETRAIN, ROOT, config, flags, launch
from safetensors.torch import load_file
from tiers import slow_except
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

pytestmark = pytest.mark.launcher
CONFIGS = ROOT / "configs"

# Launcher, configuration, what the run must find itself to be: a layout that accelerate dropped would agree, too.
RUNS = {
    "zero3": ("deepspeed", "zero3", "ZeRO-3 on 2 ranks"),
    "zero2_offload": ("deepspeed", "zero2_offload", "ZeRO-1/2 on 2 ranks"),
    "fsdp2": ("torchrun", "fsdp2", "FSDP2 on 2 ranks"),
    "ddp": ("accelerate", None, "DDP on 2 ranks"),
    "accelerate_zero2": ("accelerate_zero2.yaml", None, "ZeRO-1/2 on 2 ranks"),
    "accelerate_zero3": ("accelerate_zero3.yaml", None, "ZeRO-3 on 2 ranks"),
    "accelerate_fsdp2": ("accelerate_fsdp2.yaml", None, "FSDP2 on 2 ranks"),
}


@pytest.fixture(scope="module")
def run(workplace):
    """Runs by name, each started when it is first asked for."""
    done: dict[str, str | None] = {}

    def get(name):
        if name not in done:
            launcher, file, _ = RUNS[name]
            options = {**EIGHT_STEPS, **({"save_every": 4} if name in ("zero3", "fsdp2", "ddp") else {})}
            argv = [*(config(file) if file else []), *flags(workplace, name, **options)]
            script = FSDP_ON_CPU if name.endswith("fsdp2") else PRETRAIN
            done[name] = None
            done[name] = launch(workplace, launcher, *argv, script=script)
        assert done[name] is not None, f"the run of {name} has failed before"
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


@pytest.mark.parametrize("name", slow_except(["fsdp2", "ddp"], RUNS))
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero3", "fsdp2", "ddp"])
def test_a_resumed_run_ends_bit_by_bit_where_it_would_have(run, workplace, name):
    whole, _ = run(name)
    printed = resumed(workplace, name, f"{name}_again", whole / "checkpoint-4")
    assert "going on with what" not in printed, "the Trainer can load it by itself"
    same_weights(workplace / f"{name}_again", whole)


@pytest.mark.slow
def test_one_run_moves_from_zero2_to_fsdp2_to_zero3(workplace, zero2_run):
    """And FSDP2's sharded checkpoints, on the way, are native to it."""
    sharded = {**json.loads((CONFIGS / "fsdp2.json").read_text()), "state_dict_type": "SHARDED_STATE_DICT"}
    (workplace / "sharded.json").write_text(json.dumps(sharded))
    argv = ["--fsdp_config", str(workplace / "sharded.json")]
    printed = resumed(workplace, "fsdp2", "moved", zero2_run[0] / "checkpoint-4", argv, save_every=2)
    assert "step 4: going on with what ZeRO-1/2 on 2 ranks has saved; low-rank states of 28 matrices" in printed
    assert "layout: FSDP2 on 2 ranks" in printed
    same_end(workplace / "moved", zero2_run[0])

    here = workplace / "moved" / "checkpoint-6"
    assert "going on with what" not in resumed(workplace, "fsdp2", "moved_again", here, argv)
    same_weights(workplace / "moved_again", workplace / "moved")

    printed = resumed(workplace, "zero3", "moved_to_zero3", here)
    assert "step 6: going on with what FSDP2 on 2 ranks has saved; low-rank states of 28 matrices" in printed
    same_end(workplace / "moved_to_zero3", zero2_run[0])


@pytest.mark.slow
def test_a_run_of_two_zero3_ranks_goes_on_in_one_process(run, workplace, zero2_run, capfd):
    options = {**EIGHT_STEPS, "batch_size": 2 * EIGHT_STEPS["batch_size"]}
    options["resume_from_checkpoint"] = run("zero3")[0] / "checkpoint-4"
    assert pretrain.main(flags(workplace, "moved_to_one", **options)) == 0
    assert "step 4: going on with what ZeRO-3 on 2 ranks has saved" in capfd.readouterr().out
    same_end(workplace / "moved_to_one", zero2_run[0])


def resumed(workplace, name, output, checkpoint, argv=None, **options):
    """What a run prints that goes on with a checkpoint."""
    launcher, file, _ = RUNS[name]
    argv = argv or (config(file) if file else [])
    options = {**EIGHT_STEPS, "resume_from_checkpoint": checkpoint, **options}
    script = FSDP_ON_CPU if name == "fsdp2" else PRETRAIN
    printed = launch(workplace, launcher, *argv, *flags(workplace, output, **options), script=script)
    step = int(checkpoint.name.split("-")[1])
    assert f"step      {step + 1} " in printed
    assert f"step      {step} " not in printed, "it began anew"
    return printed


def same_weights(folder, reference):
    here, there = (load_file(f / "model.safetensors") for f in (folder, reference))
    assert set(here) == set(there)
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())
