"""Bytes of tensors alive and the most there have been: by unique storages, not by the process's size.

Every operation that torch dispatches is seen, those of backward passes on a CPU too; what a kernel allocates and frees
inside one operation (a solver's workspace) is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Tracker(TorchDispatchMode):
    """Counts storages made while it is entered.

    Attributes:
        alive: bytes now.
        peak: the most since :meth:`restart`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}

    def __enter__(self) -> Tracker:
        # FSDP2 frees a gathered parameter by emptying its storage, and fills it again.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._note(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment,method-assign]
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def restart(self) -> None:
        """Forget the peak so far."""
        self.peak = self.alive

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if hasattr(value, "to_local"):
                value = value._local_tensor
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" and type(value) is not _FAKE:
                self._note(value.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        size = storage.nbytes()
        if key not in self._sizes:
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
            self._sizes[key] = 0
        self.alive += size - self._sizes[key]
        self._sizes[key] = size
        self.peak = max(self.peak, self.alive)

    def _gone(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)
        del self._references[key]


_FAKE = torch._subclasses.FakeTensor
