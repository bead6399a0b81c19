"""Which parameters are projected, and in which groups."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

import ds_lowrank
from ds_lowrank import LowRankConfig, param_groups, projected_names
from ds_lowrank.param_groups import count_groups
from ds_lowrank.targets.keeping import keep_projected
from ds_lowrank.targets.patterns import advise_naming, find_targets


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
        param_groups(Model(), LowRankConfig(rank=9, optim_target_modules=["q_proj"]))
    with pytest.warns(UserWarning, match=r"layers\.0\.up_proj\.weight \(24, 8\): clamped to 8"):
        group = param_groups(Model(layers=1), LowRankConfig(rank=9, optim_target_modules=["up_proj"]), ranks=1)[0]
    assert group["rank"] == [8]


# ---- heads, in models of other programs: tests/unit/test_families.py has those of Transformers ----


class Trunk(nn.Module):
    """A model with embedding, layers and whatever comes behind; ``layers`` as torchtitan has them, or in a list."""

    def __init__(self, titan: bool = False, vocabulary: int = 20, width: int = 8, **behind: nn.Module):
        super().__init__()
        self.tok_embeddings = nn.Embedding(vocabulary, width)
        blocks = [Block(width), Block(width)]
        self.layers = nn.ModuleDict({str(k): b for k, b in enumerate(blocks)}) if titan else nn.ModuleList(blocks)
        for name, module in behind.items():
            self.add_module(name, module)


LAYERS = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"]


def chosen(model, *targets, rank=4):
    config = LowRankConfig(rank=rank, optim_target_modules=list(targets) or "all-linear")
    return [name.removesuffix(".weight") for name in projected_names(model, config)]


class Attention(nn.Module):
    """Names that mean a head elsewhere."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 20)


@pytest.mark.parametrize(
    ("model", "projected"),
    [
        pytest.param(Trunk(titan=True, output=nn.Linear(8, 20)), LAYERS, id="torchtitan"),
        pytest.param(Trunk(fc=nn.Linear(8, 30)), LAYERS, id="torchvision"),
        pytest.param(Trunk(heads=nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7))), LAYERS, id="in-a-head"),
        pytest.param(Trunk(lm_heads=nn.ModuleList([nn.Linear(8, 9), nn.Linear(8, 9)])), LAYERS, id="several"),
        # By what it does, since its name says nothing: the last layer into the vocabulary.
        pytest.param(Trunk(decoder=nn.Linear(8, 20)), LAYERS, id="into-the-vocabulary"),
        pytest.param(Trunk(bridge=nn.Linear(8, 21)), [*LAYERS, "bridge"], id="into-something-else"),
        pytest.param(
            Trunk(vocabulary=8, transform=nn.Linear(8, 8), to_text=nn.Linear(8, 8)),
            [*LAYERS, "transform"],
            id="a-vocabulary-as-wide-as-the-model",
        ),
        pytest.param(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)), ["1"], id="without-names"),
        pytest.param(
            Trunk(more=nn.ModuleList([Attention()])),
            [*LAYERS, "more.0.output", "more.0.head", "more.0.fc"],
            id="names-within-layers",
        ),
        pytest.param(
            nn.Sequential(Model(layers=1)), ["0.layers.0.q_proj", "0.layers.0.up_proj"], id="a-model-in-a-model"
        ),
    ],
)
def test_a_head_is_known_by_what_it_is(model, projected):
    assert chosen(model) == projected


def test_a_head_is_what_a_model_in_the_model_says_or_what_shares_its_weight_with_an_embedding():
    inner = Trunk(unembed=nn.Linear(8, 33), more=nn.ModuleList([nn.Linear(8, 20, bias=False)]))
    assert "inner.unembed" in chosen(nn.ModuleDict({"inner": inner}))
    inner.get_output_embeddings = lambda: inner.unembed
    inner.more[0].weight = inner.tok_embeddings.weight
    assert chosen(nn.ModuleDict({"inner": inner})) == [f"inner.{name}" for name in LAYERS]


def test_labels_are_the_configurations():
    model = Trunk(dense=nn.Linear(8, 8), out=nn.Linear(8, 11))
    assert chosen(model) == [*LAYERS, "dense", "out"]
    model.config = SimpleNamespace(num_labels=11)
    assert chosen(model) == [*LAYERS, "dense"]


def test_what_is_in_a_head_is_reached_by_the_heads_name_only():
    model = Trunk(
        classifier=nn.ModuleDict({"dense": nn.Linear(8, 8), "out_proj": nn.Linear(8, 9)}), dense=nn.Linear(8, 8)
    )
    assert chosen(model, "dense") == ["dense"]
    assert chosen(model, "classifier") == ["classifier.dense", "classifier.out_proj"]
    assert chosen(model, r"classifier\.out_proj", "all-linear") == [*LAYERS, "classifier.out_proj", "dense"]


def test_what_peft_trains_whole_is_left_whole_and_its_factors_are_warned_of():
    class Wrapper(nn.Module):
        """ModulesToSaveWrapper, and a layer with LoRA, by peft's names."""

        def __init__(self, inner):
            super().__init__()
            self.original_module = inner.requires_grad_(False)
            self.modules_to_save = nn.ModuleDict({"default": nn.Linear(8, 9)})

    class Lora(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(16, 16).requires_grad_(False)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(16, 6, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(6, 16, bias=False)})

    model = Trunk(summary=Wrapper(nn.Linear(8, 9)), value=Lora())
    with pytest.warns(UserWarning, match=r"factors of LoRA .* gains nothing.*value\.lora_A\.default\.weight"):
        assert chosen(model) == [*LAYERS, "value.lora_A.default", "value.lora_B.default"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(model, rank=6) == LAYERS
    with pytest.warns(UserWarning, match="factors of LoRA"):
        assert chosen(model, "lora_A", rank=6) == ["value.lora_A.default"]


# ---- matrices that are not larger than the rank ----


class Routed(nn.Module):
    """Two layers with a gate, a small factor, and stacked experts no larger than the rank."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(8) for _ in range(2))
        for layer in self.layers:
            layer.gate = nn.Linear(8, 1, bias=False)
            layer.dt_proj = nn.Linear(4, 16, bias=False)
            layer.experts = nn.Module()
            layer.experts.down_proj = nn.Parameter(torch.randn(5, 4, 9))

    def forward(self, x):
        for layer in self.layers:
            small = (
                layer.dt_proj(x[..., :4])[..., :8]
                + torch.einsum("emn,...m->...n", layer.experts.down_proj, x[..., :4])[..., :8]
            )
            x = layer.q_proj(x) * layer.gate(x) + small
        return x


def test_what_is_not_larger_than_the_rank_is_trained_full_rank():
    found = find_targets(Routed(), LowRankConfig(rank=4))
    assert [target.name.removesuffix(".weight") for target in found.projected] == LAYERS
    assert found.narrow == [
        f"layers.{k}.{n}" for k in range(2) for n in ("gate.weight", "dt_proj.weight", "experts.down_proj")
    ]


def test_its_own_rank_is_what_counts():
    config = LowRankConfig(rank=4, rank_pattern={"dt_proj": 3, "q_proj": 8})
    found = find_targets(Routed(), config)
    names = [target.name for target in found.projected]
    assert "layers.0.dt_proj.weight" in names
    assert "layers.0.q_proj.weight" in found.narrow


def test_what_is_named_is_projected_whatever_its_size():
    with pytest.warns(UserWarning, match=r"dt_proj\.weight \(16, 4\): clamped to 4"):
        assert "layers.1.dt_proj" in chosen(Routed(), "all-linear", "dt_proj", rank=5)
    assert chosen(Routed(), "gate", rank=1) == ["layers.0.gate", "layers.1.gate"]


def test_nothing_left_is_an_error_with_the_largest_side_that_there_is():
    text = r"largest short side is 8, of layers\.0\.q_proj\.weight \(8, 8\), at rank 8: set a smaller rank"
    with pytest.raises(ValueError, match=text):
        param_groups(Routed(), LowRankConfig(rank=8))
    with pytest.raises(ValueError, match="'all-linear' matches no trainable linear layer here but heads"):
        param_groups(nn.Sequential(nn.Conv1d(3, 3, 3), nn.Sequential()), LowRankConfig(rank=2))
    assert projected_names(Routed(), LowRankConfig(rank=8)) == []


def test_the_report_names_them(capsys):
    optimizer = ds_lowrank.build_optimizer(Routed(), {"rank": 4})
    report = ds_lowrank.describe(optimizer)
    assert report.narrow[:2] == ["layers.0.gate.weight", "layers.0.dt_proj.weight"]
    said = " ".join(capsys.readouterr().out.split())
    assert "short side not above the rank, so that a subspace saves nothing: 6: layers.0.gate.weight" in said
    assert not any("narrow" in group for group in optimizer.param_groups)  # they are a part of checkpoints
    ds_lowrank.describe(ds_lowrank.build_optimizer(Model(), {"rank": 4}))
    assert "short side" not in capsys.readouterr().out


def test_a_checkpoint_in_which_they_were_projected_says_how_to_go_on(tmp_path):
    """Earlier versions projected them: what a checkpoint has stays as it is, or is refused with what to set."""
    named = {"rank": 4, "optim_target_modules": ["all-linear", "gate", "dt_proj", "down_proj"], "lr": 0.1}
    model = Routed()
    with pytest.warns(UserWarning, match="clamped"):
        optimizer = ds_lowrank.build_optimizer(model, named)
    model(torch.randn(3, 8)).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    advice = (
        r'optim_target_modules = \["all-linear", "layers\.\[0-9\]\+\.gate", "layers\.\[0-9\]\+\.dt_proj", '
        r'"layers\.\[0-9\]\+\.experts\.down_proj"\]'
    )
    text = r"low-rank state of layers\.0\.gate\.weight, which is not projected here.*" + advice
    with pytest.raises(ValueError, match=text):
        ds_lowrank.build_optimizer(Routed(), {"rank": 4}).load_state_dict(saved)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(saved, tmp_path / "optimizer.pt")
    other = Routed()
    with pytest.raises(ValueError, match=text):
        ds_lowrank.load_checkpoint(tmp_path, other, ds_lowrank.build_optimizer(other, {"rank": 4}))
    with pytest.warns(UserWarning, match="clamped"):
        optimizer = ds_lowrank.build_optimizer(other, named)
    assert ds_lowrank.load_checkpoint(tmp_path, other, optimizer).fresh == 0
    before = LowRankConfig(rank=4)
    kept = keep_projected(before, other, tmp_path)
    with pytest.warns(UserWarning, match="clamped"):
        optimizer = ds_lowrank.build_optimizer(other, kept)
    assert [group.get("rank") for group in optimizer.param_groups] == [g.get("rank") for g in saved["param_groups"]]
    assert ds_lowrank.load_checkpoint(tmp_path, other, optimizer).fresh == 0
    assert keep_projected(before, other, None) is before
    assert keep_projected(before, other, tmp_path / "missing") is before
    assert keep_projected(kept, other, tmp_path) is kept
    assert keep_projected(before.replace(optim_target_modules="gate"), other, tmp_path).optim_target_modules == "gate"
    # What is frozen by now needs no name, which would match nothing.
    other.layers[0].requires_grad_(False)
    frozen = keep_projected(before, other, tmp_path)
    assert not any("layers.0" in name for name in frozen.optim_target_modules)
    with pytest.warns(UserWarning, match="clamped"):
        optimizer = ds_lowrank.build_optimizer(other, frozen)
    assert ds_lowrank.load_checkpoint(tmp_path, other, optimizer).fresh == 0


def test_the_advice_names_just_what_was_projected():
    model = Routed()
    narrow = find_targets(model, LowRankConfig(rank=4)).narrow
    advice = advise_naming([*narrow[:2], *[f"{narrow[2]}[{e}]" for e in range(5)], *narrow[3:]])
    targets = eval(advice.rsplit("=", 1)[1])
    assert len(targets) == 4
    with pytest.warns(UserWarning, match="clamped"):
        everything = projected_names(model, LowRankConfig(rank=4, optim_target_modules=targets))
    assert set(everything) == {f"{name}.weight" for name in LAYERS} | set(narrow)


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


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (["in_proj"], ["attention.in_proj_weight"]),
        ("attention.in_proj_weight", ["attention.in_proj_weight"]),
        (r".*\.(in_proj|out_proj)", ["attention.in_proj_weight", "attention.out_proj.weight"]),
        (["attention"], ["attention.out_proj.weight"]),
        (["proj"], ["attention.out_proj.weight"]),
        (r".*attention.*", ["attention.out_proj.weight"]),
        (["weight_hh_l0"], ["gru.weight_hh_l0"]),
        (["weight_hh", "out_proj"], None),
        ("all-linear", ["attention.out_proj.weight"]),
    ],
)
def test_a_matrix_of_another_module_is_reached_by_its_own_name_alone(targets, names):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4), "gru": nn.GRU(16, 8)})
    config = LowRankConfig(rank=4, optim_target_modules=targets)
    if names is None:
        with pytest.raises(ValueError, match="'weight_hh' matches no trainable linear layer"):
            projected_names(model, config)
    else:
        assert projected_names(model, config) == names


def test_what_peft_trains_whole_is_no_target():
    """Its wrapper hides the head's name, and the base model's getters."""
    peft = pytest.importorskip("peft")
    shape = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    bert = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model("bert", intermediate_size=64, **shape), attn_implementation="eager"
    )
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query"])
    names = ds_lowrank.projected_names(peft.get_peft_model(bert, lora), LowRankConfig(rank=4))
    assert names
    assert all("lora_" in name for name in names), "the factors alone are trainable, but for the head"
