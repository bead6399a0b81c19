"""What a step sends: the formulas that benchmarks/communication.py counts, AdamW's by hand, and which way to take."""

from __future__ import annotations

import communication
import pytest
from test_plan import ROOT, TINY, WEIGHTS

from ds_lowrank.config import LowRankConfig
from ds_lowrank.planner import Setup, compare, plan_setup, read_model, verdict
from ds_lowrank.planner.arrangement import arrange
from ds_lowrank.planner.wire import BASES, COPIES, GRADIENTS, PURPOSES, REFRESHES, ROWS, N, R, our_traffic
from ds_lowrank.planner.wire import WEIGHTS as GATHERED

RANK, GAP = 16, 10
# All are 64 on their other side.
MATRICES = [(64, 64)] * 4 + [(176, 64)] * 2 + [(64, 176)]
LONG = 4 * (4 * 64 + 3 * 176)


def traffic(kind: str, ranks: int, options: dict | None = None, **given):
    config = LowRankConfig(**{"rank": RANK, "update_proj_gap": GAP, "gram_dtype": "float32", **(options or {})})
    setup = Setup(kind, ranks, seq=32, **{"communication_dtype": "fp32", **given}).of(config)
    model = read_model(TINY)
    return our_traffic(model, arrange(model, config, setup), setup, config).sent


@pytest.mark.parametrize(("layout", "ranks"), [("ddp", 2), ("ddp", 4), ("zero3", 2), ("fsdp2", 4), ("hsdp", 4)])
def test_full_gradients_are_counted_as_the_benchmark_counts_them(layout, ranks):
    """Its formulas are held against the bytes that runs have sent."""
    found = traffic(layout.replace("hsdp", "fsdp2"), ranks, copies=2 if layout == "hsdp" else 1)
    formula = communication.expected_bytes(layout, ranks, [MATRICES] * 4, RANK)
    per_rank = {purpose: count / ranks for purpose, count in formula.items()}
    assert found.get(ROWS, 0) == pytest.approx(per_rank["gradient rows"] + per_rank["updates"])
    assert found[BASES] == pytest.approx(per_rank["bases joined"])
    once = per_rank["Gram matrices"] + per_rank["bases"] + per_rank["overlaps"]
    assert found[REFRESHES] == pytest.approx(once / GAP)
    if layout == "ddp":
        assert found[GATHERED] == pytest.approx(per_rank["weights"])


def test_adamw_by_hand():
    def adamw(kind: str, **given):
        config = LowRankConfig(rank=RANK)
        setup = Setup(kind, 4, seq=32, **given).of(config)
        model = read_model(TINY)
        return compare(model, plan_setup(model, config, setup)).adamw.sent

    part = 3 / 4
    assert adamw("ddp", master="bf16", accumulation=4) == {GRADIENTS: 2 * 2 * WEIGHTS * part}
    assert adamw("zero1", accumulation=4) == {GRADIENTS: 2 * 2 * WEIGHTS * part, GATHERED: 2 * WEIGHTS * part}
    assert adamw("zero2", accumulation=4)[GRADIENTS] == 4 * 2 * 2 * WEIGHTS * part
    # FSDP2 gathers weights twice a micro-step, once where they stay.
    assert adamw("fsdp2") == {GRADIENTS: 2 * WEIGHTS * part, GATHERED: 2 * 2 * WEIGHTS * part}
    assert adamw("fsdp2", reshard=False)[GATHERED] == 2 * WEIGHTS * part
    hybrid = adamw("fsdp2", copies=2)
    assert hybrid[COPIES] == 2 * 2 * WEIGHTS / 2 * 1 / 2
    assert hybrid[GRADIENTS] == 2 * WEIGHTS / 2


@pytest.mark.parametrize(("kind", "passes"), [("ddp", 1), ("zero2", 4), ("fsdp2", 4)])
def test_projections_by_hand(kind, passes):
    options = {"gradients": "projected", "shard_projection": False}
    found = traffic(kind, 4, options, accumulation=4, master="fp32", dtype="fp32")
    low = 4 * LONG * RANK * 3 / 4
    # In the pass that gives a basis averaged rows of the gradient go in the place of R.
    assert found[R] == pytest.approx(low * (passes - (1 / GAP if passes > 1 else 0)))
    assert found.get(N, 0) == (0 if kind == "fsdp2" else low)
    assert BASES not in found
    numbers = sum(m * n for m, n in MATRICES) * 4
    once = communication.expected_bytes("ddp", 4, [MATRICES] * 4, RANK)["Gram matrices"] / 4
    basis = 28 * 64 * RANK * 4 * (4 - 1 / 4) / 4
    assert found[REFRESHES] == pytest.approx((4 * numbers * 3 / 4 + once + basis) / GAP)


def test_sliced_bases_are_joined_in_every_pass_and_in_the_step():
    sent = {a: traffic("ddp", 4, {"gradients": "projected"}, accumulation=a)[BASES] for a in (1, 4)}
    assert sent[1] == 2 * 28 * 4 * 64 * RANK * 3 / 4
    assert sent[4] == 2.5 * sent[1]


def test_projected_matrices_send_their_share_of_what_full_ones_do():
    """Both directions together, at the same wire dtype: r / short, and what refreshes need."""
    model = read_model(ROOT / "configs" / "llama_60m.json")
    for kind in ("ddp", "zero2"):
        config = LowRankConfig(rank=128, update_proj_gap=200, shard_projection=False, gradients="projected")
        setup = Setup(kind, 4, seq=32, dtype="fp32", communication_dtype="fp32").of(config)
        arrangement = arrange(model, config, setup)
        sent = our_traffic(model, arrangement, setup, config).sent
        matrices = sum(p.long * p.short for p in arrangement.plans)
        full = 4 * matrices * 2 * 3 / 4
        assert (sent[R] + sent[N]) / full < 1.05 * 128 / 512
        assert (sent[R] + sent[N] + sent[REFRESHES]) / full < 1.05 * (128 / 512 + 2 / 200)


def test_products_by_hand():
    model = read_model(TINY)
    product = sum(2 * m * n * RANK for m, n in MATRICES) * 4

    def flops(kind: str, gradients: str) -> float:
        config = LowRankConfig(rank=RANK, gradients=gradients)
        setup = Setup(kind, 4, seq=32, accumulation=3).of(config)
        return our_traffic(model, arrange(model, config, setup), setup, config).flops

    assert flops("ddp", "full") == pytest.approx(2 * product / 4)
    assert flops("ddp", "projected") == pytest.approx(3 * product + product)
    assert flops("fsdp2", "projected") == pytest.approx(3 * product + product / 4)


def test_one_process_sends_nothing():
    assert traffic("one", 1) == traffic("one", 1, {"gradients": "projected"}) == {}
    assert len(set(PURPOSES)) == len(PURPOSES)


@pytest.fixture(scope="module")
def compared():
    model = read_model(ROOT / "configs" / "llama_1b.json")
    config = LowRankConfig(rank=512, gradients="projected", shard_projection=False)
    setup = Setup("ddp", 8, seq=1024, master="bf16", communication_dtype="bf16").of(config)
    return compare(model, plan_setup(model, config, setup))


def test_the_verdict(compared):
    full, projected = (way.plan.ours.peak / 2**30 for way in (compared.full, compared.projected))
    assert projected < full
    assert verdict(compared, (full + projected) / 2).startswith("take gradients projected: full does not fit")
    assert verdict(compared, projected / 2).startswith("neither fits; projected needs")
    # Where both fit it depends on what is slow.
    saved = compared.full.traffic.bytes - compared.projected.traffic.bytes
    extra = compared.projected.traffic.flops - compared.full.traffic.flops
    even = saved * 8 / 1e9 / (extra / 1e12)
    assert verdict(compared, 80, network=even * 0.9, tflops=1).startswith("take gradients projected: projected sends")
    assert verdict(compared, 80, network=even * 1.1, tflops=1).startswith("take full: projected sends")
    assert f"less than {even:.2f} Gb/s a rank for each TFLOP/s" in verdict(compared, 80)
    assert f"less than {2 * even:.1f} Gb/s a rank" in verdict(compared, 80, tflops=2)
    assert "more than 2.0 TFLOP/s" in verdict(compared, 80, network=2 * even)


def test_the_verdict_where_projecting_cannot_be_had():
    model = read_model(TINY)
    config = LowRankConfig(rank=RANK, rule="fira")
    found = compare(model, plan_setup(model, config, Setup("ddp", 2, seq=32).of(config)))
    assert found.projected is None
    assert "rule 'fira' needs the gradient itself" in verdict(found, 24)


def test_seconds():
    found = compare(read_model(TINY), plan_setup(read_model(TINY), LowRankConfig(rank=4), Setup("ddp", 2))).adamw
    assert found.seconds(8) == pytest.approx(found.bytes / 1e9)
