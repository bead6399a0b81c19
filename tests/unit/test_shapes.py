"""Parameters that are not one matrix: stacked experts, convolution kernels, and what is neither."""

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank import LowRankAdamW, LowRankConfig, param_groups, projected_names
from ds_lowrank.optimizer import STATE_KEY
from ds_lowrank.param_groups import clean_name
from ds_lowrank.reference import Reference

ADAMW = {"lr": 0.02, "eps": 1e-8, "weight_decay": 0.1}


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 3
        self.gate_up_proj = nn.Parameter(torch.randn(3, 12, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 9))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = Experts()
        self.proj = nn.Linear(6, 6, bias=False)
        self.patch = nn.Conv2d(3, 8, 2, bias=False)
        self.upscale = nn.ConvTranspose2d(3, 4, 2, bias=False)
        self.positions = nn.Parameter(torch.randn(1, 5, 6))


def test_all_linear_means_experts_but_no_convolution_and_nothing_else():
    assert projected_names(Model(), LowRankConfig(rank=2)) == [
        "experts.gate_up_proj",
        "experts.down_proj",
        "proj.weight",
    ]


def test_every_parameter_is_in_one_group_and_stacked_ones_are_marked():
    model = Model()
    low, full = param_groups(model, LowRankConfig(rank=2))
    assert low["stacked"] == [True, True, False]
    assert [name for name, _ in full["params"]] == ["positions", "patch.weight", "upscale.weight"]


def test_a_convolution_is_projected_where_it_is_named():
    (low, *_) = param_groups(Model(), LowRankConfig(rank=2, optim_target_modules=["patch"]))
    assert [name for name, _ in low["params"]] == ["patch.weight"]
    assert low["stacked"] == [False]


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        (
            ["upscale"],
            r"'upscale' matches upscale\.weight \(3, 4, 2, 2\), a 4-dimensional parameter of a ConvTranspose2d",
        ),
        (["proj", ".*scale.*"], r"upscale\.weight"),
    ],
)
def test_what_is_no_matrix_is_refused_by_name(targets, text):
    with pytest.raises(ValueError, match=text + r".*trained full-rank"):
        param_groups(Model(), LowRankConfig(rank=2, optim_target_modules=targets))


def test_a_rank_is_that_of_one_of_the_stacked_matrices():
    with pytest.warns(UserWarning, match=r"shorter side of experts\.down_proj \(6, 9\): clamped to 6"):
        param_groups(Model(), LowRankConfig(rank=7, optim_target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=r"rank 10 is larger than both sides of experts\.down_proj \(6, 9\)"):
        param_groups(Model(), LowRankConfig(rank=10, optim_target_modules=["down_proj"]))


@pytest.mark.parametrize("targets", ["all-linear", ["experts", "patch"]])
def test_they_train_as_the_matrices_they_are(targets):
    torch.manual_seed(1)
    model = Model()
    options = {"rank": 2, "update_proj_gap": 3, "gram_dtype": "float64", "optim_target_modules": targets}
    optimizer = ds_lowrank.build_optimizer(model, {**options, **ADAMW})
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    views = {s.name: _view(weights[s.parameter], s) for s in optimizer.matrix_specs}
    names = {s.parameter for s in optimizer.matrix_specs}
    rest = {n: w for n, w in weights.items() if n not in names}
    reference = Reference({**views, **rest}, {s.name: s.rank for s in optimizer.matrix_specs}, gap=3, **ADAMW)
    start = {n: w.clone() for n, w in weights.items()}
    for _ in range(8):
        gradients = {n: torch.randn_like(w) for n, w in weights.items()}
        for n, p in model.named_parameters():
            p.grad = gradients[n].clone()
        optimizer.step()
        fed = {s.name: _view(gradients[s.parameter], s) for s in optimizer.matrix_specs}
        reference.step({**fed, **{n: gradients[n] for n in rest}})
    for n, p in model.named_parameters():
        assert (p.detach() - weights[n]).norm() <= 1e-5 * (weights[n] - start[n]).norm()
    assert "experts.down_proj[2]" in optimizer.state[STATE_KEY]


def _view(tensor, spec):
    return (tensor if spec.index is None else tensor[spec.index]).view(spec.shape)


@pytest.mark.parametrize(
    ("shape", "stacked", "text"),
    [
        ((2, 3, 4), None, r"w \(2, 3, 4\) has 3 dimensions: set 'stacked'"),
        ((3, 4), True, "has two dimensions only"),
        ((4,), None, "is not a matrix"),
        ((2, 3, 4), [True, False], "2 values of 'stacked' for 1 parameters"),
    ],
)
def test_groups_have_to_say_what_a_parameter_of_many_dimensions_is(shape, stacked, text):
    group = {"params": [("w", nn.Parameter(torch.randn(shape)))], "rank": 2, "stacked": stacked}
    with pytest.raises(ValueError, match=text):
        LowRankAdamW([group])


def test_names_without_what_wrappers_put_into_them():
    assert clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.q.weight") == "layers.0.q.weight"
    model = nn.Sequential(nn.Linear(4, 4))
    compiled = torch.compile(model)
    assert projected_names(compiled, LowRankConfig(rank=2)) == projected_names(model, LowRankConfig(rank=2))
