"""The threads themselves: what would hang, or be a chance, on process groups fails at once and says who waits."""

from __future__ import annotations

import pytest
import torch
from thread_cases import Case, Run
from thread_ranks import Group, RankError, ThreadDist, run_ranks, this_rank

from ds_lowrank.comm.collectives import Comm
from ds_lowrank.layouts.base import Ranks


def comm(size: int) -> Comm:
    return Comm(Ranks(Group(tuple(range(size))), this_rank(), size))


def exchange(comm: Comm) -> list[torch.Tensor]:
    size, rank = comm.ranks.size, comm.ranks.rank
    send = [[torch.full((rank + 1,), 10.0 * rank + k)] for k in range(size)]
    return comm.exchange(send, [k + 1 for k in range(size)], torch.float32, "rows").wait()


def test_collectives_bring_what_they_should():
    def rank():
        there, me = comm(3), this_rank()
        rows = exchange(there)
        gathered = there.all_gather(torch.full((me,), float(me)), [0, 1, 2], "bases").wait()
        total = there.reduce(torch.tensor([1.0 + me]), 1, "Gram matrices").wait()
        return (
            [r.tolist() for r in rows],
            [g.tolist() for g in gathered],
            total.item() if me == 1 else None,
            there.all_reduce(torch.tensor([2.0**me]), "overlaps").wait().item(),
            there.maximum(torch.tensor([me]), "scales").wait().item(),
            there.gather_objects({"rank": me}),
            there.sent_bytes["rows"],
        )

    answers = run_ranks(3, rank)
    for me, (rows, gathered, total, added, most, objects, sent) in enumerate(answers):
        assert rows == [[10.0 * k + me] * (k + 1) for k in range(3)]
        assert gathered == [[], [1.0], [2.0, 2.0]]
        assert total == (6.0 if me == 1 else None)
        assert (added, most, objects) == (7.0, 2, [{"rank": k} for k in range(3)])
        assert sent == 2 * 4 * (me + 1)


def test_a_rank_that_does_not_come_is_named_at_once():
    waits = r"sum of overlaps failed on rank \d: deadlock: rank 0 waits for ranks \[2\] in a sum.*rank 2 has returned"
    with pytest.raises(RankError, match=waits):
        run_ranks(3, lambda: None if this_rank() == 2 else comm(3).all_reduce(torch.ones(2), "overlaps").wait())


def test_a_rank_that_raises_releases_the_others_and_is_the_one_that_is_told():
    def rank():
        if this_rank() == 1:
            raise ValueError("a bad rank")
        return comm(3).gather_objects(1)

    with pytest.raises(RankError, match="rank 1 of 3: ValueError: a bad rank"):
        run_ranks(3, rank)


def test_other_collectives_in_another_order_are_named():
    def rank():
        there = comm(2)
        if this_rank():
            return exchange(there)
        return there.all_gather(torch.ones(1), [1, 1], "weights").wait()

    other = r"all-to-all of rows failed on rank 1.*starts an all-to-all where ranks \[0\] have started an all-gather"
    with pytest.raises(RankError, match=other):
        run_ranks(2, rank)


def test_waiting_for_each_other_is_a_deadlock_and_not_a_wait():
    def rank():
        groups = [Group((0, 1)), Group((0, 1, 2)[1:]), Group((0, 2))]
        mine = [(0, 2), (1, 0), (2, 1)][this_rank()]
        for place in mine:  # each begins with another one
            ThreadDist.all_reduce(torch.ones(1), group=groups[place])

    with pytest.raises(RankError, match="deadlock: rank 0 waits for ranks"):
        run_ranks(3, rank)


def test_sizes_that_do_not_meet_are_named():
    def rank():
        there = comm(2)
        send = [[torch.ones(2)], [torch.ones(2)]]
        return there.exchange(send, [2, 2 + this_rank()], torch.float32, "updates").wait()

    with pytest.raises(
        RankError, match=r"all-to-all of updates failed on rank 1.*rank 1 sends rank 1 2 numbers, not 3"
    ):
        run_ranks(2, rank)


def test_what_is_on_its_way_can_neither_be_read_nor_changed():
    def early():
        tensor = torch.ones(2)
        comm(2).all_reduce(tensor, "overlaps")
        assert tensor.isnan().all()

    run_ranks(2, early)

    def changed():
        mine = torch.ones(3)
        pending = comm(2).all_gather(mine, [3, 3], "weights")
        mine.zero_()
        pending.wait()

    with pytest.raises(RankError, match="was changed before the collective had ended"):
        run_ranks(2, changed)


def test_a_rank_that_makes_no_step_is_named_with_the_collective():
    def rank():
        run = Run(Case("fsdp2", 2))
        run.step()
        if this_rank() == 0:
            run.step()

    with pytest.raises(
        RankError, match=r"all-to-all of gradient rows failed on rank 0: deadlock: .*rank 1 has returned"
    ):
        run_ranks(2, rank)
