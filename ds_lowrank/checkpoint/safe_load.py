"""Files of ``torch.save`` without what could run in them: torch's restricted reader and a list of allowed classes."""

from __future__ import annotations

import io
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch

# Packages of the standard library, and built-ins, in which a pickle finds containers and nothing that acts.
_HARMLESS = {"argparse", "collections", "functools", "enum", "datetime", "pathlib", "types"} | {
    *("frozenset", "range", "slice"),
}


class HoldsObjects(ValueError):
    """A file holds objects beside tensors, numbers, texts and lists; nothing of it was run.

    Attributes:
        name: of the first of them: module and class, or function; of a built-in without a module.
    """

    def __init__(self, path: Path | str, name: str, *, by_torch: bool = False):
        self.name = name
        remedy = "with a tool that trusts it"
        if by_torch and not self.acts:
            remedy = f"torch.serialization.add_safe_globals([{name}]), called before, has it read"
        super().__init__(
            f"{path} holds {name}, which a checkpoint has no need of: opening it the ordinary way could run code, so "
            f"it is not read. Use it only if you know who made it: {remedy}"
        )

    @property
    def acts(self) -> bool:
        """Whether it is of Python itself: no optimizer's class, but something that would have been called."""
        package, _, rest = self.name.partition(".")
        return package not in _HARMLESS and (not rest or package in (*sys.stdlib_module_names, "__builtin__"))


def load_file(path: Path) -> Any:
    """A file that ``torch.save`` wrote, memory-mapped.

    Raises:
        FileNotFoundError: there is none.
        HoldsObjects: it holds more than tensors, numbers, and what DeepSpeed puts into its files.
        ValueError: it is damaged.
    """
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} cannot be read (it is {'no' if path.stat().st_size else 'an empty'} file of torch.save, "
            "or truncated)"
        )
    return _load(path, path, mmap=True)


def load_bytes(data: bytes, path: Path | str) -> Any:
    """A part of a file that ``torch.save`` wrote into it; ``path`` names it in errors. As :func:`load_file`."""
    return _load(data, path, mmap=False)


def _load(source: Path | bytes, path: Path | str, mmap: bool) -> Any:
    numbers = allowed = _numpy_classes()
    while True:
        try:
            with torch.serialization.safe_globals(allowed):
                file: Any = io.BytesIO(source) if isinstance(source, bytes) else source
                return torch.load(file, map_location="cpu", weights_only=True, **({"mmap": True} if mmap else {}))
        except FileNotFoundError:
            raise
        except pickle.UnpicklingError as error:
            name = _refused_name(str(error))
            if name is None:
                raise ValueError(f"{path} cannot be read ({_first_line(error)})") from error
            # DeepSpeed takes seconds to import, and most files hold nothing of it.
            if allowed is not numbers or not (name.startswith("deepspeed.") or name == "getattr"):
                raise HoldsObjects(path, name, by_torch=True) from error
            allowed = numbers + _deepspeed_classes(path)
        except Exception as error:  # zip, mmap, text and index errors of torch's reader: whatever a file may contain
            raise ValueError(f"{path} cannot be read ({_first_line(error)})") from error


def _refused_name(message: str) -> str | None:
    """What torch's reader met, in the words of its error."""
    found = re.search(r"GLOBAL ([\w.<>]+)", message)
    if found is None:
        return None
    name = found[1].rstrip(".")
    return name.replace("posix.", "os.", 1) if name.startswith(("posix.", "nt.")) else name


def _first_line(error: Exception) -> str:
    # Before its reason torch puts a paragraph about its own versions.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def _numpy_classes() -> list[Any]:
    """NumPy's numbers and arrays of them: a schedule that computes with NumPy leaves some in ``lr``."""
    try:
        import numpy as np
    except ImportError:
        return []
    core = np._core if hasattr(np, "_core") else np.core
    functions = [
        (found, f"numpy.{package}.multiarray.{found.__name__}")
        for package in ("_core", "core")
        for found in (core.multiarray.scalar, core.multiarray._reconstruct)
    ]
    # All but those of Python objects.
    return [*functions, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"}]


def _deepspeed_classes(path: Path | str) -> list[Any]:
    """What DeepSpeed puts into its files beside tensors."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ValueError(f"{path} is DeepSpeed's, which is needed to read it and is not installed") from error

    def stage(kind: Any, name: str) -> Any:
        if kind is not ZeroStageEnum:
            raise ValueError(f"getattr of {kind!r}")
        return ZeroStageEnum[name]

    # Before 3.11.4 Python pickles a member of an enumeration as getattr, which would reach anything if it were allowed.
    named = [(stage, "builtins.getattr"), (stage, "__builtin__.getattr")]
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address, *named]
