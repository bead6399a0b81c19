"""Bytes that a forward pass keeps for its backward pass, of a decoder of LLaMA's kind.

Counted from transformers' ``modeling_llama.py`` and from what torch's backward formulas save; docs/memory.md has the
formula. Attention is torch's fused one, which keeps no seq × seq matrix. T is the tokens of a micro-step, b the bytes
of a number, h, f, k the widths of the residual stream, the MLP and the keys, H the heads, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lowrank.planner.model import Decoder


@dataclass(frozen=True)
class Activations:
    """Bytes alive on each rank at the moments that can be a peak; parameters and gradients are not in them.

    Attributes:
        forward: in the forward pass of the last layer.
        loss: when the loss is computed, or at the start of its backward pass.
        head: when the head's backward pass begins: the gradient of the logits in place of what the loss had.
        layer: in the backward pass of the last layer, the first to be reached.
        embedding: at the end of the backward pass.
        each: what goes with each layer that the backward pass has done.
    """

    forward: int
    loss: int
    head: int
    layer: int
    embedding: int
    each: int


def norm_bytes(tokens: int, hidden: int, width: int) -> int:
    """A LlamaRMSNorm: its fp32 input (in fp32 the residual stream itself), the normalised input and its own output."""
    return tokens * (4 * hidden + 2 * width * hidden + 4)


def layer_bytes(d: Decoder, tokens: int, width: int) -> int:
    """One layer without checkpointing: 2 norms, q, k, v and the output of attention, 4 tensors of the MLP."""
    attention = width * (2 * d.hidden + 2 * d.kv_width) + 4 * d.heads  # softmax keeps fp32 logsumexp
    return 2 * norm_bytes(tokens, d.hidden, width) + tokens * (attention + 4 * width * d.inner)


def activations(d: Decoder, tokens: int, width: int, checkpointing: bool) -> Activations:
    """See :class:`Activations`.

    Args:
        d: the model.
        tokens: of a micro-step, micro_batch × seq.
        width: bytes of a number that the model computes with.
        checkpointing: each layer keeps its input alone.
    """
    stream = width * d.hidden * tokens
    one = layer_bytes(d, tokens, width)
    each = stream if checkpointing else one
    kept = d.layers * each
    # cos and sin of the rotary embedding, shared by the layers, and the token ids, labels and positions.
    shared = tokens * (2 * width * d.hidden // d.heads + 3 * 8)
    top = norm_bytes(tokens, d.hidden, width)
    logits = d.vocabulary * tokens
    # bf16: logits, their fp32 copy, log-softmax; then log-softmax, its gradient and that of the logits, all fp32.
    loss = max(width * logits + 4 * logits * (width != 4) + 4 * logits, 12 * logits)
    working = _working_bytes(d, tokens, width)
    return Activations(
        forward=kept + shared + working,
        loss=kept + shared + top + loss,
        head=kept + shared + top + 2 * width * logits * (width != 4) + width * logits * (width == 4) + stream,
        layer=kept + shared + (one if checkpointing else 0) + working,
        embedding=shared + 2 * stream,
        each=each,
    )


def _working_bytes(d: Decoder, tokens: int, width: int) -> int:
    """Gradients on their way through the MLP: of the stream, of the product (gone with it), of both its factors."""
    return tokens * width * (2 * d.hidden + 2 * d.inner)
