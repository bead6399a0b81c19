"""The examples of CONTRIBUTING.md work."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank import assembly
from ds_lowrank.layouts import Member, Ranks, find_layout
from ds_lowrank.layouts.base import Layout
from ds_lowrank.plan.geometry import Part
from ds_lowrank.plan.matrices import plan_matrices
from ds_lowrank.plan.specs import MatrixSpec

PAGE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"
SHAPES = {"up": (7, 4), "down": (4, 7), "bias": (7,), "thin": (2, 1)}


def example(title: str) -> dict:
    """What the Python of one section defines."""
    section = PAGE.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    found: dict = {"__name__": "example"}
    exec(compile(block, f"{title}.py", "exec"), found)
    return found


def stripe(model: nn.Module, rank: int, size: int) -> None:
    """What the framework of the example does, on one rank."""
    for parameter in model.parameters():
        share = -(-parameter.numel() // size)
        parameter.stripe = rank * share
        parameter.data = parameter.data.view(-1)[rank * share : (rank + 1) * share].clone()


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()})


def striped(given: dict, rank: int, size: int, monkeypatch) -> tuple[Layout, nn.Module]:
    whole = model()
    members = [Member(name, p, tuple(p.shape), 0) for name, p in whole.items()]
    stripe(whole, rank, size)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
    assert given["is_striped"](members)
    return given["StripeLayout"](members), whole


def test_the_layout_has_all_that_a_layout_has():
    kind = example("Add a layout")["StripeLayout"]
    promised = {name for name in vars(Layout) if not name.startswith("_")} | set(Layout.__annotations__)
    instance = kind([Member("w", nn.Parameter(torch.ones(2, 2)), (2, 2), 0)])
    assert [name for name in promised if not hasattr(instance, name)] == []
    assert instance.ranks == Ranks()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_layouts_pieces_cover_the_model_and_can_be_planned(size, monkeypatch):
    given = example("Add a layout")
    ranks = [striped(given, rank, size, monkeypatch)[0] for rank in range(size)]
    for name, whole in model().items():
        held = [layout.weight(name) for layout in ranks if name in layout.pieces]
        assert torch.equal(torch.cat(held), whole.data.view(-1))
    assert [layout.mismatch() for layout in ranks] == [None] * size
    specs = [MatrixSpec(n, n, s, None, s, 0, 2, 10, "std") for n, s in SHAPES.items() if n in ("up", "down")]
    for plan in plan_matrices(
        specs,
        [layout.pieces for layout in ranks],
        copy=(0,) * size,
        replicated=ranks[0].replicated,
        dtype=ranks[0].dtype,
        gradient_dtype=ranks[0].gradient_dtype,
        unit=ranks[0].unit,
        stagger=True,
        wave_size=8,
        shard_projection=True,
    ):
        assert sum(plan.rows_of(rank) for rank in range(size)) == plan.long
        weight = model()[plan.name].data
        for part, layout in zip(plan.parts, ranks):
            for box in part.boxes if isinstance(part, Part) else ():
                assert torch.equal(
                    part.view(layout.weight(plan.name), box), weight[box.top : box.bottom, box.left : box.right]
                )


def test_a_piece_that_is_not_where_the_layout_says_is_told(monkeypatch):
    layout, moved = striped(example("Add a layout"), 1, 3, monkeypatch)
    assert layout.mismatch() is None
    moved["down"].stripe += 1
    assert (layout.mismatch() or "").startswith("down: its stripe is not elements [10, 20)")


def test_the_optimizer_steps_in_the_layout(monkeypatch):
    given = example("Add a layout")

    def found(members, groups):
        return (
            (given["StripeLayout"](members), members) if given["is_striped"](members) else find_layout(members, groups)
        )

    monkeypatch.setattr(assembly, "find_layout", found)
    plain = model()
    cut = copy.deepcopy(plain)

    def optimizer(parameters: nn.Module) -> ds_lowrank.LowRankAdamW:
        matrices, rest = [parameters["up"], parameters["down"]], [parameters["bias"], parameters["thin"]]
        groups = [{"params": matrices, "rank": 2, "update_proj_gap": 2}, {"params": rest}]
        return ds_lowrank.LowRankAdamW(groups, lr=0.1)

    ours, theirs = optimizer(cut), optimizer(plain)
    stripe(cut, 0, 1)
    for number in range(4):
        torch.manual_seed(number)
        for (_, ordinary), (_, flat) in zip(plain.items(), cut.items()):
            ordinary.grad = torch.randn(ordinary.shape)
            flat.grad = ordinary.grad.view(-1).clone()
        ours.step()
        theirs.step()
    assert ours.layout.kind == "Stripes"
    for name, ordinary in plain.items():
        assert not torch.equal(ordinary, model()[name])
        assert torch.equal(cut[name].data.view(ordinary.shape), ordinary.data), name
