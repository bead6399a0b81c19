"""Tensors by name in files of safetensors, ``torch.save`` and DeepSpeed's stages of another optimizer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ds_lowrank.checkpoint.folders import member, read_object
from ds_lowrank.checkpoint.safe_load import load_file
from ds_lowrank.layouts.dcp_files import DistributedFiles


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, read when it is needed.

    Attributes:
        shape: of it.
    """

    shape: tuple[int, ...]
    path: Path
    name: str

    def read(self) -> Tensor:
        """The whole tensor, on the CPU.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                return file.get_tensor(self.name)
        except Exception as error:  # safetensors has a class of its own
            raise ValueError(f"{self.path} cannot be read: {error}") from error


class Consolidated(Mapping[str, Tensor]):
    """The fp32 weights of a DeepSpeed checkpoint, put together by DeepSpeed itself when they are first needed.

    DeepSpeed's tool unpickles without restriction: what it is going to read is read here before, with it.

    Args:
        tag: folder with DeepSpeed's files.

    Raises:
        ValueError: a file is damaged, or holds what it has no need of.
    """

    def __init__(self, tag: Path):
        for path in sorted((*tag.glob("*_model_states.pt"), *tag.glob("*_optim_states.pt"))):
            load_file(path)
        self._tag = tag
        self._weights: dict[str, Tensor] | None = None

    def _all(self) -> dict[str, Tensor]:
        if self._weights is None:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            try:
                with redirect_stdout(sys.stderr):  # it tells of its progress
                    weights = get_fp32_state_dict_from_zero_checkpoint(str(self._tag.parent), tag=self._tag.name)
            except Exception as error:  # of whatever a file lacks
                raise ValueError(
                    f"{self._tag} is damaged or incomplete: DeepSpeed makes no weights of it "
                    f"({type(error).__name__}: {error})"
                ) from error
            # Of stage 1 the tool leaves frozen ones out, which lie in the model's file as they are.
            states = self._tag / "mp_rank_00_model_states.pt"
            content = load_file(states) if states.is_file() else None
            module = content.get("module") if isinstance(content, Mapping) else None
            for name, value in module.items() if isinstance(module, Mapping) else ():
                if isinstance(value, Tensor) and name not in weights:
                    weights[name] = value.float() if value.is_floating_point() else value
            self._weights = weights
        return self._weights

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


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
        stored = DistributedFiles(folder / "pytorch_model_fsdp_0").tensors
        return {name.removeprefix("model."): s for name, s in stored.items()}  # accelerate saves {"model": ...}
    for name in ("pytorch_model_fsdp.bin", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _table(folder / name)
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _indexed(folder, index)
    if (folder / "model.safetensors").is_file():
        return dict(_safetensors(folder / "model.safetensors"))
    raise FileNotFoundError(f"{folder} holds no weights (model.safetensors, pytorch_model*.bin, global_step*)")


def _table(path: Path) -> dict[str, Tensor]:
    content = load_file(path)
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{path} is damaged: it holds no weights by their names")
    return tensors


def _indexed(folder: Path, index: Path) -> dict[str, Stored]:
    """What an index says is in files beside it, and is."""
    tensors: dict[str, Stored] = {}
    there: dict[Path, dict[str, Stored]] = {}
    for name, file in read_object(index, weight_map=dict)["weight_map"].items():
        path = member(folder, file, index)
        if path not in there:
            if not path.is_file():
                raise ValueError(f"{path} is missing, and {index} names it: the checkpoint is incomplete")
            there[path] = dict(_safetensors(path))
        if name not in there[path]:
            raise ValueError(f"{path} lacks {name}, which {index} says is in it")
        tensors[name] = there[path][name]
    return tensors


def _safetensors(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, Stored(tuple(file.get_slice(name).get_shape()), path, name)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
