"""What a matrix's state keeps: slots that methods declare, and the tensors that formats make of them.

A rule or a selection says what it keeps (:class:`Slot`); :class:`StateLayout` turns that and the formats into keys,
widths and dtypes. Whoever saves, loads, plans, reports or prints states iterates over it and knows no method by name.
What a slot is kept as is said by its keys and dtypes alone, so a checkpoint is read without knowing what wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ds_lowrank.states.formats import Axis, Format, Formats, Plain, RowTensor

__all__ = ["BASIS", "Axis", "Slot", "StateLayout", "declare", "saved_layout"]


@dataclass(frozen=True)
class Slot:
    """Something that a method keeps of every matrix.

    Attributes:
        name: its key in a state and in checkpoints. One name means one thing: two methods that share it declare it
            alike.
        axis: how it is cut: as the rows of A (long of them), as the rows of the basis (short of them), or not at all:
            one a matrix, the same on every rank that computes rows of it.
        width: numbers a row: ``"r"``, the rank of the subspace, or 1.
        format: ``signed`` and ``unsigned`` numbers are kept in ``state_dtype``, a ``basis`` in ``basis_dtype``;
            ``exact`` ones in the dtype that is computed with.
        turns: what a change of basis does to it: ``linear`` (as R turns), ``square`` (as R∘R) or ``fixed``.
    """

    name: str
    axis: Axis = "rows"
    width: Literal["r", 1] = "r"
    format: Literal["signed", "unsigned", "exact", "basis"] = "signed"
    turns: Literal["linear", "square", "fixed"] = "fixed"


BASIS = Slot("basis", axis="basis", format="basis")

# Every slot that some registered method keeps, by name.
_known: dict[str, Slot] = {BASIS.name: BASIS}
# Keys of a matrix's state that are no slot's.
_TAKEN = ("step", "refreshes", "indices", "overlaps", "left", "row", "basis_row")


def declare(slots: Iterable[Slot]) -> None:
    """Make slots known, so that a saved state that has them can be read.

    Raises:
        ValueError: a name is taken by a slot of another kind, or is none that a state can have.
    """
    for slot in slots:
        if slot.name in _TAKEN or slot.name.endswith(("_codes", "_scale")):
            raise ValueError(f"a slot cannot be called {slot.name!r}: states have that key for something else")
        if slot.turns == "linear" and (slot.width, slot.axis) != ("r", "rows"):
            raise ValueError(f"the slot {slot.name!r} turns as R does: it needs axis 'rows' and width 'r'")
        if _known.setdefault(slot.name, slot) != slot:
            raise ValueError(f"the slot {slot.name!r} is declared as {_known[slot.name]} already, not as {slot}")


class StateLayout:
    """The tensors of a matrix's state that are cut by rows, or one a matrix.

    Args:
        slots: what is kept.
        formats: how.
    """

    def __init__(self, slots: Sequence[Slot], formats: Formats):
        self.slots = {slot.name: slot for slot in slots}
        self.formats = formats
        kinds = {"signed": formats.exp_avg, "unsigned": formats.exp_avg_sq, "basis": formats.basis}
        self._formats: dict[str, Format] = {s.name: kinds.get(s.format) or Plain("fp32") for s in slots}
        self._tensors: dict[tuple[int, torch.dtype], dict[str, RowTensor]] = {}
        used = {slot.format for slot in slots}
        self.state_dtype = formats.state_dtype if used & {"signed", "unsigned"} else "fp32"
        self.basis_dtype = formats.basis_dtype if "basis" in used else "fp32"

    @property
    def names(self) -> tuple[str, str]:
        """``state_dtype`` and ``basis_dtype``, ``fp32`` where nothing is kept in it."""
        return self.state_dtype, self.basis_dtype

    def format(self, slot: str) -> Format:
        """How a slot is kept."""
        return self._formats[slot]

    def keys(self, slot: str) -> tuple[str, ...]:
        """Keys of its tensors in a state."""
        return self._formats[slot].keys(slot)

    def width(self, slot: str, r: int) -> int:
        """Its numbers a row, of a matrix of rank r."""
        return r if self.slots[slot].width == "r" else 1

    def tensors(self, r: int, dtype: torch.dtype) -> dict[str, RowTensor]:
        """Key -> tensor, of a matrix of rank r that is computed with in ``dtype``."""
        if (r, dtype) not in self._tensors:
            self._tensors[r, dtype] = {
                key: dataclasses.replace(tensor, axis=slot.axis)
                for slot in self.slots.values()
                for key, tensor in self._formats[slot.name].rows(slot.name, self.width(slot.name, r), dtype).items()
            }
        return self._tensors[r, dtype]

    def read(self, state: Mapping[str, Any], slot: str, r: int, dtype: torch.dtype) -> Tensor:
        """What a state keeps in a slot: rows × width in ``dtype``. Change it only to :meth:`write_` it back."""
        return self._formats[slot].read(state, slot, self.width(slot, r), dtype)

    def write_(self, state: MutableMapping[str, Any], slot: str, value: Tensor) -> None:
        """Keep ``value``, rows × width, in the state's own tensors."""
        self._formats[slot].write_(state, slot, value)

    def bytes(self, rows: int, basis: int, r: int, dtype: torch.dtype = torch.float32) -> int:
        """Of a matrix of which a rank keeps ``rows`` rows of A and ``basis`` rows of the basis."""
        lengths = {"rows": rows, "basis": basis, "matrix": int(rows > 0)}
        return sum(lengths[axis] * count for axis, count in self.row_bytes(r, dtype).items())

    def row_bytes(self, r: int, dtype: torch.dtype = torch.float32) -> dict[Axis, int]:
        """Bytes of all that is kept of one row of A, of one row of the basis, and once a matrix."""
        found: dict[Axis, int] = {"rows": 0, "basis": 0, "matrix": 0}
        for tensor in self.tensors(r, dtype).values():
            found[tensor.axis] += tensor.bytes
        return found

    def slot_bytes(self, long: int, short: int, r: int, dtype: torch.dtype = torch.float32) -> dict[str, int]:
        """Slot -> bytes, of a whole matrix of ``long`` rows and ``short`` rows of the basis."""
        found = dict.fromkeys(self.slots, 0)
        for key, tensor in self.tensors(r, dtype).items():
            found[tensor.of] += self.length(key, r, dtype, long, short) * tensor.bytes
        return found

    def length(self, key: str, r: int, dtype: torch.dtype, long: int, short: int) -> int:
        """Rows of a tensor where ``long`` rows of A and ``short`` rows of the basis are kept: all, or a rank's."""
        return {"rows": long, "basis": short, "matrix": 1}[self.tensors(r, dtype)[key].axis]

    def fault(self, saved: StateLayout) -> str | None:
        """What to say of a state that was saved with another layout; ``None``: it is this one."""
        if saved.slots.keys() != self.slots.keys():
            has = f"was saved with {_listed(saved)}"
            if saved.slots.keys() < self.slots.keys():  # damaged, perhaps: what is missing comes first
                lacks = ", ".join(name for name in self.slots if name not in saved.slots)
                has = f"has no {lacks}: it {has}"
            return (
                f"{has}, and the rule and selection of this run keep {_listed(self)}: use the rule and selection that "
                "it was saved with"
            )
        if saved.names != self.names:
            return self.formats.differ(*saved.names)
        return None


def saved_layout(dtypes: Mapping[str, torch.dtype]) -> StateLayout | None:
    """The layout of a saved state, from the dtypes that it has under its keys.

    Returns:
        ``None``: it is none of this package's: it has no slot, or one in a dtype that no format has. A slot of which
        a part is missing is one all the same.

    Raises:
        ValueError: it keeps something that no registered method does; the sentence lacks its subject.
    """
    slots, formats = [], {"state_dtype": "fp32", "basis_dtype": "fp32"}
    plain = {torch.float32: "fp32", torch.float64: "fp32", torch.bfloat16: "bf16"}
    foreign = [key for key in dtypes if _slot_of(key) not in {*_known, *_TAKEN}]
    for slot in [_known[name] for name in dict.fromkeys(map(_slot_of, dtypes)) if name in _known]:
        codes = dtypes.get(f"{slot.name}_codes")
        is_coded = codes is not None or f"{slot.name}_scale" in dtypes
        slots.append(slot)
        if slot.format != "exact":
            coded = "int4" if slot.format == "basis" and codes == torch.uint8 else "int8"
            name = coded if is_coded else plain.get(dtypes[slot.name])
            if name is None:
                return None
            formats["basis_dtype" if slot.format == "basis" else "state_dtype"] = name
    if foreign:
        raise ValueError(
            f"keeps {', '.join(foreign)}, which no registered rule or selection does: import what registers it first "
            "(--import FILE.py on command lines)"
        )
    # A method may keep nothing at all, and still says which directions its basis has.
    return StateLayout(slots, Formats(**formats)) if slots or "indices" in dtypes else None


def _slot_of(key: str) -> str:
    return key.removesuffix("_codes").removesuffix("_scale")


def _listed(layout: StateLayout) -> str:
    return ", ".join(layout.slots) or "nothing"
