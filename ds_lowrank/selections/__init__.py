"""How a basis is chosen, one file a family: see :mod:`ds_lowrank.selections.base`; what moments then do: carry."""

from __future__ import annotations

from ds_lowrank.registry import Registry
from ds_lowrank.selections.base import Basis, Gram, Key, Selection, Sketch

SELECTIONS: Registry[Selection] = Registry(
    "selection",
    {
        "dominant": "ds_lowrank.selections.spectral",
        "importance": "ds_lowrank.selections.spectral",
        "uniform": "ds_lowrank.selections.spectral",
        "random": "ds_lowrank.selections.random",
        "gaussian": "ds_lowrank.selections.gaussian",
        "online_pca": "ds_lowrank.selections.online_pca",
    },
    papers="SARA is importance, GaLore is dominant",
)
register = SELECTIONS.register

__all__ = ["SELECTIONS", "Basis", "Gram", "Key", "Selection", "Sketch", "register"]
