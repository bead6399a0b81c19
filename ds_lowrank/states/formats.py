"""Formats: the tensors under which a moment or a basis is kept in a matrix's state, and how it is read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from ds_lowrank.kernels import fused
from ds_lowrank.states.blocks import count
from ds_lowrank.states.dynamic import dequantise, quantise, zero_code
from ds_lowrank.states.linear import dequantise_linear, quantise_linear

STATE_DTYPES = ("fp32", "bf16", "int8")
BASIS_DTYPES = ("fp32", "bf16", "int8", "int4")

Axis = Literal["rows", "basis", "matrix"]


@dataclass(frozen=True)
class RowTensor:
    """One tensor of a state that has rows.

    Attributes:
        of: the slot that it is a part of, e.g. ``exp_avg``.
        width, dtype: numbers a row.
        fill: what it holds before the first step, where all that is kept is zero.
        axis: what its rows are: of A (``rows``), of the basis (``basis``), or one of the whole (``matrix``).
    """

    of: str
    width: int
    dtype: torch.dtype
    fill: int = 0
    axis: Axis = "rows"

    @cached_property
    def bytes(self) -> int:
        """A row's."""
        return self.width * self.dtype.itemsize


class Format(ABC):
    """How a matrix of numbers is kept. Every row is kept by itself, so that any cut between rows is exact.

    Args:
        name: one of ``STATE_DTYPES`` or ``BASIS_DTYPES``.
        suffixes: what is appended to the quantity's name for each of its tensors. Codes are kept under another name
            than numbers: a loader that copies by name can then never take the one for the other.
    """

    def __init__(self, name: str, suffixes: tuple[str, ...]):
        self.name = name
        self._suffixes = suffixes
        self._keys: dict[str, tuple[str, ...]] = {}

    def keys(self, quantity: str) -> tuple[str, ...]:
        """Keys in a state: ``("exp_avg",)``, or ``("exp_avg_codes", "exp_avg_scale")``."""
        if quantity not in self._keys:
            self._keys[quantity] = tuple(quantity + suffix for suffix in self._suffixes)
        return self._keys[quantity]

    @abstractmethod
    def rows(self, quantity: str, r: int, dtype: torch.dtype) -> dict[str, RowTensor]:
        """Key -> what lies there, for rows of r numbers that are computed with in ``dtype``."""

    @abstractmethod
    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """rows × r, float32 (float64 with ``fp32``) -> a tensor a key. May be ``x`` itself."""

    @abstractmethod
    def decode(self, stored: Sequence[Tensor], r: int, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`encode` but for rounding: rows × r in ``dtype``. May be what is stored itself."""

    def read(self, state: Mapping[str, Any], quantity: str, r: int, dtype: torch.dtype) -> Tensor:
        """What a state keeps of ``quantity``: rows × r in ``dtype``. Change it only to :meth:`write_` it back."""
        return self.decode([state[key] for key in self.keys(quantity)], r, dtype)

    def write_(self, state: MutableMapping[str, Any], quantity: str, value: Tensor) -> None:
        """Keep ``value``, rows × r, in the state's own tensors."""
        self.put_(state, quantity, self.encode(value))

    def put_(self, state: MutableMapping[str, Any], quantity: str, stored: Sequence[Tensor]) -> None:
        """Keep what :meth:`encode` has made."""
        for key, tensor in zip(self.keys(quantity), stored):
            if tensor is not state[key]:  # what was read without a copy was changed in its place
                state[key].copy_(tensor)

    def bytes(self, rows: int, r: int, dtype: torch.dtype = torch.float32) -> int:
        """Of ``rows`` rows of r numbers."""
        return rows * sum(tensor.bytes for tensor in self.rows("", r, dtype).values())


class Plain(Format):
    """Numbers as they are.

    Args:
        name: ``fp32``: in the dtype that is computed with (float64 for float64 weights); ``bf16``: rounded to nearest.
    """

    def __init__(self, name: str):
        super().__init__(name, ("",))
        self._narrow = {"fp32": None, "bf16": torch.bfloat16}[name]

    def rows(self, quantity: str, r: int, dtype: torch.dtype) -> dict[str, RowTensor]:  # noqa: D102
        return {quantity: RowTensor(quantity, r, self._narrow or dtype)}

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return (x if self._narrow is None else x.to(self._narrow),)

    def decode(self, stored: Sequence[Tensor], r: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return stored[0] if stored[0].dtype == dtype else stored[0].to(dtype)


class Dynamic(Format):
    """Moments in 8 bits, see :mod:`ds_lowrank.states.dynamic`.

    Args:
        signed: M has signs, V has none.
    """

    def __init__(self, signed: bool):
        super().__init__("int8", ("_codes", "_scale"))
        self.signed = signed

    def rows(self, quantity: str, r: int, dtype: torch.dtype) -> dict[str, RowTensor]:  # noqa: D102
        codes, scale = self.keys(quantity)
        return {
            codes: RowTensor(quantity, r, torch.uint8, zero_code(self.signed)),
            scale: RowTensor(quantity, count(r), torch.float32),
        }

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        if fused(x):
            from ds_lowrank.kernels import triton_blocks

            return triton_blocks.quantise(x, self.signed)
        return quantise(x, self.signed)

    def decode(self, stored: Sequence[Tensor], r: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        if fused(*stored):
            from ds_lowrank.kernels import triton_blocks

            return triton_blocks.dequantise(stored[0], stored[1], self.signed).to(dtype)
        return dequantise(stored[0], stored[1], self.signed).to(dtype)


class Linear(Format):
    """Bases in 8 or 4 bits, see :mod:`ds_lowrank.states.linear`.

    Args:
        bits: 8 or 4.
    """

    def __init__(self, bits: int):
        super().__init__(f"int{bits}", ("_codes", "_scale"))
        self._bits = bits

    def rows(self, quantity: str, r: int, dtype: torch.dtype) -> dict[str, RowTensor]:  # noqa: D102
        codes, scale = self.keys(quantity)
        if self._bits == 8:
            return {codes: RowTensor(quantity, r, torch.int8), scale: RowTensor(quantity, count(r), torch.float32)}
        return {
            codes: RowTensor(quantity, -(-r // 2), torch.uint8, fill=8 * 17),
            scale: RowTensor(quantity, count(r), torch.float32),
        }

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        return quantise_linear(x, self._bits)

    def decode(self, stored: Sequence[Tensor], r: int, dtype: torch.dtype) -> Tensor:  # noqa: D102
        if fused(*stored):
            from ds_lowrank.kernels import triton_blocks

            return triton_blocks.dequantise_linear(stored[0], stored[1], self._bits, r).to(dtype)
        return dequantise_linear(stored[0], stored[1], self._bits, r).to(dtype)


class Formats:
    """The formats of a matrix's state.

    Args:
        state_dtype: of the moments, one of ``STATE_DTYPES``.
        basis_dtype: of the basis, one of ``BASIS_DTYPES``.
    """

    def __init__(self, state_dtype: str = "fp32", basis_dtype: str = "fp32"):
        self.state_dtype, self.basis_dtype = state_dtype, basis_dtype
        eight = state_dtype == "int8"
        self.exp_avg: Format = Dynamic(signed=True) if eight else Plain(state_dtype)
        self.exp_avg_sq: Format = Dynamic(signed=False) if eight else Plain(state_dtype)
        self.basis: Format = {"int8": Linear(8), "int4": Linear(4)}.get(basis_dtype) or Plain(basis_dtype)

    @property
    def names(self) -> tuple[str, str]:
        """``state_dtype`` and ``basis_dtype``."""
        return self.state_dtype, self.basis_dtype

    def differ(self, state_dtype: str, basis_dtype: str) -> str:
        """What to say of a state that was saved in other formats."""
        return (
            f"was saved with state_dtype {state_dtype!r}, basis_dtype {basis_dtype!r}, and this run has "
            f"state_dtype {self.state_dtype!r}, basis_dtype {self.basis_dtype!r}: use those that it was saved with"
        )

    def check(self, dtype: torch.dtype, name: str) -> None:
        """Refuse weights that are more precise than a narrow format can be read as.

        Raises:
            ValueError: a float64 matrix under anything but ``fp32``, which keeps its states in float64.
        """
        if dtype == torch.float64 and (self.state_dtype, self.basis_dtype) != ("fp32", "fp32"):
            raise ValueError(
                f"{name} is float64, and state_dtype {self.state_dtype!r}, basis_dtype {self.basis_dtype!r} are read "
                "as float32: use fp32 for both (which keeps float64 for float64 weights), or float32 weights"
            )
