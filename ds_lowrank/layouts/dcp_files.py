"""The files that torch's distributed checkpoint writes: where each tensor's chunks are, read without unpickling freely.

``.metadata`` and the objects beside tensors in ``*.distcp`` are pickles, which torch opens without restriction: they
could run anything. Here both are read with lists of what they may hold, and every place that ``.metadata`` names is
looked at before anything is read.
"""

from __future__ import annotations

import math
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_lowrank.checkpoint.folders import member
from ds_lowrank.checkpoint.safe_load import HoldsObjects, load_bytes

_METADATA = "torch.distributed.checkpoint.metadata"
# All classes that .metadata of torch 2.6 to 2.13 holds; dtypes, sizes and layouts come beside them.
_RECORDS = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # Where it was written.
    *((module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows", "")),
    *((module, f"Pure{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}


@dataclass(frozen=True)
class FileSpan:
    """Bytes of a file: ``length`` of them from ``offset``."""

    path: Path
    offset: int
    length: int

    def load(self) -> Any:
        """What ``torch.save`` has put there.

        Raises:
            ValueError: it cannot be read; names the file.
        """
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.length)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be read ({error})") from error
        return load_bytes(data, self.path)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in chunks.

    Attributes:
        name: flattened.
        shape, dtype: of the whole.
        chunks: begin and shape of each in the whole, and where it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[tuple[tuple[int, ...], tuple[int, ...], FileSpan]]

    def read(self) -> Tensor:
        """The whole, on the CPU.

        Raises:
            ValueError: a chunk cannot be read, or is another than ``.metadata`` says; names the file.
        """
        whole = torch.empty(self.shape, dtype=self.dtype)
        for begin, shape, place in self.chunks:
            found = place.load()
            if not isinstance(found, Tensor) or (tuple(found.shape), found.dtype) != (shape, self.dtype):
                what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"{place.path} is damaged: of {self.name} it has {what}, not {shape} {self.dtype}")
            # narrow, and not indices: a tensor without dimensions has none
            target = whole
            for dim, (start, size) in enumerate(zip(begin, shape)):
                target = target.narrow(dim, start, size)
            target.copy_(found)
        return whole


class DistributedFiles:
    """A folder of a distributed checkpoint.

    Args:
        folder: with ``.metadata`` and ``*.distcp``.
        metadata: name of the file that says what is where; a rank that wrote alone leaves ``__RANK.metadata``.

    Attributes:
        tensors: by their flattened names.
        objects: where everything else is; the same.

    Raises:
        ValueError: ``.metadata`` holds what it has no need of, cannot be read, or does not fit the files beside it.
    """

    def __init__(self, folder: Path, metadata: str = ".metadata"):
        self._folder, self._path = folder, folder / metadata
        self._sizes: dict[Path, int] = {}
        content = _unpickle(self._path)
        entries = self._field(content, "Metadata", "state_dict_metadata", dict)
        spans: dict[tuple[str, tuple[int, ...] | None], FileSpan] = {}
        for index, info in self._field(content, "Metadata", "storage_data", dict).items():
            name = self._field(index, "MetadataIndex", "fqn", str)
            offset = self._fields(index, "MetadataIndex").get("offset")
            spans[name, None if offset is None else self._numbers(offset, name)] = self._span(info, name)
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: dict[str, FileSpan] = {}
        for name, about in entries.items():
            if not isinstance(name, str):
                raise self._damaged(f"it names {name!r}")
            if isinstance(about, _Record) and about.kind == "TensorStorageMetadata":
                self.tensors[name] = self._tensor(name, about, spans)
            elif isinstance(about, _Record) and about.kind == "BytesStorageMetadata":
                if (name, None) not in spans:
                    raise self._damaged(f"it does not say where {name} is")
                self.objects[name] = spans[name, None]
            else:
                raise self._damaged(f"{name} is neither a tensor nor bytes in it")

    def check_objects(self) -> None:
        """Read what torch's own loader would unpickle without restriction.

        Raises:
            ValueError: it holds more than numbers, texts, lists and tensors.
        """
        for place in self.objects.values():
            place.load()

    def _tensor(
        self, name: str, about: _Record, spans: Mapping[tuple[str, tuple[int, ...] | None], FileSpan]
    ) -> StoredTensor:
        fields = self._fields(about, "TensorStorageMetadata")
        shape = self._numbers(fields.get("size"), name)
        properties = fields.get("properties")
        state = properties.state if isinstance(properties, _Record) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if not isinstance(dtype, torch.dtype):
            raise self._damaged(f"{name} has no dtype in it")
        chunks = []
        covered = 0
        for chunk in self._field(about, "TensorStorageMetadata", "chunks", list):
            found = self._fields(chunk, "ChunkStorageMetadata")
            begin, size = (self._numbers(found.get(key), name) for key in ("offsets", "sizes"))
            if len(begin) != len(shape) or len(size) != len(shape):
                raise self._damaged(f"a chunk of {name} {shape} has other dimensions")
            if any(a + b > c for a, b, c in zip(begin, size, shape)):
                raise self._damaged(f"a chunk of {name} {shape} lies outside of it")
            if (name, begin) not in spans:
                raise self._damaged(f"it does not say where a chunk of {name} is")
            covered += math.prod(size)
            chunks.append((begin, size, spans[name, begin]))
        if covered < math.prod(shape):  # chunks do not overlap
            raise self._damaged(f"it lacks {math.prod(shape) - covered} elements of {name} {shape}")
        return StoredTensor(name, shape, dtype, chunks)

    def _span(self, info: Any, name: str) -> FileSpan:
        fields = self._fields(info, "_StorageInfo")
        path = member(self._folder, fields.get("relative_path"), self._path)
        offset, length = self._numbers((fields.get("offset"), fields.get("length")), name)
        if fields.get("transform_descriptors"):
            raise ValueError(
                f"{path} was written through an extension ({fields['transform_descriptors']}), which is not supported: "
                "write the checkpoint without"
            )
        if path not in self._sizes:
            if not path.is_file():
                raise ValueError(f"{path} is missing, and {self._path} names it: the checkpoint is incomplete")
            self._sizes[path] = path.stat().st_size
        if offset + length > self._sizes[path]:
            raise ValueError(
                f"{path} is truncated: {name} ends at byte {offset + length} of it, and it has {self._sizes[path]}"
            )
        return FileSpan(path, offset, length)

    def _numbers(self, values: Any, name: str) -> tuple[int, ...]:
        if not isinstance(values, tuple) or not all(type(v) is int and v >= 0 for v in values):
            raise self._damaged(f"a size or place of {name} is {values!r} in it")
        return values

    def _fields(self, record: Any, kind: str) -> dict[str, Any]:
        if not isinstance(record, _Record) or record.kind != kind or not isinstance(record.state, dict):
            raise self._damaged(f"it has {type(record).__name__} where {kind} belongs")
        return record.state

    def _field(self, record: Any, kind: str, key: str, expected: type) -> Any:
        value = self._fields(record, kind).get(key)
        if not isinstance(value, expected):
            raise self._damaged(f"{key} of {kind} is no {expected.__name__}")
        return value

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"{self._path} is damaged: {why}")


class _Record:
    """Stands for an object of an allowed class: what was saved of it, and nothing of what it does."""

    kind = ""

    def __init__(self, *args: Any):
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, path: Path):
        super().__init__(file)
        self._path = path
        # Made anew for each file: a pickle can set attributes of the classes that it gets.
        self._classes = {key: type(key[1], (_Record,), {"kind": key[1]}) for key in _RECORDS}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._classes:
            return self._classes[module, name]
        if module == "torch" and f"torch.{name}" in _DTYPES:
            return _DTYPES[f"torch.{name}"]
        simple = {
            ("torch", "Size"): lambda sizes=(): tuple(sizes),
            ("torch.serialization", "_get_layout"): lambda text: text,
            ("collections", "OrderedDict"): OrderedDict,
            # Before 3.11.4 Python pickles a member of an enumeration as getattr.
            ("builtins", "getattr"): self._enumerated,
        }
        if (module, name) in simple:
            return simple[module, name]
        raise HoldsObjects(self._path, f"{'os' if module in ('posix', 'nt') else module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise HoldsObjects(self._path, "a reference to something outside of it")

    def _enumerated(self, kind: Any, name: str) -> Any:
        if kind is not self._classes[_METADATA, "_MEM_FORMAT_ENCODING"]:
            raise HoldsObjects(self._path, f"getattr of {kind!r}")
        return kind(name)


def _unpickle(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            return _Unpickler(file, path).load()
    except (HoldsObjects, FileNotFoundError):
        raise
    except Exception as error:  # a pickle can end in any error of what it calls
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from error
