"""A checkpoint that is damaged in one rank's file: the same refusal on all ranks, and nothing was changed on any."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import Case, build_model
from harness import start, whole
from resume import Move, uninterrupted

import ds_lowrank

RANKS = 2
SHAPES = ("experts", 1, 3)


@pytest.fixture(scope="module")
def written(tmp_path_factory, pools):
    """Folder of a checkpoint of each layout, written once."""
    folders: dict[str, Path] = {}

    def write(layout: str) -> Path:
        if layout not in folders:
            folders[layout] = tmp_path_factory.mktemp(layout)
            pools(RANKS).run(uninterrupted, _case(layout), (3, 0), folders[layout])
        return folders[layout]

    return write


def _case(layout: str) -> Case:
    return Move((layout, RANKS), (layout, RANKS)).case((layout, RANKS), SHAPES)


def _shared(packed) -> str:
    """The matrix of which this rank keeps rows, and not the first ones."""
    return next(name for name, entry in packed["state"]["lowrank"].items() if entry.get("row"))


def rows(packed):
    del packed["state"]["lowrank"][_shared(packed)]


def last_rows(packed):
    entry = packed["state"]["lowrank"][_shared(packed)]
    entry["exp_avg"] = entry["exp_avg"][:-1].clone()


def basis(packed):
    del packed["state"]["lowrank"][_shared(packed)]["basis"]


def matrix_of_one_rank(packed):
    del packed["state"]["lowrank"]["layers.0.1.weight[4]"]


def counters(packed):
    packed["state"]["lowrank"]["layers.0.1.weight[4]"]["step"] = -1


def description(packed):
    del packed["ds_lowrank"]


def place(packed):
    packed["ds_lowrank"]["parameters"]["layers.0.1.weight"]["offset"] += 10_000


def kind(packed):
    packed["ds_lowrank"]["matrices"] = []


def other_run(packed):
    packed["ds_lowrank"]["parameters"]["gain"]["shape"] = [2]


@pytest.mark.parametrize(
    "damage", [rows, last_rows, basis, matrix_of_one_rank, counters, description, place, kind, other_run]
)
@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_what_one_ranks_file_lacks_is_found_when_it_is_opened(written, tmp_path, layout, damage):
    path = _damage(written(layout), tmp_path, damage, rank=1)
    with pytest.raises(ValueError, match=r"layers\.0\.\d\.weight|ds_lowrank") as caught:
        ds_lowrank.open_checkpoint(tmp_path)
    assert str(path.parent) in str(caught.value)


def moments(packed):
    (state,) = (s for key, s in packed["state"].items() if isinstance(key, int) and s)
    del state["exp_avg_sq"]


def all_moments(packed):
    for key in [key for key, s in packed["state"].items() if isinstance(key, int) and s]:
        del packed["state"][key]


@pytest.mark.parametrize("damage", [moments, all_moments])
def test_moments_that_a_rank_lacks_are_found(written, tmp_path, damage):
    path = _damage(written("zero2"), tmp_path, damage, rank=0)  # that of ``gain``
    with pytest.raises(ValueError, match=r"lacks .* of gain") as caught:
        ds_lowrank.open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_every_rank_refuses_what_one_ranks_file_lacks(pools, written, tmp_path):
    _damage(written("zero2"), tmp_path, last_rows, rank=1)
    answers = pools(RANKS).run(_refused, _case("zero3"), tmp_path)
    assert answers[0] == answers[1]
    assert "lacks rows of exp_avg of layers.0.1.weight[1]" in answers[0]


@pytest.mark.parametrize("part", ["optimizer_0", "pytorch_model_fsdp_0"])
def test_every_rank_refuses_what_only_one_has_read(pools, written, tmp_path, part):
    """Bytes that are not those that were written show up where they are read: each rank looks at a share."""
    _copy(written("fsdp2"), tmp_path)
    path = tmp_path / part / "__1_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    answers = pools(RANKS).run(_refused, _case("fsdp2"), tmp_path)
    assert answers[0] == answers[1]
    assert f"{path} cannot be read" in answers[0]


def _refused(case: Case, folder: Path) -> str:
    run = start(case, build_model(case))
    before = [whole(p).clone() for p in run.model.parameters()]
    try:
        ds_lowrank.load_checkpoint(folder, run.model, run.optimizer)
    except ValueError as error:
        assert all(map(torch.equal, before, [whole(p) for p in run.model.parameters()]))
        return str(error)
    finally:
        run.close()
    return "no error"


def _damage(before: Path, folder: Path, change, rank: int) -> Path:
    """A copy, in which a rank's file is changed."""
    _copy(before, folder)
    (path,) = folder.glob(f"*/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    content = torch.load(path, weights_only=False)  # DeepSpeed's own objects too, to write them again; a test wrote it
    state = content["optimizer_state_dict"]
    change(state["base_optimizer_state"] if "base_optimizer_state" in state else state["optimizer_state_dict"])
    torch.save(content, path)
    return path


def _copy(before: Path, folder: Path) -> None:
    for path in before.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(before)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
