"""Every rule × selection × carry × format steps, or is refused by a sentence when it is configured."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch import nn

import ds_lowrank
from ds_lowrank.rules import RULES
from ds_lowrank.selections import SELECTIONS
from ds_lowrank.states.formats import BASIS_DTYPES, STATE_DTYPES

# Those of the package: tests register others.
OWN_RULES = ("adamw", "apollo", "apollo_mini", "fira", "grams")
OWN_SELECTIONS = ("dominant", "importance", "uniform", "random", "gaussian", "online_pca")


def refused(rule: str, selection: str, carry: str, basis_dtype: str) -> str | None:
    """What docs/methods.md says of it."""
    if rule == "fira" and selection in ("gaussian", "online_pca"):
        return "needs orthonormal bases"
    if carry == "project" and selection in ("gaussian", "online_pca"):
        return "use moments 'keep'"
    if selection == "online_pca" and basis_dtype != "fp32":
        return "use basis_dtype 'fp32'"
    return None


def test_these_are_all():
    assert set(OWN_RULES) <= set(RULES.names())
    assert set(OWN_SELECTIONS) <= set(SELECTIONS.names())
    assert set(RULES._own) == set(OWN_RULES)
    assert set(SELECTIONS._own) == set(OWN_SELECTIONS)


@pytest.mark.parametrize("selection", OWN_SELECTIONS)
@pytest.mark.parametrize("rule", OWN_RULES)
def test_it_steps_or_is_refused(rule, selection):
    for carry, state_dtype, basis_dtype in itertools.product(("keep", "project"), STATE_DTYPES, BASIS_DTYPES):
        options = {"rule": rule, "selection": selection, "moments": carry}
        options |= {"state_dtype": state_dtype, "basis_dtype": basis_dtype, "rank": 3, "update_proj_gap": 2, "lr": 0.02}
        message = refused(rule, selection, carry, basis_dtype)
        if message is not None:
            with pytest.raises(ValueError, match=message):
                ds_lowrank.LowRankConfig(**options)
            continue
        model = nn.ModuleList([nn.Linear(6, 9, bias=False), nn.Linear(9, 6, bias=False), nn.Linear(7, 7)])
        before = [p.detach().clone() for p in model.parameters()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = ds_lowrank.build_optimizer(model, options)
            for _ in range(3):
                for p in model.parameters():
                    p.grad = torch.randn_like(p)
                optimizer.step()
        for p, was in zip(model.parameters(), before):
            assert p.isfinite().all(), options
            assert (p != was).all(), options
