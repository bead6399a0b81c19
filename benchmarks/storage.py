"""Bytes that an optimizer's state really holds."""

from __future__ import annotations

from typing import Any

import torch


def state_bytes(state: Any) -> int:
    """Bytes of unique storages: a view counts as all that it keeps alive."""
    storages: dict[int, int] = {}

    def count(value: Any) -> None:
        if hasattr(value, "to_local"):  # a DTensor: what lies on this rank
            value = value.to_local()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            for inner in value.values():
                count(inner)
        elif type(value).__name__ == "GaLoreProjector":
            count(vars(value))

    count(dict(state))
    return sum(storages.values())
