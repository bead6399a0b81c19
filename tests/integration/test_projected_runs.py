"""launch/pretrain.py with ``--gradients projected``: every layout ends where one process ends, resumed or not."""

from __future__ import annotations

import pretrain
import pytest
import torch
from launching import EIGHT_STEPS, FSDP_ON_CPU, PRETRAIN, ROOT, config, flags, launch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import slow_except
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

PROJECTED = {**EIGHT_STEPS, "gradients": "projected", "grad_clipping": 0.5}
# Script, configuration, what the run must find itself to be.
RUNS = {
    "ddp": (PRETRAIN, None, "DDP on 2 ranks"),
    "fsdp2": (FSDP_ON_CPU, "fsdp2", "FSDP2 on 2 ranks"),
}


@pytest.fixture(scope="module")
def one_process(workplace):
    """The weights and the norms of one process, with batches of twice the size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the launched runs
    try:
        options = {**PROJECTED, "batch_size": 2 * PROJECTED["batch_size"]}
        assert pretrain.main(flags(workplace, "projected_one", **options)) == 0
    finally:
        torch.set_num_threads(threads)
    return workplace / "projected_one"


@pytest.fixture(scope="module")
def run(workplace):
    """Runs by name on two ranks, with a checkpoint of step 4; each started when it is first asked for."""
    done: dict[str, str] = {}

    def get(name):
        folder = workplace / f"projected_{name}"
        if name not in done:
            done[name] = start(workplace, name, folder.name, save_every=4)
        return folder, done[name]

    return get


def start(workplace, name, output, **options) -> str:
    script, file, _ = RUNS[name]
    argv = [*(config(file) if file else []), *flags(workplace, output, **{**PROJECTED, **options})]
    return launch(workplace, "torchrun", *argv, script=script)


def scalars(folder) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag.removeprefix("train/"), []).extend(event.value for event in events.Scalars(tag))
    return found


@pytest.mark.launcher
@pytest.mark.parametrize("name", slow_except(["ddp"], RUNS))
def test_two_ranks_end_where_one_process_ends(run, one_process, name):
    folder, printed = run(name)
    assert f"layout: {RUNS[name][2]}" in printed
    here, there = (load_file(f / "model.safetensors") for f in (folder, one_process))
    set_seed(7)
    begin = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    assert set(here) == set(there)
    for name, weight in here.items():
        assert (weight - there[name]).norm() < 5e-3 * (there[name] - begin[name]).norm(), name
    ours, theirs = (scalars(f) for f in (folder, one_process))
    norms = ours["lowrank/projected_grad_norm"]
    assert norms == ours["grad_norm"]
    assert norms == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert len(norms) == 8
    assert min(norms) > PROJECTED["grad_clipping"], "no clip would have been at work"


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_bit_by_bit_where_it_would_have(run, workplace, name):
    whole, _ = run(name)
    printed = start(workplace, name, f"{whole.name}_again", resume_from_checkpoint=whole / "checkpoint-4")
    assert "step      5 " in printed
    assert "step      4 " not in printed, "it began anew"
    here, there = (load_file(f / "model.safetensors") for f in (workplace / f"{whole.name}_again", whole))
    assert all(torch.equal(weight, there[name]) for name, weight in here.items())


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_goes_on_with_projected_gradients_on_other_ranks(workplace, zero2_run):
    """From a checkpoint that ZeRO-2 has written with whole ones."""
    printed = start(workplace, "ddp", "projected_moved", resume_from_checkpoint=zero2_run[0] / "checkpoint-6")
    assert "step 6: going on with what ZeRO-1/2 on 2 ranks has saved; low-rank states of 28 matrices" in printed
    assert "--resume: lowrank.gradients 'projected', and 'full' before" in printed
    assert "layout: DDP on 2 ranks" in printed
    assert "step      8 " in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layerwise": "true", "grad_clipping": 0}, "use one of them"),
        ({"rule": "fira"}, "fira"),
        ({"accumulator_dtype": "fp16"}, "lowrank.accumulator_dtype must be one of fp32, bf16, got 'fp16'"),
        ({"fp16": "true"}, "fp16 = true scales the loss"),
        (
            {
                "gradient_checkpointing": "true",
                "gradient_checkpointing_kwargs": '{"use_reentrant": true}',
            },
            """--gradient_checkpointing_kwargs '{"use_reentrant": false}'""",
        ),
        ({"optimizer": "adamw", "rank": None}, "--optimizer adamw has no subspaces: leave --gradients out"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_any_text_is_read(workplace, capfd, monkeypatch, options, message):
    monkeypatch.setattr(pretrain, "load_data", lambda *a, **k: pytest.fail("the text was read"))
    argv = flags(workplace, "refused", max_steps=1, gradients="projected", **options)
    assert pretrain.main([flag for flag in argv if not flag.endswith("=None")]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert not (workplace / "refused").exists()


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_trains_with_it(workplace, stage):
    """By its launcher on two ranks; that the weights are right is tested in ranks."""
    from launching import start as started

    config = str(ROOT / "configs" / f"zero{stage}.json")
    argv = ["--deepspeed", config, *flags(workplace, f"zero{stage}_projected", gradients="projected", max_steps=6)]
    done = started(workplace, "deepspeed", *argv)
    assert done.returncode == 0, done.stderr
    assert "layout: ZeRO" in done.stdout
