"""LowRankAdamW on one process: against the reference, and through gradients that break optimizers."""

import copy
import gc
import io
import logging
import weakref

import pytest
import torch
from equivalence import anchor_row
from torch import nn

import ds_lowrank
from ds_lowrank import LowRankAdamW
from ds_lowrank.optimizer import STATE_KEY
from ds_lowrank.reference import Reference

SHAPES = {"tall": (24, 10), "wide": (9, 31), "square": (13, 13)}
ADAMW = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def parameters(dtype=torch.float32):
    return {name: nn.Parameter(torch.randn(shape).to(dtype) * 0.1) for name, shape in SHAPES.items()}


def make(params, **options):
    adamw = {**ADAMW, **{k: options.pop(k) for k in list(options) if k in ADAMW}}
    group = {"params": list(params.items()), "rank": 4, "update_proj_gap": 4}
    return LowRankAdamW([group], **adamw, gram_dtype="float64", wave_size=1, **options)


def states(optimizer):
    return optimizer.state[STATE_KEY]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("moments", ["keep", "project"])
@pytest.mark.parametrize("selection", ["dominant", "importance", "uniform", "random"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
def test_equals_the_reference(dtype, moments, selection, proj_type):
    params = parameters(dtype)
    options = {"selection": selection, "moments": moments, "proj_type": proj_type, "scale": 0.5}
    optimizer = make(params, **options)
    weights = {n: p.detach().clone() for n, p in params.items()}
    start = {n: w.clone() for n, w in weights.items()}
    del options["proj_type"]
    reference = Reference(weights, dict.fromkeys(weights, 4), gap=4, wave_size=1, side=proj_type, **ADAMW, **options)
    for _ in range(10):
        for name, p in params.items():
            p.grad = torch.randn(SHAPES[name], dtype=dtype)
        optimizer.step()
        reference.step({n: p.grad for n, p in params.items()})
    for name, p in params.items():
        moved = (weights[name] - start[name]).norm()
        assert (p - weights[name]).norm() / moved < (1e-11 if dtype == torch.float64 else 2e-5)
        assert states(optimizer)[name]["refreshes"] >= 3


def test_the_reference_is_galore():
    """Anchored outside: dominant with keep reproduces galore-torch's GaLoreAdamW over three refreshes."""
    pytest.importorskip("galore_torch")
    row = anchor_row()
    assert row["refreshes"] == 3
    assert row["deviation"] < 1e-5


def test_the_update_has_the_rank_of_the_subspace_and_every_weight_moves():
    params = parameters()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = make(params, weight_decay=0.0)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in params.items():
        moved = p.detach() - before[name]
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) == 4
        assert (moved != 0).all()


def test_full_rank_groups_are_torchs_adamw():
    ours, theirs = (nn.Parameter(torch.ones(5, 3)) for _ in range(2))
    low = nn.Parameter(torch.randn(8, 8))
    optimizer = LowRankAdamW([{"params": [("low", low)], "rank": 2}, {"params": [("full", ours)]}], **ADAMW)
    peer = torch.optim.AdamW([theirs], **ADAMW)
    for _ in range(5):
        ours.grad = torch.randn(5, 3)
        theirs.grad, low.grad = ours.grad.clone(), torch.randn(8, 8)
        optimizer.step()
        peer.step()
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_matrix_has_no_basis_until_it_has_a_gradient():
    """Zero gradients (DCP's and DeepSpeed's fake steps) leave no trace; the first real one starts the clock."""
    late, early = parameters(), parameters()
    for name, p in early.items():
        p.data.copy_(late[name].data)
    first, second = make(late), make(early)
    for _ in range(3):
        for p in late.values():
            p.grad = torch.zeros_like(p)
        first.step()
    assert all(torch.equal(late[n], early[n]) for n in SHAPES)
    assert all(s["step"] == 0 and s["refreshes"] == 0 for s in states(first).values())
    for _ in range(6):
        for name, p in late.items():
            p.grad = torch.randn_like(p)
            early[name].grad = p.grad.clone()
        first.step()
        second.step()
    assert all(torch.equal(late[n], early[n]) for n in SHAPES)


def test_a_zero_gradient_at_a_refresh_keeps_the_basis():
    params = parameters()
    optimizer = make(params, stagger=False)
    for step in range(5):
        for p in params.values():
            p.grad = torch.zeros_like(p) if step == 4 else torch.randn_like(p)
        before = {n: s["basis"].clone() for n, s in states(optimizer).items()} if step else {}
        optimizer.step()
    for name, state in states(optimizer).items():
        assert torch.equal(state["basis"], before[name])
        assert (state["step"], state["refreshes"]) == (5, 1)


def test_a_nan_gradient_at_the_first_step_changes_nothing_and_is_reported_once(caplog):
    params = parameters()
    before = {n: p.detach().clone() for n, p in params.items()}
    optimizer = make(params)
    for p in params.values():
        p.grad = torch.full_like(p, float("nan"))
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    assert len(caplog.records) == 1
    assert all(torch.equal(p, before[n]) for n, p in params.items())
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(torch.isfinite(p).all() and not torch.equal(p, before[n]) for n, p in params.items())


def test_rank_deficient_gradients_survive():
    params = parameters()
    optimizer = make(params)
    for _ in range(9):
        for name, p in params.items():
            m, n = SHAPES[name]
            p.grad = torch.randn(m, 1) @ torch.randn(1, n)
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in params.values())


def test_missing_gradients_and_closure():
    params = parameters()
    optimizer = make(params)
    before = params["wide"].detach().clone()
    for name in ("tall", "square"):
        params[name].grad = torch.randn(SHAPES[name])
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(params["wide"], before)
    assert states(optimizer)["wide"]["step"] == 0


def test_bf16_weights_without_a_master_have_fp32_states():
    params = parameters(torch.bfloat16)
    optimizer = make(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert all(s["exp_avg"].dtype == s["basis"].dtype == torch.float32 for s in states(optimizer).values())


def test_state_survives_a_save_and_a_load_bitwise():
    params = parameters()
    optimizer = make(params)
    gradients = [{n: torch.randn(s) for n, s in SHAPES.items()} for _ in range(12)]

    def run(some, opt, steps):
        for k in steps:
            for n, p in some.items():
                p.grad = gradients[k][n].clone()
            opt.step()

    run(params, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save({"w": {n: p.detach() for n, p in params.items()}, "o": optimizer.state_dict()}, buffer)
    run(params, optimizer, range(5, 12))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = {n: nn.Parameter(w) for n, w in saved["w"].items()}
    fresh = make(resumed)
    fresh.load_state_dict(saved["o"])
    run(resumed, fresh, range(5, 12))
    assert all(torch.equal(resumed[n], p) for n, p in params.items())


def test_a_step_may_be_cut_to_one_group():
    """DeepSpeed steps one group at a time, with ``param_groups`` cut to it."""
    params, whole = parameters(), parameters()
    for n, p in whole.items():
        p.data.copy_(params[n].data)
    groups = [{"params": [(n, p)], "rank": 4, "update_proj_gap": 4} for n, p in params.items()]
    cut, peer = (
        LowRankAdamW(groups, **ADAMW),
        LowRankAdamW([{"params": list(whole.items()), "rank": 4, "update_proj_gap": 4}], **ADAMW),
    )
    for _ in range(6):
        for n, p in params.items():
            p.grad = torch.randn(SHAPES[n])
            whole[n].grad = p.grad.clone()
        everything = cut.param_groups
        for group in everything:
            cut.param_groups = [group]
            cut.step()
        cut.param_groups = everything
        peer.step()
    assert all(torch.equal(p, whole[n]) for n, p in params.items())


@pytest.mark.parametrize(
    ("group", "options", "text"),
    [
        ({"rank": 2, "params": [("bias", nn.Parameter(torch.ones(4)))]}, {}, r"bias \(4,\) is in a low-rank group"),
        ({"rank": 9}, {}, r"rank 9 is larger than both sides of w \(8, 8\)"),
        ({"rank": 0}, {}, "lowrank.rank must be an integer >= 1, got 0"),
        ({"rank": -1}, {}, "got -1"),
        ({"rank": [2, 2]}, {}, "2 ranks for 1 parameters"),
        ({"rank": 2, "proj_type": "full"}, {}, "proj_type"),
        ({"rank": 2}, {"lr": -1}, "lr must be a number >= 0"),
        ({"rank": 2}, {"selection": "sara"}, "selection"),
        ({"rank": 2, "params": []}, {}, "empty"),
        ({"rank": 2, "update_gap": 5}, {}, "group 0: unknown option 'update_gap'; did you mean 'update_proj_gap'"),
        ({"rank": 2, "selection": "dominant"}, {}, "selection.* belong to the optimizer"),
    ],
)
def test_bad_groups_and_options_are_refused(group, options, text):
    with pytest.raises(ValueError, match=text):
        LowRankAdamW([{"params": [("w", nn.Parameter(torch.ones(8, 8)))], **group}], **options)


def test_an_optimizer_without_a_low_rank_group_says_so():
    weight = nn.Parameter(torch.ones(4, 4))
    weight.grad = torch.ones(4, 4)
    with pytest.warns(UserWarning, match="nothing is projected: no parameter group sets a rank"):
        LowRankAdamW([weight]).step()


def test_build_optimizer_passes_the_whole_configuration_on():
    options = {"rank": 2, "update_proj_gap": 7, "scale": 0.5, "selection": "dominant", "moments": "project"}
    options |= {
        "seed": 5,
        "stagger": False,
        "wave_size": 3,
        "gram_dtype": "float32",
        "gradient_dtype": "bfloat16",
        "proj_type": "left",
        "state_dtype": "int8",
        "basis_dtype": "int4",
        "stochastic_rounding": True,
    }
    optimizer = ds_lowrank.build_optimizer(nn.Sequential(nn.Linear(8, 8)), {**options, "lr": 0.5, "weight_decay": 0.1})
    spec, group = optimizer.matrix_specs[0], optimizer.param_groups[0]
    assert (spec.rank, spec.gap, spec.proj_type) == (2, 7, "left")
    assert (group["scale"], group["lr"], group["weight_decay"]) == (0.5, 0.5, 0.1)
    passed = ("selection", "moments", "seed", "stagger", "wave_size", "state_dtype", "basis_dtype")
    for name in (*passed, "gram_dtype", "gradient_dtype"):
        assert getattr(optimizer.config, name) == options[name]


@pytest.mark.parametrize(("told", "found"), [("auto", 8), ("bfloat16", 2)])
def test_autocast_has_to_be_told(told, found):
    """Rounded to bf16 a gradient of two directions has more of them, which come in float32 as if they were its own."""
    layer = nn.Linear(24, 32, bias=False)
    optimizer = ds_lowrank.build_optimizer(layer, {"rank": 8, "gradient_dtype": told}, lr=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(2, 24)).square().sum().backward()
    optimizer.step()
    indices = optimizer.state["lowrank"]["weight"]["indices"]
    assert int((indices >= 0).sum()) == found


def test_a_name_that_is_taken_is_refused():
    """Two models' ``weight`` would share one plan and one state."""
    groups = [{"params": [("weight", nn.Parameter(torch.ones(4, 4)))], "rank": 2} for _ in range(2)]
    with pytest.raises(ValueError, match="'weight' is taken already"):
        LowRankAdamW(groups)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda low: low.update(tall={**low["tall"], "basis": torch.zeros(10, 3)}),
            r"basis of tall \(24, 10\) is \(10, 3\)",
        ),
        (lambda low: low.update(tall={**low["tall"], "basis": low["tall"]["basis"].double()}), "torch.float64, not"),
        (lambda low: low.update(other=low.pop("tall")), "'other', which is no projected parameter here"),
        (lambda low: low["tall"].pop("exp_avg"), r"tall \(24, 10\) has"),
    ],
)
def test_a_loaded_state_that_does_not_fit_is_refused_by_name(change, text):
    params = parameters()
    optimizer = make(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    # As under DeepSpeed, where a rank's states hang on a key of their own.
    saved["state"] = {STATE_KEY: {name: dict(state) for name, state in states(optimizer).items()}}
    change(saved["state"][STATE_KEY])
    fresh = make(params)
    fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match=text):
        fresh.step()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda tall: tall.update(basis=torch.zeros(10, 3)), r"basis of tall \(24, 10\) is \(10, 3\)"),
        (lambda tall: tall.update(exp_avg=tall["exp_avg"].double()), r"exp_avg of tall .* torch.float64, not"),
        (lambda tall: tall.pop("overlaps"), r"tall \(24, 10\) has no overlaps"),
    ],
)
def test_a_parameters_entry_that_does_not_fit_is_refused_by_name(change, text):
    params = parameters()
    optimizer = make(params)
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    index = [m.name for m in optimizer.members].index("tall")
    saved["state"][index] = dict(saved["state"][index])
    change(saved["state"][index])
    fresh = make(params)
    fresh.load_state_dict(saved)
    with pytest.raises(ValueError, match=text):
        fresh.step()


def test_a_checkpoint_of_another_optimizer_starts_anew_and_says_so(caplog):
    params = parameters()
    peer = torch.optim.AdamW(list(params.values()), lr=0.1)
    for p in params.values():
        p.grad = torch.randn_like(p)
    peer.step()
    optimizer = make(params)
    optimizer.load_state_dict(peer.state_dict())
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert "state of 3 of 3 projected parameters (tall, ...) is another optimizer's: they start with" in caplog.text
    assert all(state["step"] == 1 for state in states(optimizer).values())
    assert list(optimizer.state) == [STATE_KEY]  # AdamW's moments are gone


def test_a_load_keeps_what_this_run_was_configured_with():
    params = parameters()
    old, new = make(params, scale=0.5, lr=0.3), make(params, scale=0.25, lr=0.1)
    new.load_state_dict(old.state_dict())
    group = new.param_groups[0]
    assert (group["scale"], group["rank"], group["lr"]) == (0.25, 4, 0.3)


def test_a_rank_above_the_shorter_side_is_clamped_with_a_warning():
    with pytest.warns(UserWarning, match=r"rank 9 is larger than the shorter side of w \(12, 8\): clamped to 8"):
        optimizer = LowRankAdamW([{"params": [("w", nn.Parameter(torch.ones(12, 8)))], "rank": 9}])
    assert optimizer.matrix_specs[0].rank == 8


def test_galores_groups_without_names_work():
    weight, bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))
    galore = {"params": [weight], "rank": 2, "update_proj_gap": 10, "scale": 0.5, "proj_type": "std"}
    optimizer = LowRankAdamW([{"params": [bias]}, galore], lr=0.1)
    weight.grad, bias.grad = torch.randn(8, 6), torch.randn(6)
    optimizer.step()
    assert list(states(optimizer)) == ["group1.0"]


def test_groups_added_before_the_first_step():
    first, second = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6, 6))
    optimizer = LowRankAdamW([{"params": [("a", first)], "rank": 2}])
    optimizer.add_param_group({"params": [("b", second)], "rank": 3})
    first.grad, second.grad = torch.randn(8, 6), torch.randn(6, 6)
    optimizer.step()
    assert set(states(optimizer)) == {"a", "b"}


def test_a_step_without_any_gradient_says_what_may_be_wrong(caplog):
    """As after fully_shard, when the optimizer was built before it."""
    optimizer = make(parameters())
    with caplog.at_level(logging.WARNING):
        optimizer.step()
        optimizer.step()
    assert [r.message for r in caplog.records if "no parameter of the optimizer has a gradient" in r.message] != []
    assert len(caplog.records) == 1


@pytest.mark.parametrize("full_rank", [False, True])
def test_small_updates_of_bf16_weights_are_not_lost(full_rank):
    """Rounded to nearest a step below half a bf16 step moves nothing, ever; stochastically it does, on average."""
    moved = {}
    for rounding in (False, True):
        projected, vector = nn.Parameter(torch.ones(40, 30).bfloat16()), nn.Parameter(torch.ones(900).bfloat16())
        groups = [{"params": [("w", projected)], "rank": 4, "scale": 1.0}, {"params": [("v", vector)]}]
        optimizer = LowRankAdamW(groups, lr=1e-4, stochastic_rounding=rounding, selection="dominant")
        for _ in range(20):
            projected.grad = torch.ones_like(projected)
            vector.grad = torch.ones_like(vector)
            optimizer.step()
        tensor = vector if full_rank else projected
        moved[rounding] = float((1 - tensor.detach().float()).mean())
    wanted = 20 * 1e-4 * (1 if full_rank else 30**-0.5)
    assert moved[False] == 0
    assert abs(moved[True] / wanted - 1) < 0.2


def test_bf16_weights_of_all_kinds_go_on_bitwise_after_a_load():
    """torch's loader casts fp32 moments to the dtype of the weights."""

    def build(w, v):
        groups = [{"params": [("w", w)], "rank": 4}, {"params": [("v", v)]}]
        return LowRankAdamW(groups, lr=0.01, stochastic_rounding=True, state_dtype="fp32")

    def run(optimizer, w, v, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            w.grad, v.grad = (torch.randn(p.shape, generator=generator).bfloat16() for p in (w, v))
            optimizer.step()

    w, v = nn.Parameter(torch.randn(12, 9).bfloat16()), nn.Parameter(torch.randn(7).bfloat16())
    optimizer = build(w, v)
    run(optimizer, w, v, range(3))
    assert optimizer.state[v]["exp_avg"].dtype == torch.float32
    again_w, again_v = (nn.Parameter(p.detach().clone()) for p in (w, v))
    again = build(again_w, again_v)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(optimizer, w, v, range(3, 7))
    run(again, again_w, again_v, range(3, 7))
    assert torch.equal(w, again_w)
    assert torch.equal(v, again_v)


@pytest.mark.parametrize("options", [{"moments": "project"}, {"rule": "fira"}, {"selection": "online_pca"}], ids=str)
def test_a_step_inside_autocast_is_the_same(options):
    """Its small products would be computed in bf16."""
    weights = []
    for inside in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(24, 10))
        optimizer = LowRankAdamW([{"params": [("w", weight)], "rank": 4}], lr=0.1, update_proj_gap=2, **options)
        for _ in range(4):
            weight.grad = torch.randn(24, 10)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
        weights.append(weight.detach())
    assert torch.equal(*weights)


def test_states_that_a_load_replaces_are_let_go():
    params = {f"w{k}": torch.nn.Parameter(torch.randn(24, 10)) for k in range(3)}
    optimizer = LowRankAdamW([{"params": list(params.items()), "rank": 4}], lr=0.1)
    for _ in range(2):
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
    before = [weakref.ref(state["exp_avg"]) for state in optimizer.state[STATE_KEY].values()]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.ensure_state()
    gc.collect()
    assert not [ref for ref in before if ref() is not None]
