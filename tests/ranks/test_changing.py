"""Under several ranks: what is trained changes, groups are added, and optimizers are copied."""

import copy
import logging

import pytest
import torch
import torch.distributed as dist
from harness import whole
from torch import nn

import ds_lowrank
from ds_lowrank import LayoutError
from ds_lowrank.optimizer import STATE_KEY


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.Linear(10, 14), nn.Linear(14, 9), nn.Linear(9, 12)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x.square().mean()


def group_pairs(model, layer):
    part = model.layers[layer]
    low = {"params": [(f"{layer}.weight", part.weight)], "rank": 3, "update_proj_gap": 3}
    return [low, {"params": [(f"{layer}.bias", part.bias)]}]


def batch(step, rank):
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(10 * step + rank))


class Training:
    """One process that sees what both ranks see, or two under DDP or FSDP2."""

    def __init__(self, layout, state_dtype):
        self.layout, self.model = layout, Net()
        if layout == "fsdp2":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=init_device_mesh("cpu", (2,)))
        groups = [g for layer in (0, 1) for g in group_pairs(self.model, layer)]
        options = {"wave_size": 1, "gram_dtype": "float64", "state_dtype": state_dtype}
        self.optimizer = ds_lowrank.LowRankAdamW(groups, lr=0.05, **options)

    def freeze(self, *layers):
        for k, layer in enumerate(self.model.layers):
            layer.requires_grad_(k not in layers)

    def train(self, *steps):
        # DistributedDataParallel averages what is trainable when it wraps.
        wrapped = nn.parallel.DistributedDataParallel(self.model) if self.layout == "ddp" else self.model
        for step in steps:
            if self.layout == "one":
                sum(wrapped(batch(step, rank)) / 2 for rank in (0, 1)).backward()
            else:
                wrapped(batch(step, dist.get_rank())).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def weights(self):
        return [whole(p.detach()).clone() for p in self.model.parameters()]


def change(layout, state_dtype="fp32"):
    run = Training(layout, state_dtype)
    start = run.weights()
    run.freeze(0, 2)  # one in the groups, one not yet
    run.train(0, 1)
    still = [torch.equal(a, b) for a, b in zip(start, run.weights())]
    for group in group_pairs(run.model, 2):
        run.optimizer.add_param_group(group)
    run.freeze()
    run.train(2, 3)
    run.freeze(1)
    before = run.weights()
    run.train(4, 5)
    still += [torch.equal(a, b) for a, b in zip(before, run.weights())]
    run.freeze()
    run.train(6, 7, 8)
    other = copy.copy(run)
    if layout == "ddp":  # FSDP2's modules refuse a copy
        other.model, other.optimizer = copy.deepcopy((run.model, run.optimizer))
    run.train(9, 10, 11)
    if layout == "ddp":
        other.train(9, 10, 11)
    copied = all(map(torch.equal, run.weights(), other.weights()))
    states = run.optimizer.state[STATE_KEY]
    owned = [name for name, state in states.items() if "overlaps" in state]
    return start, run.weights(), still, owned, copied


@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_freezing_and_adding_take_the_way_of_one_process(pools, layout, state_dtype):
    start, alone, still, _, _ = change("one", state_dtype)
    assert still == [True, True, False, False, True, True, False, False, True, True, False, False]
    answers = pools(2).run(change, layout, state_dtype)
    for _, together, stood, _, copied in answers:
        assert stood == still
        assert copied
        for a, b, c in zip(together, alone, start):
            assert (a - b).norm() < (1e-5 if state_dtype == "fp32" else 2e-2) * (b - c).norm()
    assert sorted(answers[0][3] + answers[1][3]) == ["0.weight", "1.weight", "2.weight"]


def set_free_behind_ddps_back():
    run = Training("ddp", "fp32")
    run.freeze(0)
    wrapped = nn.parallel.DistributedDataParallel(run.model, find_unused_parameters=True)
    said = []
    for step in range(3):
        if step == 2:
            run.freeze()
        wrapped(batch(step, dist.get_rank())).backward()
        try:
            run.optimizer.step()
        except LayoutError as error:
            said.append(str(error))
        run.optimizer.zero_grad()
    return said


def test_gradients_that_ddp_does_not_average_are_noticed_when_they_come(pools):
    """DistributedDataParallel averages what was trainable when it wrapped: replicas would drift apart unseen."""
    for said in pools(2).run(set_free_behind_ddps_back):
        assert len(said) == 1
        assert "the gradients of 0.weight differ" in said[0]
        assert "anew where a parameter was frozen when it was wrapped" in said[0]


def what_is_said_at_first():
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = logging.getLogger("ds_lowrank.optimizer"), Keep()
    logger.addHandler(handler)
    try:
        for knows in (False, True):
            run = Training("ddp", "fp32")
            if knows:
                run.optimizer.consolidate_state_dict()
            run.freeze(2)
            run.train(0, 1)
    finally:
        logger.removeHandler(handler)
    return records


def test_the_first_step_says_once_and_on_rank_0_that_saves_need_a_call(pools):
    first, second = pools(2).run(what_is_said_at_first)
    assert len(first) == 1
    assert "call optimizer.consolidate_state_dict() on all ranks" in first[0]
    assert second == []


def deepspeed_engine(stage, frozen=(), more=(), prefix=""):
    """``more`` are full-rank parameters, by name; ``prefix`` goes before the names of the others."""
    import deepspeed

    model = Net()
    groups = [g for layer in range(3) for g in group_pairs(model, layer)]
    groups = [{**low, "params": [p for g in groups[0::2] for p in g["params"]]} for low in groups[:1]] + [
        {"params": [p for g in groups[1::2] for p in g["params"]]}
    ]
    for group in groups:
        group["params"] = [(prefix + name, parameter) for name, parameter in group["params"]]
    for name, parameter in more:
        model.register_parameter(name, parameter)
        groups[1]["params"].append((name, parameter))
    optimizer = ds_lowrank.LowRankAdamW(groups, lr=0.05)
    for layer in frozen:
        model.layers[layer].requires_grad_(False)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 150},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return model, optimizer, engine


def under_deepspeed(stage, early):
    model, optimizer, engine = deepspeed_engine(stage, frozen=[1] if early else [])
    frozen = model.layers[1]

    def train(*steps):
        for step in steps:
            engine.backward(engine(batch(step, dist.get_rank())))
            engine.step()

    def weights():
        return [whole(p).clone() for p in model.parameters()]

    def moved(*steps):
        before = weights()
        train(*steps)
        return [not torch.equal(a, b) for a, b in zip(before, weights())]

    said = []
    if not early:
        train(0, 1)
        frozen.requires_grad_(False)
    first = moved(2, 3)
    try:
        optimizer.add_param_group({"params": [("more", nn.Parameter(torch.ones(3)))]})
    except ValueError as error:
        said.append(str(error))
    try:
        copy.deepcopy(optimizer)
    except TypeError as error:
        said.append(str(error))
    frozen.requires_grad_(True)
    try:
        second = moved(4, 5)
    except LayoutError as error:
        second = str(error)
    engine.destroy()
    return first, second, said


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("early", [False, True])
def test_deepspeed_trains_what_was_trainable_in_initialize(pools, stage, early):
    for first, second, said in pools(2).run(under_deepspeed, stage, early):
        assert first == [True, True, False, False, True, True]
        if early:
            assert "1.weight (9, 14) was frozen, or not there, in deepspeed.initialize()" in second
        else:
            assert second == [True] * 6
        assert "cannot be added after deepspeed.initialize()" in said[0]
        assert "flat buffers of the engine and cannot be copied" in said[1]


def freed_by_a_new_start(stage, folder):
    answers = []
    for frozen in ([1], []):
        # What has no elements DeepSpeed puts into no buffer, either; its stage 3 cannot have it.
        more = [("empty", nn.Parameter(torch.ones(0, 4)))] if stage < 3 else []
        model, optimizer, engine = deepspeed_engine(stage, frozen, more, "layers.")
        if not frozen:
            loaded = ds_lowrank.load_checkpoint(folder, engine, optimizer)
            answers.append((loaded.matrices, loaded.fresh))
            answers.append([whole(p).clone() for p in model.parameters()])
        for step in (0, 1):
            engine.backward(engine(batch(step, dist.get_rank())))
            engine.step()
        if frozen:
            engine.save_checkpoint(str(folder))
        answers.append([whole(p).clone() for p in model.parameters()])
        engine.destroy()
    return answers


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_was_frozen_in_initialize_is_trained_by_a_new_start_from_a_checkpoint(pools, tmp_path, stage):
    """As the refusal advises: the frozen weights are in DeepSpeed's files, and in none of our optimizer's."""
    for saved, counts, loaded, after in pools(2).run(freed_by_a_new_start, stage, tmp_path):
        assert counts == (2, 1)
        assert all(map(torch.equal, saved, loaded))
        assert [torch.equal(a, b) for a, b in zip(loaded, after)] == [p.numel() == 0 for p in after]
