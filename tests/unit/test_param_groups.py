"""Which parameters are projected, and in which groups."""

import pytest
from torch import nn

from ds_lowrank import LowRankConfig, param_groups, projected_names
from ds_lowrank.param_groups import count_groups


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.up_proj = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.LayerNorm(width)


class Model(nn.Module):
    def __init__(self, layers: int = 4, width: int = 8, tied: bool = False):
        super().__init__()
        self.embed_tokens = nn.Embedding(20, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, 20, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_every_trainable_parameter_exactly_once_and_the_right_decay():
    model = Model()
    model.layers[0].norm.bias.requires_grad_(False)
    groups = param_groups(model, LowRankConfig(rank=4), ranks=1, weight_decay=0.1)
    given = [name for group in names(groups) for name in group]
    assert sorted(given) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    by_name = {g["name"]: g for g in groups}
    assert names([by_name["full.decay"]]) == [["embed_tokens.weight", "lm_head.weight"]]
    assert by_name["full.no_decay"]["weight_decay"] == 0.0
    assert all(g["weight_decay"] == 0.1 for name, g in by_name.items() if name != "full.no_decay")


@pytest.mark.parametrize("tied", [False, True])
def test_all_linear_leaves_embeddings_and_head_out(tied):
    chosen = projected_names(Model(layers=1, tied=tied), LowRankConfig(rank=4))
    assert chosen == ["layers.0.q_proj.weight", "layers.0.up_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], ["layers.0.q_proj.weight", "layers.1.q_proj.weight"]),
        (["layers.1"], ["layers.1.q_proj.weight", "layers.1.up_proj.weight"]),
        (r"layers\.\d+\.up_proj", ["layers.0.up_proj.weight", "layers.1.up_proj.weight"]),
        (["lm_head"], ["lm_head.weight"]),
        (["embed_tokens", r".*1\.q_proj"], ["embed_tokens.weight", "layers.1.q_proj.weight"]),
    ],
)
def test_patterns_in_the_trainers_form(targets, expected):
    assert projected_names(Model(layers=2), LowRankConfig(rank=4, optim_target_modules=targets)) == expected


@pytest.mark.parametrize("pattern", [".*", "layers|head"])
def test_a_wide_pattern_does_not_name_the_head(pattern):
    config = LowRankConfig(rank=4, optim_target_modules=[pattern, "q_proj"])
    if pattern == ".*":
        assert "lm_head.weight" not in projected_names(Model(), config)
        assert "embed_tokens.weight" not in projected_names(Model(), config)
    else:
        with pytest.raises(ValueError, match=r"layers\|head"):
            projected_names(Model(), config)


def test_patterns_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"'attention' matches no trainable linear layer.*layers\.0\.q_proj"):
        param_groups(Model(), LowRankConfig(rank=4, optim_target_modules=["q_proj", "attention"]))
    with pytest.raises(ValueError, match=r"rank_pattern: 'gate' matches no projected parameter"):
        param_groups(Model(), LowRankConfig(rank=4, rank_pattern={"gate": 2}))
    frozen = Model()
    frozen.layers[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'layers\.1' matches no trainable linear layer"):
        param_groups(frozen, LowRankConfig(rank=4, optim_target_modules=["layers.0", "layers.1"]))
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is projected"):
        param_groups(frozen, LowRankConfig(rank=4))


def test_ranks():
    config = LowRankConfig(rank=4, rank_pattern={r"up_proj": 2, r"\.0\.": 3})
    group = param_groups(Model(layers=1), config, ranks=1)[0]
    assert group["rank"] == [3, 2]
    with pytest.raises(ValueError, match=r"rank 9 is larger than both sides of layers\.0\.q_proj\.weight \(8, 8\)"):
        param_groups(Model(), LowRankConfig(rank=9))
    with pytest.warns(UserWarning, match=r"layers\.0\.up_proj\.weight \(24, 8\): clamped to 8"):
        group = param_groups(Model(layers=1), LowRankConfig(rank=9, optim_target_modules=["up_proj"]), ranks=1)[0]
    assert group["rank"] == [8]


@pytest.mark.parametrize(
    ("layers", "ranks", "groups"),
    [(32, 8, 4), (32, 16, 2), (32, 32, 1), (32, 64, 1), (32, 3, 4), (24, 6, 4), (12, 4, 3), (5, 2, 2), (1, 4, 1)],
)
def test_number_of_groups(layers, ranks, groups):
    """7B has 32 layers: four groups up to 8 ranks, one up to 32, nothing cut."""
    assert count_groups(layers, ranks) == groups


def test_groups_hold_whole_layers_in_natural_order():
    model = Model(layers=8)
    groups = names(param_groups(model, LowRankConfig(rank=4), ranks=2))[:-2]
    assert len(groups) == 4
    assert [n for group in groups for n in group] == projected_names(model, LowRankConfig(rank=4))
    assert all(len(group) == 4 for group in groups)


def test_groups_are_the_same_on_any_number_of_ranks_unless_they_are_flattened(monkeypatch):
    """They are a part of FSDP2's checkpoints, which any number of ranks may load."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    names = [group["name"] for group in param_groups(Model(), LowRankConfig(rank=4))]
    assert names == ["lowrank.0", "full.decay", "full.no_decay"]
