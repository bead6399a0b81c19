"""Ranks are threads, and layouts are cut without a framework, in every test of this folder."""

from __future__ import annotations

import sys

import pytest
import thread_cases
import thread_layouts
import thread_ranks

import ds_lowrank.layouts
import ds_lowrank.optimizer


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    thread_ranks.substitute(monkeypatch.setattr)
    real = ds_lowrank.layouts.find_layout
    found = thread_layouts.substitute_layouts(thread_cases.found_layout, real)
    for name, module in list(sys.modules.items()):
        if name.startswith("ds_lowrank"):
            if getattr(module, "find_layout", None) is real:
                monkeypatch.setattr(module, "find_layout", found)
            # It looks through all objects of the process for models in DistributedDataParallel: there are none.
            if hasattr(module, "ddp_models"):
                monkeypatch.setattr(module, "ddp_models", lambda parameters: [])
