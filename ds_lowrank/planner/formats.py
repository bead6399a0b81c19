"""Bytes of bitsandbytes' states; ours say theirs, see :class:`ds_lowrank.states.layout.StateLayout`."""

from __future__ import annotations

# bitsandbytes: tensors of fewer numbers keep fp32 moments (``min_8bit_size``), others a code a number and an fp32
# ``absmax`` a block of 256.
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256


def adamw8bit_bytes(numel: int) -> int:
    """Bytes of both moments of one tensor in bitsandbytes' AdamW8bit."""
    if numel < _SMALLEST_8BIT:
        return 8 * numel
    return 2 * (numel + 4 * -(-numel // _BLOCK_8BIT))
