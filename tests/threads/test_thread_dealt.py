"""Under DDP moments of what is not projected are dealt over the ranks: who keeps what, and that it does not show."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from storage import state_bytes
from thread_cases import current
from thread_layouts import WholeLayout, ranks_of
from thread_ranks import RankError, run_ranks, this_rank
from torch import Tensor, nn

from ds_lowrank import LowRankAdamW, describe
from ds_lowrank.full_rank import dealt
from ds_lowrank.state_dict.pieces import EIGHT_BIT_KEY, PARTS_KEY

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp64": {"dtype": torch.float64},
    "bf16-states": {"state_dtype": "bf16"},
    "int8": {"state_dtype": "int8"},
    "bf16": {"dtype": torch.bfloat16, "stochastic_rounding": True},
    "bf16-int8": {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_dtype": "int8"},
    "bf16-nearest": {"dtype": torch.bfloat16},
}
# Of no and one element; shorter than a block; cut within a row; in two groups.
REST: dict[str, tuple[int, ...]] = {"one": (), "none": (0, 4), "bias": (37,), "embed": (33, 29), "norm": (200,)}


class Trainer:
    """A matrix that is projected and what is not, with given gradients, on this thread.

    Args:
        size: number of ranks.
        options: of the optimizer, and ``dtype``.
    """

    def __init__(self, size: int, dtype: torch.dtype = torch.float32, **options: Any):
        drawn = torch.Generator().manual_seed(0)
        tensors = {n: torch.randn(s, generator=drawn).to(dtype) for n, s in {**REST, "w": (40, 12)}.items()}
        self.parameters = {n: nn.Parameter(t) for n, t in tensors.items()}
        self._make(size, options)

    def _make(self, size: int, options: dict[str, Any]) -> None:
        named = list(self.parameters.items())
        groups: list[dict[str, Any]] = [
            {"params": named[:3], "weight_decay": 0.0},
            {"params": named[-1:], "rank": 3},
            {"params": named[3:-1]},
        ]
        self.optimizer = LowRankAdamW(
            groups, lr=0.03, update_proj_gap=2, weight_decay=0.1, gram_dtype="float64", **options
        )
        self.layout = WholeLayout(self.optimizer.members, ranks_of("ddp" if size > 1 else "one", size))
        self.done = 0

    def step(self, missing: tuple[str, ...] = ()) -> None:
        drawn = torch.Generator().manual_seed(100 + self.done)
        for name, p in self.parameters.items():
            gradient = torch.randn(p.shape, dtype=torch.float64, generator=drawn).to(p.dtype)
            p.grad = None if name in missing else gradient
        with current(self.layout):
            self.optimizer.step()
        self.done += 1

    def save(self) -> Any:
        """A copy of the whole state, from rank 0 on all."""
        with current(self.layout):
            self.optimizer.consolidate_state_dict(None)
            return copy.deepcopy(self.optimizer.state_dict())

    def load(self, state: Any, weights: dict[str, Tensor], done: int, found: bool = True) -> None:
        """Go on with a state; ``found``: the layout is known before."""
        for name, p in self.parameters.items():
            p.data.copy_(weights[name])
        with current(self.layout):
            if found:
                self.optimizer.ensure_state()
            self.optimizer.load_state_dict(state)
        self.done = done

    @property
    def weights(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.parameters.items()}

    @property
    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Of what is not projected, on this rank."""
        kept: Any = self.optimizer.state
        table = kept.get(EIGHT_BIT_KEY) or kept.get(PARTS_KEY)
        if table is None:
            table = {n: kept[p] for n, p in self.parameters.items() if p in kept}
        return {n: {k: v for k, v in s.items() if k.startswith("exp_avg")} for n, s in table.items()}


def trained(
    size: int, options: dict[str, Any], steps: int = 5
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    trainer = Trainer(size, **options)
    for _ in range(steps):
        trainer.step()
    return trainer.weights, trainer.moments


@pytest.mark.parametrize("numbers", [1 << 23, 150])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
def test_parts_step_as_the_whole_does_bit_by_bit(options, ranks, numbers, monkeypatch):
    """torch's fused kernel computes element by element, in vectors that begin where a block of 64 does."""
    monkeypatch.setattr(dealt, "PORTION_NUMBERS", numbers)  # all at once, or a few blocks at a time
    with pytest.warns(UserWarning, match="bf16") if options == FORMATS["bf16-nearest"] else _nothing():
        ((alone, _),) = run_ranks(1, trained, 1, options)
        told = run_ranks(ranks, trained, ranks, options)
    for weights, _ in told:
        assert all(torch.equal(weights[name], alone[name]) for name in REST)
        assert all(torch.equal(weights[name], told[0][0][name]) for name in weights)


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(
    "options", [FORMATS["fp32"], FORMATS["bf16-states"], FORMATS["int8"]], ids=["fp32", "bf16", "int8"]
)
def test_a_rank_keeps_moments_of_its_part_alone(options, ranks):
    ((_, whole),) = run_ranks(1, trained, 1, options)
    parts = [moments for _, moments in run_ranks(ranks, trained, ranks, options)]
    kept = [state_bytes(moments) for moments in parts]
    assert sum(kept) == state_bytes(whole)
    # Each of two groups may give a rank a block more, and of four parameters the last block is not full.
    assert max(kept) <= sum(kept) / ranks + 3 * 2 * (64 * 4 + 4)
    for name, state in whole.items():
        for key, values in state.items():
            assert torch.equal(torch.cat([p[name][key] for p in parts]), values.reshape(-1)), f"{key} of {name}"


@pytest.mark.parametrize(("saved", "loaded"), [(1, 3), (2, 1), (2, 3), (3, 2), (4, 4)])
@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS.keys())
@pytest.mark.filterwarnings("ignore:the weights are bf16")
def test_what_some_ranks_save_others_go_on_with(options, saved, loaded):
    def save(size: int) -> Any:
        trainer = Trainer(size, **options)
        for _ in range(3):
            trainer.step()
        state, weights = trainer.save(), trainer.weights
        for _ in range(2):
            trainer.step()
        return state, weights, trainer.weights

    def load(size: int, state: Any, weights: dict[str, Tensor], found: bool) -> dict[str, Tensor]:
        trainer = Trainer(size, **options)
        trainer.load(copy.deepcopy(state), weights, 3, found)
        for _ in range(2):
            trainer.step()
        return trainer.weights

    ((one, *_),) = run_ranks(1, save, 1)
    state, weights, end = run_ranks(saved, save, saved)[0]
    assert state["state"].keys() == one["state"].keys()
    for number, mine in state["state"].items():
        whole = one["state"][number]
        assert mine.keys() == whole.keys()
        for key in mine:
            there = (mine[key].shape, mine[key].dtype)
            assert there == (whole[key].shape, whole[key].dtype), key
    for found in (True, False):
        for there in run_ranks(loaded, load, loaded, state, weights, found):
            assert all(torch.equal(there[name], end[name]) for name in REST)


def test_a_loaded_state_waits_on_the_cpu_and_hangs_on_no_parameter():
    """Whole moments on the device until the first step would be the peak of a resumed run."""

    def rank(found: bool) -> tuple[int, set[type], int]:
        trainer = Trainer(2)
        trainer.step()
        other = Trainer(2)
        other.load(trainer.save(), trainer.weights, 1, found)
        before = len(other.optimizer.state)
        other.step()
        return before, {type(key) for key in other.optimizer.state}, state_bytes(other.moments)

    ((_, whole),) = run_ranks(1, trained, 1, {})
    for found, hanging in ((True, 0), (False, len(REST))):  # before the layout is known it may hang on them
        told = run_ranks(2, rank, found)
        assert [before for before, *_ in told] == [hanging] * 2
        assert all(kinds == {str} for _, kinds, _ in told)
        assert sum(kept for *_, kept in told) == state_bytes(whole)


@pytest.mark.parametrize("found", [True, False])
def test_what_has_an_empty_state_starts_anew(found):
    def rank() -> tuple[float, float]:
        trainer = Trainer(2)
        trainer.step()
        state = trainer.save()
        state["state"][trainer.optimizer.param_groups[0]["param_names"].index("bias")] = {}
        trainer.load(state, trainer.weights, 1, found)
        trainer.step()
        kept: Any = trainer.optimizer.state[PARTS_KEY]  # type: ignore[index]
        return float(kept["bias"]["step"]), float(kept["norm"]["step"])

    assert run_ranks(2, rank) == [(1, 2)] * 2


def test_a_parameter_with_a_gradient_on_no_rank_stands_still_and_counts_no_step():
    def rank(size: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
        trainer = Trainer(size)
        trainer.step()
        before = trainer.weights
        trainer.step(missing=("embed", "bias"))
        after = trainer.weights
        trainer.step()
        names = [n for group in trainer.optimizer.param_groups for n in group["param_names"]]
        saved = trainer.save()["state"]
        steps = [float(saved[names.index(n)]["step"]) for n in ("embed", "norm")]
        return before, {**after, "end": trainer.weights["embed"]}, steps

    ((_, alone, _),) = run_ranks(1, rank, 1)
    for before, after, steps in run_ranks(3, rank, 3):
        assert all(torch.equal(before[name], after[name]) for name in ("embed", "bias"))
        assert not torch.equal(before["norm"], after["norm"])
        assert torch.equal(after["end"], alone["end"])
        assert steps == [2, 3]


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["fp32", "int8"])
def test_an_added_group_and_a_frozen_parameter_change_nothing_for_the_others(options):
    def rank(size: int) -> dict[str, Tensor]:
        trainer = Trainer(size, **options)
        trainer.step()
        more = nn.Parameter(torch.linspace(-1, 1, 190).view(19, 10))
        trainer.optimizer.add_param_group({"params": [("more", more)]})
        trainer.parameters["more"] = more
        trainer.layout = trainer.layout.renewed(trainer.optimizer.members, trainer.optimizer.param_groups)
        trainer.step()
        trainer.parameters["norm"].requires_grad_(False)
        trainer.step()
        trainer.parameters["norm"].requires_grad_(True)
        trainer.step()
        return trainer.weights

    (alone,) = run_ranks(1, rank, 1)
    for there in run_ranks(3, rank, 3):
        assert all(torch.equal(there[name], alone[name]) for name in (*REST, "more"))


@pytest.mark.parametrize("kind", ["complex", "channels_last", "transposed", "transposed-bf16"])
def test_numbers_and_memory_of_other_kinds(kind):
    dtype = {"complex": torch.complex64, "transposed-bf16": torch.bfloat16}.get(kind, torch.float32)

    def rank(size: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(0)
        start = torch.randn(9, 5, 3, 3, dtype=dtype, generator=drawn)
        if kind == "channels_last":
            start = start.to(memory_format=torch.channels_last)
        elif kind.startswith("transposed"):
            start = start.mT.contiguous().mT
        options = {"stochastic_rounding": True} if dtype == torch.bfloat16 else {}
        groups: list[dict[str, Any]] = [{"params": [("kernel", nn.Parameter(start))]}]
        groups.append({"params": [("w", nn.Parameter(torch.ones(12, 9, dtype=dtype if options else None)))], "rank": 2})
        optimizer = LowRankAdamW(groups, lr=0.03, **options)
        layout = WholeLayout(optimizer.members, ranks_of("ddp" if size > 1 else "one", size))
        kernel = groups[0]["params"][0]
        for _ in range(4):
            kernel.grad = torch.randn(9, 5, 3, 3, dtype=dtype, generator=drawn)
            with current(layout):
                optimizer.step()
        with current(layout):
            optimizer.consolidate_state_dict(None)
            entry = optimizer.state_dict()["state"][0]
        assert kernel.stride() == start.stride()
        return kernel.detach().contiguous(), entry["exp_avg"].contiguous()

    ((weights, moment),) = run_ranks(1, rank, 1)
    for there, kept in run_ranks(3, rank, 3):
        # What is not row-major is stepped in another order of its elements on one process.
        close = torch.equal if kind == "complex" else torch.allclose
        assert close(there, weights)
        assert close(kept, moment)
    assert len({pickle.dumps(there.view(-1).tolist()) for there, _ in run_ranks(3, rank, 3)}) == 1


@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}], ids=["fp32", "int8"])
def test_a_report_counts_the_parts(options):
    def rank() -> tuple[int, int, int]:
        trainer = Trainer(3, **options)
        trainer.step()
        with current(trainer.layout):
            told = describe(trainer.optimizer)
        kept: Any = trainer.optimizer.state["lowrank"]  # type: ignore[index]
        low = state_bytes(
            {k: v for k, v in kept["w"].items() if k.startswith(("exp_avg", "basis")) and k != "basis_row"}
        )
        return told.state_bytes[this_rank()], low + state_bytes(trainer.moments), max(told.adamw_bytes)

    for said, found, adamw in run_ranks(3, rank):
        assert abs(said - found) <= 3 * 2 * (64 * 4 + 4)
        assert adamw > 8 * (33 * 29 + 200)  # which every rank has all of


def test_one_gather_of_each_dtype_and_group_is_what_travels():
    def rank(size: int) -> int:
        trainer = Trainer(size)
        trainer.step()
        trainer.optimizer.comm.reset()
        trainer.step()
        return trainer.optimizer.comm.sent_bytes["weights not projected"]

    # Groups of 1 + 1 and of 15 + 4 blocks: on four ranks the largest part has 64 and 5 * 64 numbers at most.
    for sent in run_ranks(4, rank, 4):
        assert 0 < sent <= 3 * 4 * (64 + 5 * 64)
    assert run_ranks(1, rank, 1) == [0]


def refused(change: Callable[[Any], Any], size: int = 2) -> None:
    """A copied optimizer whose state ``change`` has changed, on rank 1."""

    def rank() -> None:
        trainer = Trainer(size)
        trainer.step()
        own: Any = trainer.optimizer.state[PARTS_KEY]  # type: ignore[index]
        if this_rank() == 1:
            change(own)
        trainer.optimizer = copy.deepcopy(trainer.optimizer)
        trainer.layout = WholeLayout(trainer.optimizer.members, ranks_of("ddp", size))
        with current(trainer.layout):
            trainer.optimizer.ensure_state()

    run_ranks(size, rank)


def test_a_copied_optimizer_goes_on_with_its_parts_and_with_no_others():
    refused(lambda own: None)

    def other(own: Any) -> None:
        own["embed"]["start"] = 0

    with pytest.raises(RankError, match=r"\(rank 1\): start of embed \(33, 29\) is of another rank's part"):
        refused(other)
    with pytest.raises(RankError, match=r"\(rank 1\): of norm it has 9 steps, and on rank 0 1 steps"):
        refused(lambda own: own["norm"]["step"].fill_(9.0))
    with pytest.raises(RankError, match=r"\(rank 1\): it has 'gone', which is no parameter here"):
        refused(lambda own: own.update(gone=own["norm"]))
    with pytest.raises(RankError, match=r"\(rank 1\): norm \(200,\) has no exp_avg"):
        refused(lambda own: own["norm"].pop("exp_avg"))
