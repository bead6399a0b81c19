"""What benchmarks count on the wire is what gloo's algorithms send."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import wire
from wire import COLUMNS, Meter, Traffic, beyond, cases

NUMBERS = 250_000


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_step_is_split_where_the_updates_begin(pools, ranks):
    """Traffic that goes past the count, and updates that are counted as gradients."""
    for gradient, update in pools(ranks).run(_counted):
        assert gradient == pytest.approx(2 * (ranks - 1) / ranks * 4 * NUMBERS, rel=0.02)
        assert update == pytest.approx((ranks - 1) * 4 * NUMBERS, rel=0.02)


class _Sends:
    """A run of which is known what it sends."""

    def __init__(self) -> None:
        self.optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])

    def step(self, losses: list) -> None:
        dist.all_reduce(torch.ones(NUMBERS))
        self.optimizer.step()
        dist.all_gather([torch.empty(NUMBERS) for _ in range(dist.get_world_size())], torch.ones(NUMBERS))


def _counted() -> tuple[int, int]:
    meter = Meter(_Sends())
    meter.step([])  # connections are made
    return meter.step([])


def test_every_layout_has_its_contenders():
    wanted = cases(["ddp", "zero2"], {"llama_60m": [64, 128]}, 20, 40, ["full", "bf16 hook"])
    assert [(t.layout, t.rank, t.gradients) for t in wanted] == [
        *[("ddp", r, g) for r in (64, 128) for g in ("full", "bf16 hook")],
        *[("zero2", r, "full") for r in (64, 128)],
    ]


def test_ratios_are_to_runs_of_the_same_layout(monkeypatch):
    """Ratios to another layout's ``full``, and bounds that nothing is held to."""
    sent = {("ddp", "full"): 100, ("ddp", "AdamW"): 80, ("fsdp2", "full"): 50, ("ddp", "projected"): 40}

    def row(case: Traffic, ranks: int) -> dict:
        row = {**dict.fromkeys(COLUMNS), "layout": case.layout, "gradients": case.gradients, "required": 0.3}
        return {**row, "gradient_bytes": sent[case.layout, case.gradients] - 10, "update_bytes": 10}

    monkeypatch.setattr(wire, "_row", row)
    wanted = [Traffic(layout, "llama_60m", 128, gradients, 20, 40) for layout, gradients in sorted(sent)]
    rows = list(wire.wire_rows(wanted, 2))
    assert [(r["ratio_to_full"], r["ratio_to_adamw"]) for r in rows] == [(0.8, 1), (1, 1.25), (0.4, 0.5), (1, None)]
    assert [r["gradients"] for r in beyond(rows)] == ["AdamW", "full", "projected"]
