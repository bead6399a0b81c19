"""Under DDP ranks may have unequal numbers of batches: those that have none left go on with the others' steps."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join

import ds_lowrank

BATCHES = (3, 8)  # of rank 0 and rank 1: refreshes at steps 0, 3 and 6


def model_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 6))


def build(model, **options):
    options = {"rank": 3, "update_proj_gap": 3, "lr": 0.05, "gram_dtype": "float64", **options}
    optimizer = ds_lowrank.build_optimizer(model, options)
    return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def loss_of(model, rank, batch):
    x = torch.randn(8, 10, generator=torch.Generator().manual_seed(100 * rank + batch))
    return model(x).square().mean()


def train_together(accumulation):
    rank = dist.get_rank()
    model = model_of()
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer, schedule = build(model)
    with Join([wrapped, optimizer]):
        for step in range(BATCHES[rank]):
            for micro in range(accumulation - 1):
                with wrapped.no_sync():
                    loss_of(wrapped, rank, step + 50 * (micro + 1)).backward()
            loss_of(wrapped, rank, step).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    kept = [group["lr"] for group in optimizer.param_groups]
    optimizer.consolidate_state_dict(None)
    steps = [int(s["step"]) for s in optimizer.state_dict()["state"].values()]
    return [p.detach().clone() for p in model.parameters()], steps, kept


@pytest.mark.parametrize("accumulation", [1, 2])
def test_ranks_without_data_take_part_in_the_others_steps(pools, accumulation):
    """As one process that adds up what each rank has; the schedule of a rank that has stopped stands still."""
    model = model_of()
    optimizer, schedule = build(model)
    for step in range(max(BATCHES)):
        batches = [step, *(step + 50 * k for k in range(1, accumulation))]
        (sum(loss_of(model, r, b) for r in (0, 1) if step < BATCHES[r] for b in batches) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    (first, steps, lr), (second, *_) = pools(2).run(train_together, accumulation)
    assert all(map(torch.equal, first, second))
    start = model_of()
    for together, alone, before in zip(first, model.parameters(), start.parameters()):
        assert (together - alone).norm() < 1e-5 * (alone - before).norm()
    assert set(steps) == {max(BATCHES)}
    assert lr == pytest.approx([0.05 * 0.8 ** BATCHES[0]] * len(lr))


def refuse(how):
    model = model_of()
    wrapped = nn.parallel.DistributedDataParallel(model)
    if how == "layerwise":
        optimizer, _ = build(model, layerwise=True)
        try:
            Join([wrapped, optimizer])
        except ValueError as error:
            return str(error)
        return None
    optimizer, _ = build(model)
    context = Join([optimizer, wrapped]) if how == "first" else wrapped.join()
    try:
        with context:
            loss_of(wrapped, 0, 0).backward()
            optimizer.step()
    except ds_lowrank.LayoutError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("join", "does not let ranks without data take part: write with"),
        ("first", "comes before the model"),
        ("layerwise", "layerwise"),
    ],
)
def test_what_would_hang_is_refused_on_all_ranks_at_the_first_step(pools, how, message):
    for said in pools(2).run(refuse, how):
        assert said is not None
        assert message in said
