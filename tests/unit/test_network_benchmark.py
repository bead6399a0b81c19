"""What two shaped hosts' times come to, and how their link is shaped."""

from __future__ import annotations

import link
import network
import pytest
from link import MEGABIT, inside, shape


def test_a_period_has_as_many_refreshing_steps_as_the_model_has_waves() -> None:
    steps = [
        (1.0, False, 8, 0.5),
        (3.0, True, 9, 0.5),
        (1.0, False, 8, 0.5),
        (3.0, True, 9, 0.5),
        (50.0, False, 8, 0.5),
    ]
    found = network.summary(steps, waves=7)
    assert (found["seconds"], found["refresh_seconds"]) == (1.0, 3.0)
    assert found["tokens_s"] == 2 * network.LENGTH * 200 / (193 * 1.0 + 7 * 3.0)


def test_ratios_are_those_of_repetitions() -> None:
    """Medians taken first would compare a quiet moment of the one with a loud moment of the other."""
    full = [(4.0, False, 0, 0), (40.0, False, 0, 0), (6.0, False, 0, 0), (99.0, True, 0, 0)]
    other = [(2.0, False, 0, 0), (10.0, False, 0, 0), (6.0, False, 0, 0), (1.0, True, 0, 0)]
    assert network.paired(full, other) == 2.0


def test_rows_without_full_have_no_ratio_and_without_refreshes_no_time_of_one() -> None:
    found = {"steps": {"AdamW": [(1.0, False, 5_000_000, 0.25)]}, "waves": 7, "refreshing": [], "link_mbps": 95.4}
    (row,) = network.rows_of(found, "ddp", 100, 128)
    assert row["over_full"] is row["tokens_over_full"] is row["refresh_ms"] is None
    assert (row["ms"], row["cpu_ms"], row["sent_mb"], row["link_mbps"]) == (1000.0, 250.0, 5.0, 95)


@pytest.mark.parametrize(
    ("rate", "burst", "limit"),
    [
        (100 * MEGABIT, 131072, 131072 + (1 << 20)),
        (10_000 * MEGABIT, 5_000_000, 5_000_000 + 62_500_000),
    ],
)
def test_buckets_hold_what_one_tick_lets_through(rate, burst, limit) -> None:
    assert shape(rate) == ["tbf", "rate", f"{rate}bit", "burst", str(burst), "limit", str(limit)]


def test_what_needs_root_says_so(monkeypatch) -> None:
    monkeypatch.setattr(link.os, "geteuid", lambda: 1000)
    assert link.why_not() == "network namespaces and shaped links need root"
    monkeypatch.setattr(network, "why_not", link.why_not)
    monkeypatch.setattr("sys.argv", ["network.py"])
    with pytest.raises(SystemExit, match="need root"):
        network.main()


@pytest.mark.slow
@pytest.mark.skipif(link.why_not() is not None, reason=str(link.why_not()))
def test_a_link_is_as_fast_as_it_was_shaped() -> None:
    """A bucket too small or too large for the rate, or one on the wrong end."""
    import subprocess
    import sys

    command = [sys.executable, "-c", "import sys, network; print(network.link_speed(int(sys.argv[1]), 1.0))"]
    with link.link(50 * MEGABIT) as names:
        ends = [
            subprocess.Popen(
                inside(name, [*command, str(number)]),
                stdout=subprocess.PIPE,
                text=True,
                cwd=network.Path(network.__file__).parent,
            )
            for number, name in enumerate(names)
        ]
        reached = float(ends[0].communicate(timeout=60)[0])
        ends[1].communicate(timeout=60)
    assert 25 < reached < 52  # a loaded machine may be slower than the link, never faster
