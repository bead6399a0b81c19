"""DeepSpeed's stages 1 to 3 with projected gradients: matrices that its optimizer is not given."""

from __future__ import annotations

import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case, Follower, arguments, build_model
from harness import DeepSpeedRun, deepspeed_config, start, whole
from torch import Tensor

import ds_lowrank
from ds_lowrank.checkpoint.opening import open_checkpoint
from ds_lowrank.optimizer import STATE_KEY

STAGES = ("zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Projected(Case):
    """A case with projected gradients.

    Attributes:
        gradients, accumulator_dtype: options of the optimizer.
        alone: step from which odd ranks leave layer 0 out.
    """

    gradients: str = "projected"
    accumulator_dtype: str = "fp32"
    alone: int = 1000

    @property
    def options(self) -> dict[str, Any]:
        own = {"gradients": self.gradients, "accumulator_dtype": self.accumulator_dtype}
        return {**super().options, **own}


def brief(ranks: int, **settings: Any) -> Projected:
    return Projected(**{"gap": 3, "steps": 7, "layers": 4 if ranks == 3 else 3, **settings})


def begin(case: Projected, model: Any = None) -> DeepSpeedRun:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*clamped to.*")
        return start(case, build_model(case) if model is None else model)  # type: ignore[return-value]


def weights_of(run: DeepSpeedRun) -> dict[str, Tensor]:
    """As the model computes with them. Collective."""
    return {name: whole(p).clone() for name, p in run.model.named_parameters()}


def inputs(case: Projected, step: int) -> list[dict[str, Any]]:
    return [given(case, step, micro, dist.get_rank()) for micro in range(case.accumulation)]


def given(case: Projected, step: int, micro: int, rank: int) -> dict[str, Any]:
    return {**arguments(case, step, micro, rank), "silent": step >= case.alone and rank % 2 == 1}


class Local:
    """A reference that is given every rank's and micro-batch's own gradient, of the weights that the run has."""

    def __init__(self, case: Projected, run: DeepSpeedRun):
        self.case, self.model = case, build_model(case)
        self.follower = Follower(case, run.optimizer, free=False)
        self.reference = self.follower.reference
        wire = run.engine.communication_data_type
        self.reference.wire = wire if wire == torch.bfloat16 else None
        self.reference.replicas = 1 if case.layout == "zero3" else dist.get_world_size()
        self.reference.copies = (tuple(range(dist.get_world_size())),)
        self.parameters = dict(self.model.named_parameters())

    def step(self, step: int, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Weights after a step from ``weights``, float32, and the norm before the clip."""
        follower, reference = self.follower, self.reference
        for name, p in self.parameters.items():
            p.data.copy_(weights[name])
            follower.weights[name].copy_(weights[name])
        for micro in range(self.case.accumulation):
            local = []
            for rank in range(dist.get_world_size()):
                self.model.zero_grad()
                loss = self.model(**given(self.case, step, micro, rank))
                (loss / self.case.accumulation).backward()
                zeros = {n: torch.zeros_like(p) for n, p in self.parameters.items()}
                own = {n: (zeros[n] if p.grad is None else p.grad).float() for n, p in self.parameters.items()}
                stacked = {s.name: own[s.parameter][s.index] for s in follower.specs if s.index is not None}
                local.append({**own, **stacked})
            reference.add(local)
        norm = reference.norm()
        factor = 1 / max(1.0, (norm + 1e-6) / self.case.clip) if self.case.clip else 1.0
        before = {n: follower.weights[n].clone() for n in follower.undecayed}
        reference.step_added(factor)
        for n, w in before.items():
            follower.weights[n].add_(w, alpha=reference.lr * reference.weight_decay)
        return {n: w.clone() for n, w in follower.weights.items()}, norm


def follow(case: Projected) -> dict[str, Any]:
    """How far the run is from the reference, step by step."""
    run = begin(case)
    local = Local(case, run)
    matrices = {spec.parameter for spec in run.optimizer.matrix_specs}
    far, off, norms, alive = 0.0, 0.0, 0.0, False
    for step in range(case.steps):
        before = weights_of(run)
        expected, norm = local.step(step, before)
        for arguments_ in inputs(case, step):
            run.engine.backward(run.engine(**arguments_))
            alive |= any(p.grad is not None for n, p in run.model.named_parameters() if n.startswith("layers"))
            run.engine.step()
        after = weights_of(run)
        norms = max(norms, abs(float(run.engine.get_global_grad_norm()) - norm) / norm)
        for name, w in after.items():
            moved = (expected[name] - before[name].float()).norm()
            if name in matrices and w.dtype == torch.bfloat16:
                off += float((w != expected[name].bfloat16()).double().mean()) / len(matrices) / case.steps
            else:
                far = max(far, float((w.float() - expected[name]).norm() / moved))
    final = weights_of(run)
    same = [None] * dist.get_world_size()
    dist.all_gather_object(same, final)
    states: Any = run.optimizer.state[STATE_KEY]
    result = {
        "far": far,
        "off": off,
        "norms": norms,
        "alive": alive,
        "replicas_equal": all(torch.equal(final[n], other[n]) for other in same for n in final),  # type: ignore[index]
        "refreshes": min(int(s["refreshes"]) for s in states.values()),
        "sent": dict(run.optimizer.comm.sent_bytes),
    }
    run.close()
    return result


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("layout", STAGES)
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"accumulation": 1, "clip": 0.0}, id="plain"),
        pytest.param({}, id="accumulated-clipped"),
        pytest.param({"selection": "random", "shard_projection": False}, id="random-whole-bases"),
        pytest.param({"shapes": "experts"}, id="experts"),
    ],
)
def test_steps_are_those_of_a_reference_that_is_given_every_local_gradient(pools, layout, ranks, settings):
    for found in pools(ranks).run(follow, brief(ranks, layout=layout, **settings)):
        assert found["far"] < 2e-5
        assert found["norms"] < 1e-6
        assert found["replicas_equal"]
        assert not found["alive"]  # no gradient of a matrix is left after a backward pass
        assert found["refreshes"] >= 2


@pytest.mark.parametrize("layout", ["zero1", "zero2"])
def test_a_gradient_that_is_missing_on_a_rank_counts_as_zeros(pools, layout):
    """As of an expert that none of its tokens went to. What DeepSpeed reduces itself has to be everywhere."""
    for found in pools(2).run(follow, brief(2, layout=layout, alone=2)):
        assert found["far"] < 2e-5
        assert found["norms"] < 1e-6
        assert found["replicas_equal"]


@pytest.mark.parametrize("layout", STAGES)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        # Without a clip nothing of DeepSpeed's own bf16 sums comes in.
        pytest.param({"clip": 0.0}, 1e-3, id="fp32-wire"),
        pytest.param({"clip": 0.0, "config": {"communication_data_type": "bf16"}}, 1e-3, id="bf16-wire"),
        pytest.param({}, 1e-2, id="clipped"),
    ],
)
def test_bf16_matrices_have_no_master_and_are_rounded_once(pools, layout, settings, tolerance):
    """Of ordinary bf16 the rest has fp32 masters; a second rounding, or a master, would show in every second weight."""
    for found in pools(2).run(follow, brief(2, layout=layout, dtype="bf16", **settings)):
        assert found["off"] < tolerance
        assert found["norms"] < 5e-3
        assert found["replicas_equal"]


def test_the_wire_has_the_dtype_of_deepspeeds_reductions(pools):
    wide, narrow = (
        pools(2).run(follow, brief(2, dtype="bf16", config=config))[0]["sent"]
        for config in ({}, {"communication_data_type": "bf16"})
    )
    for purpose in ("projected gradients", "whole gradients", "directions"):
        assert narrow[purpose] * 2 == wide[purpose]


@pytest.mark.parametrize("layout", STAGES)
@pytest.mark.parametrize("where", ["layers.1.0.weight", "gain"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_that_is_not_finite_is_skipped_whole(pools, layout, where, dtype):
    """On all ranks, whether a matrix or something of DeepSpeed's has it; nothing of it is left for the next step."""
    case = brief(2, layout=layout, dtype=dtype, config={"communication_data_type": "fp32"})
    for found in pools(2).run(_skip, case, where):
        assert found["skipped"] == 1
        assert found["moved"] == []
        assert found["states_equal"]
        assert found["next_equal"]


def _skip(case: Projected, where: str) -> dict[str, Any]:
    runs = [begin(case), begin(case)]
    for run in runs:
        for step in range(2):
            run.step(inputs(case, step))
    broken, plain = runs
    before = weights_of(broken)
    states: Any = broken.optimizer.state[STATE_KEY]
    kept = {name: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for name, s in states.items()}
    spoil = dict(broken.model.named_parameters())[where].register_hook(
        lambda g: g * float("nan") if dist.get_rank() == 1 else g
    )
    broken.step(inputs(case, 2))
    spoil.remove()
    after = weights_of(broken)
    same = all(
        torch.equal(v, states[name][k]) if isinstance(v, Tensor) else v == states[name][k]
        for name, s in kept.items()
        for k, v in s.items()
    )
    found = {
        "skipped": broken.engine.skipped_steps,
        "moved": [n for n in after if not torch.equal(after[n], before[n])],
    }
    for run in runs:
        run.step(inputs(case, 3))
    ours, theirs = weights_of(broken), weights_of(plain)
    equal = all(torch.equal(ours[n], theirs[n]) for n in ours)
    for run in runs:
        run.close()
    return {**found, "states_equal": same, "next_equal": equal}


@pytest.mark.parametrize("layout", STAGES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_deepspeeds_own_checkpoint_resumes_bitwise_over_noise(pools, layout, dtype):
    with tempfile.TemporaryDirectory() as folder:
        for found in pools(2).run(_resume, brief(2, layout=layout, dtype=dtype), folder):
            assert found["restored"]
            assert found["went_on"]
            assert found["converted"] is True or found["converted"] is None


def _resume(case: Projected, folder: str) -> dict[str, Any]:
    first = begin(case)
    for step in range(4):
        first.step(inputs(case, step))
    first.save(Path(folder))
    saved = weights_of(first)
    for step in range(4, 7):
        first.step(inputs(case, step))
    expected = weights_of(first)
    first.close()
    second = begin(case)
    with torch.no_grad():
        for p in second.model.parameters():
            (p.ds_tensor if hasattr(p, "ds_tensor") else p).data.normal_()  # type: ignore[attr-defined]
    second.load(Path(folder))
    loaded = weights_of(second)
    for step in range(4, 7):
        second.step(inputs(case, step))
    final = weights_of(second)
    second.close()
    converted = None
    if dist.get_rank() == 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        made = get_fp32_state_dict_from_zero_checkpoint(folder)
        converted = all(torch.equal(made[n].to(w.dtype), w) for n, w in saved.items())
    return {
        "restored": all(torch.equal(loaded[n], saved[n]) for n in saved),
        "went_on": all(torch.equal(final[n], expected[n]) for n in expected),
        "converted": converted,
    }


@pytest.mark.parametrize("layout", STAGES)
def test_a_scheduler_moves_matrices_as_it_moves_the_rest(pools, layout):
    """It sees the groups that DeepSpeed steps alone, and is made before DeepSpeed is."""
    for found in pools(2).run(_scheduled, brief(2, layout=layout)):
        assert found


def _scheduled(case: Projected) -> bool:
    import deepspeed

    still, moving = [], []
    for rate in (0.0, 1.0):
        model = build_model(case)
        config = deepspeed_config(case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ds_lowrank.deepspeed_optimizer(model, config)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, rate=rate: rate if step else 1.0)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, lr_scheduler=schedule)
        run: Any = DeepSpeedRun.__new__(DeepSpeedRun)
        run.model, run.optimizer, run.engine = model, optimizer, engine
        run.step(inputs(case, 0))
        before = weights_of(run)
        run.step(inputs(case, 1))
        after = weights_of(run)
        (moving if rate else still).extend(not torch.equal(after[n], before[n]) for n in after)
        run.close()
    return all(moving) and not any(still)


@pytest.mark.parametrize("layout", ["zero1", "zero2"])
def test_other_initial_weights_on_a_rank_are_rank_0s(pools, layout):
    """DeepSpeed broadcasts all of a model, whatever its optimizer owns."""
    first, second = pools(2).run(_broadcast, brief(2, layout=layout))
    assert first == second


def _broadcast(case: Projected) -> list[float]:
    model = build_model(case)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + dist.get_rank())
    run = begin(case, model)
    run.step(inputs(case, 0))
    sums = [float(w.double().sum()) for w in weights_of(run).values()]
    run.close()
    return sums


def test_parameters_that_stay_gathered_are_gathered_anew(pools):
    case = brief(2, layout="zero3", zero={"stage3_param_persistence_threshold": 100_000})
    for found in pools(2).run(_persistent, case):
        assert found["persistent"]
        assert found["equal"]


def _persistent(case: Projected) -> dict[str, bool]:
    run = begin(case)
    run.step(inputs(case, 0))
    held: list[Any] = [p for n, p in run.model.named_parameters() if n.startswith("layers")]
    rank = dist.get_rank()
    equal = []
    for p in held:
        share = p.ds_tensor.numel()
        flat = p.data.reshape(-1)[rank * share : (rank + 1) * share]
        equal.append(torch.equal(flat, p.ds_tensor.data[: flat.numel()]))
    found = {"persistent": all(p.data.numel() == p.ds_numel for p in held), "equal": all(equal)}
    run.close()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("first", "ranks", "second"),
    [
        (("zero2", "projected"), 3, ("zero2", "projected")),
        (("zero2", "projected"), 3, ("zero3", "projected")),
        (("zero3", "projected"), 3, ("zero1", "projected")),
        (("zero3", "projected"), 2, ("zero2", "full")),
        (("zero1", "projected"), 2, ("zero3", "full")),
        (("zero2", "full"), 3, ("zero3", "projected")),
        (("zero3", "full"), 2, ("zero1", "projected")),
    ],
)
def test_a_state_goes_on_anywhere_and_comes_back(pools, first, ranks, second, dtype):
    """What a second run saves as soon as it has loaded is what the first has saved, bit by bit."""
    cases = [brief(2, layout=layout, gradients=gradients, dtype=dtype) for layout, gradients in (first, second)]
    with tempfile.TemporaryDirectory() as folder:
        pools(2).run(_save, cases[0], f"{folder}/first", None)
        pools(ranks).run(_save, cases[1], f"{folder}/second", f"{folder}/first")
        one, other = (open_checkpoint(f"{folder}/{name}") for name in ("first", "second"))
        assert one.matrices.keys() == other.matrices.keys() != set()
        for name, shape in one.parameters().items():
            numel = torch.Size(shape).numel()
            theirs, ours = (source.elements(name, "weight", 0, numel) for source in (one, other))
            assert theirs is not None
            assert ours is not None
            if dtype == "bf16" and name != "gain":  # the master copies of full gradients are rounded for projected ones
                theirs, ours = theirs.bfloat16(), ours.bfloat16()
            assert torch.equal(theirs.float(), ours.float()), name
        for name, saved in one.matrices.items():
            assert one.numbers(name)["step"] == other.numbers(name)["step"] == 3
            for key, rows in saved.states.tensors(saved.rank, saved.dtype).items():
                size = {"rows": saved.long, "basis": saved.short, "matrix": 1}[rows.axis]
                assert torch.equal(one.rows(name, key, 0, size), other.rows(name, key, 0, size)), (name, key)


def _save(case: Projected, folder: str, loaded: str | None) -> None:
    run = begin(case)
    if loaded is None:
        for step in range(3):
            run.step(inputs(case, step))
    else:
        ds_lowrank.load_checkpoint(loaded, run.model, run.optimizer)
    run.save(Path(folder))
    run.close()


@pytest.mark.parametrize("layout", ["zero2", "zero3"])
def test_an_optimizer_made_by_hand_is_refused(pools, layout):
    """DeepSpeed was given its matrices, and reduces their gradients itself."""
    for text in pools(2).run(_by_hand, brief(2, layout=layout)):
        assert "make it by ds_lowrank.deepspeed_optimizer" in text


def _by_hand(case: Projected) -> str:
    import deepspeed

    model = build_model(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = ds_lowrank.build_optimizer(model, case.options)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(case))
    try:
        optimizer.ensure_state()
    except ds_lowrank.LayoutError as error:
        return str(error)
    finally:
        engine.destroy()
    return "no error"
