"""Update rules, one a file: see :mod:`ds_lowrank.rules.base`."""

from __future__ import annotations

from ds_lowrank.registry import Registry
from ds_lowrank.rules.base import Hyper, Rule, Stack, Steps, Update

RULES: Registry[Rule] = Registry(
    "rule",
    {
        "adamw": "ds_lowrank.rules.adamw",
        "apollo": "ds_lowrank.rules.apollo",
        "apollo_mini": "ds_lowrank.rules.apollo",
        "fira": "ds_lowrank.rules.fira",
        "grams": "ds_lowrank.rules.grams",
    },
    papers="SARA and GaLore step by adamw",
)
register = RULES.register

__all__ = ["RULES", "Hyper", "Rule", "Stack", "Steps", "Update", "register"]
