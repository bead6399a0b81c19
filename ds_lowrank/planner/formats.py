"""Bytes of states in each format: ours as :mod:`ds_lowrank.states` keeps them, and bitsandbytes'."""

from __future__ import annotations

from ds_lowrank.states.formats import BASIS_DTYPES, Formats

# bitsandbytes: tensors of fewer numbers keep fp32 moments (``min_8bit_size``), others a code a number and an fp32
# ``absmax`` a block of 256.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


def rows_bytes(rows: int, rank: int, kind: str) -> int:
    """Bytes of ``rows`` × ``rank`` numbers in a format.

    Raises:
        ValueError: an unknown format.
    """
    if kind not in BASIS_DTYPES:
        raise ValueError(f"format {kind!r} is unknown: use one of {', '.join(BASIS_DTYPES)}")
    return Formats(basis_dtype=kind).basis.bytes(rows, rank)


def adamw8bit_bytes(numel: int) -> int:
    """Bytes of both moments of one tensor in bitsandbytes' AdamW8bit."""
    if numel < _SMALLEST_8BIT:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // _BLOCK_8BIT))
