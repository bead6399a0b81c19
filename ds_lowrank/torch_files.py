"""Tensors by name in files of torch's distributed checkpoints, safetensors and ``torch.save``."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ds_lowrank.sources import load_file

SMALL = 1 << 12  # numbers


@dataclass(frozen=True)
class Stored:
    """A tensor that is read when it is needed.

    Attributes:
        shape: of it.
    """

    shape: tuple[int, ...]
    path: Path
    name: str
    dtype: torch.dtype | None = None

    def read(self) -> Tensor:
        """The whole tensor, on the CPU."""
        if self.dtype is None:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        tensor = torch.empty(self.shape, dtype=self.dtype)
        _load_alone({self.name: tensor}, self.path)
        return tensor


class Consolidated(Mapping[str, Tensor]):
    """The fp32 weights of a DeepSpeed checkpoint, put together by DeepSpeed itself when they are first needed."""

    def __init__(self, tag: Path):
        self._tag = tag
        self._weights: dict[str, Tensor] | None = None

    def _all(self) -> dict[str, Tensor]:
        if self._weights is None:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            self._weights = get_fp32_state_dict_from_zero_checkpoint(str(self._tag.parent), tag=self._tag.name)
        return self._weights

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


def dcp_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of a distributed checkpoint by their flattened names: :class:`Stored`, or read if they are small.

    Raises:
        ValueError: its metadata cannot be read.
    """
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:
        raise ValueError(f"{folder / '.metadata'} cannot be read: {error}") from error
    tensors = {
        n: about for n, about in metadata.state_dict_metadata.items() if isinstance(about, TensorStorageMetadata)
    }
    # Small ones at once: every read goes through the metadata of all.
    small = {n: torch.empty(a.size, dtype=a.properties.dtype) for n, a in tensors.items() if a.size.numel() <= SMALL}
    _load_alone(small, folder)
    stored = {n: Stored(tuple(a.size), folder, n, a.properties.dtype) for n, a in tensors.items() if n not in small}
    return {**stored, **small}


def _load_alone(tensors: dict[str, Any], folder: Path) -> None:
    """Read on this rank alone, whatever process group there is."""
    reader = dcp.FileSystemReader(folder)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    if "no_dist" in inspect.signature(dcp.load).parameters:
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    else:  # torch < 2.8
        from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

        _load_state_dict(tensors, reader, no_dist=True)


def model_tensors(folder: Path, tag: Path | None = None) -> Mapping[str, Any]:
    """Weights of a checkpoint by name, the most precise that it has.

    Args:
        folder: of the checkpoint.
        tag: folder of DeepSpeed's files in it.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged.
    """
    if tag is not None:
        return Consolidated(tag)
    if (folder / "pytorch_model_fsdp_0" / ".metadata").is_file():
        stored = dcp_tensors(folder / "pytorch_model_fsdp_0")
        return {name.removeprefix("model."): s for name, s in stored.items()}  # accelerate saves {"model": ...}
    for name in ("pytorch_model_fsdp.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return load_file(folder / name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return {name: stored for file in files for name, stored in _safetensors(folder / file)}
    if (folder / "model.safetensors").is_file():
        return dict(_safetensors(folder / "model.safetensors"))
    raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, pytorch_model*.bin, global_step*)")


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, Stored(tuple(file.get_slice(name).get_shape()), path, name)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
