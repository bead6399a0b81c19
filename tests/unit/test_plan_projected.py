"""Plans of runs that use gradients in the backward pass: terms by hand, figures that are promised, what is refused."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from test_plan import MATRICES, REST, ROOT, TINY, WEIGHTS, zero

from ds_lowrank.cli import main
from ds_lowrank.config import LowRankConfig
from ds_lowrank.planner import advise, others_of, plan_memory, plan_setup, read_model
from ds_lowrank.planner.memory import GIB
from ds_lowrank.planner.others import GALORE, RELEASED, SPLIT
from ds_lowrank.planner.setup import Setup

R = 16
LONG = 4 * (4 * 64 + 3 * 176)  # rows of A of all matrices; all are 64 on their other side
PROJECTED = {"rank": R, "gradients": "projected"}


def planned(kind: str, ranks: int, options: dict | None = None, **given):
    config = LowRankConfig(**{**PROJECTED, **(options or {})})
    return plan_setup(read_model(TINY), config, Setup(kind, ranks, seq=32, **given).of(config))


@pytest.mark.parametrize(("dtype", "width"), [("fp32", 4), ("bf16", 2)])
def test_accumulators_by_hand(dtype, width):
    whole = width * LONG * R
    options = {"accumulator_dtype": dtype}

    def held(kind: str, ranks: int, moment: str, accumulation: int = 2, **more) -> int:
        plan = planned(kind, ranks, options, accumulation=accumulation, master="bf16", **more)
        return plan.ours.moments[moment]["accumulators"]

    assert held("one", 1, "forward") == held("one", 1, "norm") == whole
    assert held("one", 1, "forward", accumulation=1) == 0
    # Whole while passes are local, a rank's rows when the last has been reduced.
    # Of a first pass in which all were due there are rows already.
    assert held("ddp", 4, "forward") == whole + whole // 4
    assert held("ddp", 4, "norm") == whole // 4
    assert held("ddp", 4, "forward", accumulation=1) == 0
    assert held("zero2", 4, "forward") == held("zero2", 4, "norm") == whole // 4
    assert held("fsdp2", 4, "forward") == whole // 4
    assert held("fsdp2", 4, "forward", no_sync=True) == whole + whole // 4
    assert held("fsdp2", 4, "norm", copies=2) == whole // 2
    assert all(held(kind, 4, "resident") == 0 for kind in ("zero2", "zero3", "fsdp2", "ddp"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_keeps_masters_and_gradients_of_what_is_not_projected_alone(stage):
    config = {**zero(stage), "lowrank": PROJECTED}
    ours = plan_memory(TINY, 4, deepspeed=config, seq=32).ours.moments["resident"]
    full = plan_memory(TINY, 4, deepspeed=zero(stage), seq=32).ours.moments["resident"]
    assert ours["master"] == REST  # 4 bytes on 4 ranks
    assert ours["weights"] == full["weights"]
    low = 2 * 4 * R * LONG
    assert ours["states"] == (low + 8 * REST) // 4
    assert ours["gradients"] == (2 * REST // 4 if stage == 3 else 0)


def test_other_optimizers_are_given_whole_gradients():
    config = {**zero(2), "lowrank": PROJECTED}
    ours, theirs = plan_memory(TINY, 4, deepspeed=config, seq=32), plan_memory(TINY, 4, deepspeed=zero(2), seq=32)
    for name in ("AdamW", "8-bit AdamW", "GaLore unsharded"):
        assert ours.optimizers[name].moments == theirs.optimizers[name].moments
    assert ours.ours.resident < theirs.ours.resident


def test_gradients_of_a_wave_by_hand():
    """One process: eight neighbours at most are whole at once, also where all are due in one step."""
    small, large = 2 * 64 * 64, 2 * 64 * 176
    due = {}
    for stagger, wave in itertools.product((True, False), (4, 8)):
        plan = planned("one", 1, {"stagger": stagger, "wave_size": wave}, master="bf16")
        due[stagger, wave] = plan.ours.moments["wave"]["temporaries"]
    # From the end of a layer: down, up, gate, o, then v, k, q and the next layer's down.
    assert due[False, 8] - due[False, 4] == (4 * large + 4 * small) - (3 * large + small)
    assert due[True, 8] == due[False, 8]


def test_bases_that_wait_by_hand():
    """From the first pass of the first step on, in which everything is due; also of later ones without a stagger."""
    basis = 2 * 64 * R
    for stagger in (True, False):
        plan = planned("one", 1, {"stagger": stagger, "basis_dtype": "bf16"}, master="bf16", accumulation=2).ours
        assert plan.moments["resident"]["bases"] == 28 * basis
        assert plan.moments["forward"]["bases"] == plan.moments["refresh"]["bases"] == 2 * 28 * basis


def test_a_selection_that_needs_no_gradient_keeps_none():
    with_gram, drawn = (planned("one", 1, {"selection": s}, master="bf16").ours.moments for s in ("dominant", "random"))
    assert drawn["wave"]["temporaries"] < with_gram["wave"]["temporaries"] - 2 * 64 * 176


def test_sliced_bases_take_less_than_whole_ones():
    sliced, whole = (planned("ddp", 4, {"shard_projection": s}).ours.moments["resident"] for s in (True, False))
    assert 4 * sliced["bases"] == whole["bases"] == 4 * 64 * R * 28


def test_layerwise_holds_no_gradients():
    usual = planned("one", 1, {"gradients": "full"}, master="bf16").ours.moments
    ours = planned("one", 1, {"gradients": "full", "layerwise": True}, master="bf16").ours.moments
    assert usual["step"]["gradients"] == 2 * WEIGHTS
    assert ours["step"]["gradients"] == ours["layer"]["gradients"] == 0
    assert ours["resident"] == usual["resident"]
    # DDP averages and keeps what is not projected.
    ddp = planned("ddp", 4, {"gradients": "full", "layerwise": True}).ours.moments
    assert ddp["step"]["gradients"] == ddp["step"]["buckets"] == 4 * REST
    # With accumulation the first step has all in full: everything is due.
    several = planned("one", 1, {"gradients": "full", "layerwise": True}, master="bf16", accumulation=2).ours.moments
    assert several["layer"]["gradients"] == 2 * WEIGHTS


def test_copies_of_a_model_are_each_like_a_smaller_run():
    hybrid, alone = planned("fsdp2", 8, copies=2).ours, planned("fsdp2", 4).ours
    assert hybrid.moments["resident"] == alone.moments["resident"]
    assert hybrid.moments["norm"] == alone.moments["norm"]


def test_local_passes_of_fsdp2_have_whole_gradients():
    full = {"gradients": "full"}
    local = planned("fsdp2", 4, full, accumulation=2, no_sync=True).ours.moments["forward"]["gradients"]
    assert local == 2 * WEIGHTS
    assert planned("fsdp2", 4, full, accumulation=2).ours.moments["forward"]["gradients"] == WEIGHTS
    config = {"version": 2, "lowrank": PROJECTED}  # the Trainer's passes are local
    assert plan_memory(TINY, 4, fsdp_config=config, accumulation=2).setup.local_passes
    assert not plan_memory(TINY, 4, fsdp_config=config, accumulation=2, no_sync=False).setup.local_passes


def test_what_is_refused():
    with pytest.raises(ValueError, match="layerwise is not to be had under DeepSpeed"):
        planned("zero2", 2, {"gradients": "full", "layerwise": True})
    with pytest.raises(ValueError, match="offload_optimizer or offload_param"):
        plan_memory(TINY, 2, deepspeed={**zero(2, offload_optimizer={"device": "cpu"}), "lowrank": PROJECTED})
    with pytest.raises(ValueError, match="3 copies of a model are for FSDP2 and divide its ranks, got 4"):
        planned("fsdp2", 4, copies=3)
    with pytest.raises(ValueError, match="2 copies"):
        planned("ddp", 4, copies=2)
    with pytest.raises(ValueError, match="lowrank_config is for DDP and one process"):
        plan_memory(TINY, 2, deepspeed=zero(2), lowrank_config={"lowrank": PROJECTED})


def test_others_by_hand():
    plan = planned("one", 1, {"gradients": "full"}, master="bf16")
    held = {other.name: other.memory for other in others_of(read_model(TINY), plan)}
    buffers = read_model(TINY).buffer_bytes
    assert held[SPLIT].resident == held[RELEASED].resident == 5 * WEIGHTS + buffers
    assert held[SPLIT].moments["step"]["gradients"] == 2 * WEIGHTS
    assert held[RELEASED].moments["step"]["gradients"] == 2 * 512 * 64
    assert held[GALORE].moments["resident"]["bases"] == 2 * 64 * R * 28
    several = planned("one", 1, {"gradients": "full"}, master="bf16", accumulation=2)
    assert RELEASED not in {other.name for other in others_of(read_model(TINY), several)}


def test_the_command(tmp_path, capsys):
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    (tmp_path / "block.json").write_text(json.dumps({"lowrank": PROJECTED}))
    command = ["plan", "--model_config", str(tmp_path / "model.json"), "--gpus", "2", "--gpu_memory", "8"]
    block = ["--lowrank_config", str(tmp_path / "block.json"), "--accumulation", "2"]
    assert main([*command, *block, "--network", "10", "--tflops", "50"]) == 0
    shown = capsys.readouterr().out
    for text in ("accumulators", "backward: what is due", "R, reduced", "seconds at 10 Gb/s", "take gradients"):
        assert text in shown
    assert main([*command, *block, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["setup"]["gradients"] == "projected"
    assert facts["step"]["projected"]["peak"] == facts["optimizers"]["ds_lowrank"]["peak"]
    assert main([*command, *block, "--gradients", "full", "--layerwise"]) == 0
    assert "layerwise" in capsys.readouterr().out
    assert main([*command, *block, "--network", "0"]) == 2
    assert "network must be a number above 0, got 0.0" in capsys.readouterr().err


# ---- what is promised of 7B ----

SEVEN = {"rank": 1024, "state_dtype": "int8", "basis_dtype": "int8", "accumulator_dtype": "bf16"}


@pytest.fixture(scope="module")
def seven_billion():
    return read_model(ROOT / "configs" / "llama_7b.json")


def big(model, kind: str, ranks: int, options: dict, **given):
    config = LowRankConfig(**SEVEN, stochastic_rounding=True, **options)
    given = {"seq": 2048, "checkpointing": True, "master": "bf16", **given}
    return plan_setup(model, config, Setup(kind, ranks, **given).of(config))


def test_seven_billion_weights_on_one_gpu(seven_billion):
    projected = big(seven_billion, "one", 1, {"gradients": "projected"}, accumulation=4)
    layerwise = big(seven_billion, "one", 1, {"layerwise": True})
    assert projected.fits(24, margin=1)
    assert layerwise.fits(24, margin=1)
    # The baseline: bf16 weights, gradients and both moments, 8 bytes a weight.
    assert projected.ours.peak < 0.45 * projected.optimizers["AdamW"].peak
    assert layerwise.ours.peak < 0.40 * layerwise.optimizers["AdamW"].peak


def test_the_advice_is_to_project(seven_billion):
    plan = big(seven_billion, "one", 1, {"gradients": "full"})
    found = advise(seven_billion, plan.config, plan.setup, 24, margin=1)
    assert [a.changes for a in found] == [["gradients projected, added up in bf16"]]


def test_seven_billion_weights_on_eight_gpus(seven_billion):
    assert big(seven_billion, "fsdp2", 8, {"gradients": "projected"}, accumulation=4).ours.peak < 7 * GIB
    local = big(seven_billion, "fsdp2", 8, {"gradients": "projected"}, accumulation=4, no_sync=True)
    assert local.ours.peak > 7 * GIB  # whole accumulators on every rank


def test_bytes_of_a_projected_weight(seven_billion):
    """Weights, states, bases and accumulators; nothing of what is not projected."""
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = seven_billion.numel - matrices
    terms = ("weights", "states", "bases", "accumulators")
    for options, most in (({"gradients": "projected"}, 3.5), ({"layerwise": True}, 3.0)):
        plan = big(seven_billion, "one", 1, options)
        held = plan.ours.moments["norm"]
        codes = 2 * (rest + 4 * rest // 64)
        assert (sum(held[term] for term in terms) - 2 * rest - codes) / matrices < most


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_projected_plan_for_1024_ranks_takes_seconds(kind, seven_billion):
    before = time.process_time()
    master = "fp32" if kind.startswith("zero") else "bf16"
    big(seven_billion, kind, 1024, {"gradients": "projected"}, accumulation=2, master=master)
    assert time.process_time() - before < 20


def test_numbers_of_the_tiny_model():
    assert sum(s[0] * s[1] for n, s in read_model(TINY).shapes.items() if "proj" in n) == MATRICES
