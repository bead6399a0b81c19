"""The references do what the packages of the papers' authors do, where those are installed."""

import peers
import pytest


@pytest.fixture(params=peers.PACKAGES)
def method(request):
    pytest.importorskip(peers.MODULES[request.param])
    return request.param


@pytest.mark.parametrize("settings", peers.SETTINGS)
@pytest.mark.parametrize("shape", peers.SHAPES)
def test_every_column_agrees_with_the_package(method, shape, settings):
    """1e-5 of the distance moved at every step in fp32, and the limiter both cuts and leaves where there is one."""
    row = peers.row(method, shape, settings)
    assert row["refreshes"] == 3
    assert (0 < row["limited"] < peers.STEPS - 1) == (method != "grams")
    for column in peers.COLUMNS[settings]:
        assert row[column] < 1e-5, column


def test_a_wrong_convention_is_seen(method):
    """Ours in the place of the package's, under its own settings: the bound above would not let it pass."""
    case = peers.run_package(method, peers.SHAPES["wide"], peers.SETTINGS["package"])
    assert peers.difference(case, peers.reference(case)) > 3e-5
