"""The planner without processes: pieces and bytes by hand, sums, what grows and shrinks, errors and advice."""

from __future__ import annotations

import gc
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tracker import Tracker
from transformers import AutoConfig, AutoModelForCausalLM

from ds_lowrank.cli import main
from ds_lowrank.config import LowRankConfig
from ds_lowrank.layouts import Piece
from ds_lowrank.layouts.cuts import chunk_piece, flat_pieces, flat_size, slice_piece, sub_groups
from ds_lowrank.planner import TERMS, advise, plan_memory, plan_setup, read_model
from ds_lowrank.planner.activations import activations, layer_bytes
from ds_lowrank.planner.formats import adamw8bit_bytes
from ds_lowrank.planner.live import live_elements
from ds_lowrank.planner.model import Decoder
from ds_lowrank.planner.setup import MOST_RANKS, Setup

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}
MATRICES = 4 * (4 * 64 * 64 + 3 * 64 * 176)
REST = 2 * 512 * 64 + 9 * 64
WEIGHTS = MATRICES + REST


def zero(stage: int, **more: object) -> dict:
    sizes = {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 0}
    return {
        "bf16": {"enabled": True},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **sizes, **more},
        "lowrank": {"rank": 16},
    }


def planned(stage: int, ranks: int = 4, more: dict | None = None, **given):
    return plan_memory(TINY, ranks, deepspeed=zero(stage, **(more or {})), seq=32, **given)


def test_pieces_by_hand():
    shapes = {"a": (3, 4), "b": (5,)}
    assert flat_size(17, 2) == 20
    assert flat_pieces(shapes, 2) == [{"a": Piece(0, 10)}, {"a": Piece(10, 12), "b": Piece(0, 5)}]
    assert flat_pieces({"a": (2,)}, 4) == [{"a": Piece(0, 2)}, {}, {}, {}]
    assert [slice_piece(10, 4, k) for k in range(4)] == [Piece(0, 4), Piece(4, 8), Piece(8, 10), Piece(10, 10)]
    assert [chunk_piece((5, 3), 0, 4, k) for k in range(4)] == [Piece(0, 6), Piece(6, 12), Piece(12, 15), Piece(15, 15)]
    assert chunk_piece((5, 8), 1, 4, 3) == Piece(6, 8, 1)
    assert sub_groups([3, 3, 3], 9) == [0, 0, 0]
    assert sub_groups([3, 3, 3], 4) == [0, 0, 1]


def test_bitsandbytes_formats_by_hand():
    assert adamw8bit_bytes(4095) == 8 * 4095
    assert adamw8bit_bytes(4097) == 2 * (4097 + 17 * 4)


def test_a_layers_activations_by_hand():
    d = Decoder(layers=1, hidden=8, inner=20, heads=2, kv_width=4, vocabulary=50)
    norms = 2 * (4 * 8 + 2 * 8 + 2 * 8 + 4)
    attention = 2 * (8 + 4 + 4 + 8) + 4 * 2
    assert layer_bytes(d, 3, 2) == 3 * (norms + attention + 4 * 2 * 20)
    kept = activations(d, 3, 2, checkpointing=False)
    assert kept.loss - kept.forward > 0
    assert activations(d, 3, 2, checkpointing=True).each == 2 * 8 * 3


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_are_those_of_a_model_that_computes(dtype, checkpointing):
    tokens = torch.randint(0, 512, (2, 64))
    with Tracker() as tracker:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY))
        model.to(torch.bfloat16 if dtype == "bf16" else torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        gc.collect()
        before = tracker.alive
        loss = model(input_ids=tokens, labels=tokens).loss
        kept = tracker.alive - before
        tracker.restart()
        loss.backward()
        peak = tracker.peak - before
    decoder = read_model(TINY).decoder
    assert decoder is not None
    plan = activations(decoder, 2 * 64, 2 if dtype == "bf16" else 4, checkpointing)
    logits = 4 * 512 * 2 * 64
    # Behind the forward pass log-softmax is left of the loss; its gradient and that of the logits come to it.
    assert kept == pytest.approx(plan.loss - 2 * logits, rel=0.03)  # cos and sin weigh in a model this small
    assert peak >= plan.loss * 0.97


def test_resident_bytes_by_hand():
    ours = planned(2).ours.moments["resident"]
    buffers = read_model(TINY).buffer_bytes
    assert ours["weights"] == 2 * WEIGHTS + buffers
    assert ours["master"] == WEIGHTS  # 4 bytes on 4 ranks
    low = 2 * 4 * 16 * 4 * (4 * 64 + 3 * 176)
    assert ours["states"] == (low + 8 * REST) // 4
    assert ours["bases"] == 4 * 16 * 64 * 28 // 4
    assert ours["gradients"] == 0
    third = planned(3).ours.moments["resident"]
    assert third["weights"] == 2 * WEIGHTS // 4 + 2 * 9 * 64 + buffers  # norms stay whole
    assert third["gradients"] == 2 * WEIGHTS // 4
    adamw = planned(2).optimizers["AdamW"].moments["resident"]
    assert adamw["states"] == 8 * WEIGHTS // 4


def test_the_galore_that_is_not_sharded_repeats_projectors_and_wide_moments():
    galore = planned(2).optimizers["GaLore unsharded"].moments["resident"]
    tall, wide = 6 * 4, 4  # square ones count as tall
    assert galore["bases"] == 4 * 64 * 64 * (tall + wide)
    sharded = 2 * 4 * 16 * (4 * (4 * 64 + 2 * 176)) // 4
    assert galore["states"] == sharded + 2 * 4 * 16 * 4 * 176 + 8 * REST // 4


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_peak_is_the_highest_moment_and_terms_add_up(stage):
    plan = planned(stage)
    for memory in plan.optimizers.values():
        assert memory.peak == max(sum(terms.values()) for terms in memory.moments.values())
        assert all(tuple(terms) == TERMS for terms in memory.moments.values())
        assert memory.peak >= memory.resident
    assert plan.to_dict()["optimizers"]["ds_lowrank"]["peak"] == plan.ours.peak


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_more_ranks_hold_less(stage):
    peaks = [planned(stage, ranks).ours for ranks in (1, 2, 4, 8)]
    assert all(a.resident > b.resident for a, b in itertools.pairwise(peaks))


def test_what_saves_memory_does():
    base = planned(2).ours.peak
    assert planned(2, checkpointing=True).ours.peak < base
    assert planned(2, state_dtype="int8").ours.resident < planned(2, state_dtype="bf16").ours.resident
    assert planned(2, master="bf16").ours.resident < planned(2).ours.resident
    blocks = -(-REST // 4 // 64)  # of what is not projected, on the first rank
    for narrow, row, rest in (
        ("fp32", 2 * 4 * 16, 8 * REST // 4),
        ("bf16", 2 * 2 * 16, 4 * REST // 4),
        ("int8", 2 * (16 + 4), 2 * (REST // 4 + 4 * blocks)),
    ):
        ours = planned(2, state_dtype=narrow).ours.moments["resident"]["states"]
        assert ours == row * (4 * 64 + 3 * 176) + rest
    offloaded = planned(2, more={"offload_optimizer": {"device": "cpu"}}).ours
    assert offloaded.resident < planned(2).ours.resident
    assert offloaded.host > 0
    assert planned(2, accumulation=2).ours.peak > base
    assert planned(2, more={"reduce_bucket_size": 100_000}).ours.peak > base


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_without_an_fp32_master_is_read_from_the_deepspeed_file(stage, tmp_path, capsys):
    bf16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    config = {**zero(stage), "bf16": bf16, "lowrank": {"rank": 16, "stochastic_rounding": True}}
    found = plan_memory(TINY, 4, deepspeed=config, seq=32)
    wide, narrow = planned(stage).ours.moments["resident"], found.ours.moments["resident"]
    assert found.setup.master == "bf16"
    assert narrow["master"] == WEIGHTS // 2  # 2 bytes on 4 ranks
    assert {t: n for t, n in narrow.items() if t != "master"} == {t: n for t, n in wide.items() if t != "master"}
    asked = planned(stage, master="bf16")
    assert asked.ours.moments == found.ours.moments
    assert any("bf16_master_weights_and_grads" in note for note in asked.notes)
    with pytest.raises(ValueError, match=r"contradicts bf16\.bf16_master_weights_and_grads"):
        plan_memory(TINY, 4, deepspeed=config, seq=32, master="fp32")
    with pytest.raises(ValueError, match="no offload_optimizer"):
        planned(stage, master="bf16", more={"offload_optimizer": {"device": "cpu"}})
    (tmp_path / "model.json").write_text(json.dumps(TINY))
    (tmp_path / "zero.json").write_text(json.dumps(config))
    command = ["plan", "--model_config", str(tmp_path / "model.json"), "--gpus", "4", "--gpu_memory", "0.001"]
    assert main([*command, "--deepspeed", str(tmp_path / "zero.json"), "--seq", "32"]) == 0
    shown = capsys.readouterr().out
    assert "no fp32 master" in shown
    assert "offload" not in shown


def test_other_frameworks():
    fsdp = plan_memory(TINY, 4, fsdp_config={"version": 2, "lowrank": {"rank": 16}}, seq=32)
    assert fsdp.ours.moments["resident"]["weights"] == 4 * WEIGHTS // 4 + read_model(TINY).buffer_bytes
    ddp = plan_memory(TINY, 4, rank=16, seq=32)
    assert ddp.setup.kind == "ddp"
    assert ddp.ours.moments["resident"]["buckets"] == 4 * WEIGHTS
    assert plan_memory(TINY, 1, rank=16).setup.kind == "one"


def test_whole_parameters_of_stage_3():
    model = read_model(TINY)
    few = live_elements(model, Setup("zero3", 4, prefetch_bucket=0, max_live=0, max_reuse=0, persistence=100))
    assert few.turn == 0
    assert few.forward == 512 * 64  # the embedding, then the head
    many = live_elements(model, Setup("zero3", 4, prefetch_bucket=10**6, persistence=100))
    assert many.forward >= WEIGHTS - 9 * 64
    assert live_elements(model, Setup("zero3", 1)).forward == 0


def test_formats_are_the_blocks_unless_others_are_asked_for():
    narrow = {**zero(2), "lowrank": {"rank": 16, "state_dtype": "int8", "basis_dtype": "bf16"}}
    plan = plan_memory(TINY, 4, deepspeed=narrow, seq=32)
    assert plan.ours.peak == planned(2, state_dtype="int8", basis_dtype="bf16").ours.peak
    asked = plan_memory(TINY, 4, deepspeed=narrow, seq=32, state_dtype="fp32", basis_dtype="fp32")
    assert asked.ours.resident == planned(2).ours.resident > plan.ours.resident


# What a step, one with refreshes, the solver, states and bases took when a plan went through the ranks one by one.
ODD = {
    **TINY,
    "hidden_size": 60,
    "intermediate_size": 171,
    "vocab_size": 509,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 5,
}


@pytest.mark.parametrize(
    ("kind", "ranks", "state_dtype", "expected"),
    [
        ("zero1", 7, "fp32", (3, 188640, 242400, 28800, 103600, 7200)),
        ("zero2", 3, "int8", (1, 415800, 415800, 0, 74360, 10560)),
        ("zero2", 7, "int8", (3, 188640, 242400, 28800, 31156, 3600)),
        ("zero3", 3, "fp32", (0, 612000, 426240, 0, 244960, 19200)),
        ("zero3", 7, "int8", (4, 312160, 217040, 28800, 31922, 4400)),
        ("fsdp2", 3, "int8", (0, 334800, 149040, 0, 74008, 9600)),
        ("fsdp2", 7, "int8", (4, 186780, 98640, 28800, 32606, 4400)),
        ("ddp", 3, "int8", (0, 1496896, 599296, 0, 74016, 9600)),
        ("ddp", 7, "fp32", (1, 1440016, 549856, 0, 105664, 8800)),
    ],
)
def test_uneven_cuts(kind, ranks, state_dtype, expected):
    given: dict = {"fsdp_config": {"version": 2}} if kind == "fsdp2" else {}
    if kind.startswith("zero"):
        given = {"deepspeed": zero(int(kind[4]))}
    formats = {"state_dtype": state_dtype, "basis_dtype": "bf16" if state_dtype == "int8" else "fp32"}
    ours = plan_memory(ODD, ranks, rank=8, seq=32, **formats, **given).ours
    at = ours.moments
    found = (at["step"]["temporaries"], at["refresh"]["temporaries"], ours.solver)
    assert (ours.rank, *found, at["resident"]["states"], at["resident"]["bases"]) == expected


def test_under_ddp_moments_of_what_is_not_projected_are_shared_out():
    """Of the embedding and the head, 512 x 64 each, and of norms; their new weights are on their way in each step."""
    alone, *others = (plan_memory(TINY, ranks, rank=4, seq=32) for ranks in (1, 2, 4))
    rest = 2 * 4 * (2 * 512 * 64)
    for ranks, plan in zip((2, 4), others):
        assert plan.ours.moments["resident"]["states"] == pytest.approx(
            alone.ours.moments["resident"]["states"] / ranks, rel=0.01
        )
        assert plan.ours.moments["step"]["temporaries"] > (ranks + 1) / ranks * rest / 2
        # Nobody else deals them.
        whole = [p.optimizers["GaLore unsharded"].moments["resident"]["states"] for p in (alone, plan)]
        assert whole[0] == whole[1] > rest


@pytest.fixture(scope="module")
def seven_billion():
    return read_model(ROOT / "configs" / "llama_7b.json")


@pytest.fixture(scope="module")
def importing_torch():
    """CPU seconds, to measure others by."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_a_plan_for_1024_ranks_takes_no_longer_than_importing_torch(kind, seven_billion, importing_torch):
    setup = Setup(kind, 1024, seq=2048)
    before = time.process_time()
    plan_setup(seven_billion, LowRankConfig(rank=1024), setup)
    assert time.process_time() - before < max(importing_torch, 1.0)


def test_the_most_ranks():
    with pytest.raises(ValueError, match=f"ranks must be at most {MOST_RANKS}"):
        plan_memory(TINY, MOST_RANKS + 1, rank=4)


def test_errors():
    with pytest.raises(FileNotFoundError, match="no_such"):
        plan_memory("no_such.json", 2, rank=4)
    with pytest.raises(ValueError, match="no rank: set"):
        plan_memory(TINY, 2, deepspeed={"zero_optimization": {"stage": 2}})
    with pytest.raises(ValueError, match="model_type"):
        plan_memory({"hidden_size": 4}, 2, rank=4)
    with pytest.raises(ValueError, match="cannot build the model"):
        plan_memory({"model_type": "no_such_kind"}, 2, rank=4)
    with pytest.raises(ValueError, match="not both"):
        plan_memory(TINY, 2, deepspeed=zero(2), fsdp_config={"version": 2}, rank=4)
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        plan_memory(TINY, 2, rank=4, state_dtype="fp8")
    with pytest.raises(ValueError, match="ranks must be"):
        plan_memory(TINY, 0, rank=4)
    with pytest.raises(ValueError, match="BF16_Optimizer"):
        plan_memory(TINY, 2, deepspeed={**zero(1), "data_types": {"grad_accum_dtype": "fp32"}})
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        plan_memory(TINY, 2, deepspeed={**zero(2), "lowrank": {"rnk": 4}}, rank=4)


def test_fits_and_the_advice():
    plan, model = planned(2), read_model(TINY)
    enough, short = plan.ours.peak / 2**30 * 1.01, plan.ours.peak / 2**30 * 0.9
    assert plan.fits(enough)
    assert not plan.fits(enough, margin=enough / 2)
    assert advise(model, plan.config, plan.setup, enough) == []
    found = advise(model, plan.config, plan.setup, short)
    assert found
    assert all(a.plan.fits(short) for a in found)
    assert ["offload_optimizer to the CPU"] in [a.changes for a in found]
    assert advise(model, plan.config, plan.setup, 1e-6) == []


def test_several_changes_together_where_none_is_enough():
    plan, model = planned(2), read_model(TINY)
    single = [a.plan.ours.peak for a in advise(model, plan.config, plan.setup, plan.ours.peak / 2**30 * 0.99)]
    together = advise(model, plan.config, plan.setup, min(single) / 2**30 * 0.95)
    assert len(together) == 1
    assert len(together[0].changes) > 1
    assert together[0].plan.ours.peak < min(single)


def test_the_command(tmp_path, capsys):
    config, deepspeed = tmp_path / "tiny.json", tmp_path / "zero2.json"
    config.write_text(json.dumps(TINY))
    deepspeed.write_text(json.dumps(zero(2)))
    flags = ["plan", "--model_config", str(config), "--gpus", "4", "--deepspeed", str(deepspeed), "--seq", "32"]
    assert main([*flags, "--gpu_memory", "24", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["fits"] is True
    assert facts["optimizers"]["ds_lowrank"]["peak"] == planned(2).ours.peak
    assert main([*flags, "--gpu_memory", "0.0001", "--margin", "0", "--state_dtype", "int8"]) == 0
    shown = capsys.readouterr().out
    assert "ds_lowrank" in shown
    assert "nothing that is known here" in shown
    assert main([*flags, "--gpu_memory", "24", "--rank", "0"]) == 2
    assert "rank" in capsys.readouterr().err
