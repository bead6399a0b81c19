"""The references and the optimizer do what the packages of the papers' authors do, where those are installed."""

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


@pytest.mark.parametrize("shape", peers.SHAPES)
def test_fira_finds_the_bases_that_its_package_finds(shape):
    """Until the second refresh. What the moments were is then seen through columns whose signs are anybody's.

    Directions of an fp32 decomposition are known less well than the products with them: 1.7e-5 was seen.
    """
    pytest.importorskip("fira")
    case = peers.run_package("fira", peers.SHAPES[shape], peers.SETTINGS["neutral"], steps=peers.GAP)
    assert peers.difference(case, peers.run_ours(case, "dominant")) < 5e-5


def test_alpha_of_apollo_is_the_root_of_what_its_package_calls_scale():
    """The column would see a scale that is taken for its root."""
    pytest.importorskip("apollo_torch")
    case = peers.run_package("apollo", peers.SHAPES["tall"], peers.SETTINGS["neutral"])
    case.alpha **= 2
    assert peers.difference(case, peers.ours(case)) > 0.5
