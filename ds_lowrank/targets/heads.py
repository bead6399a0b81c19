"""What of a model is an embedding or an output head: those are projected only where they are named."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from torch import nn

from ds_lowrank.layouts import whole_shape
from ds_lowrank.targets.names import clean_name

# Names that mean a head wherever they stand, and with them everything in the module.
_HEAD = re.compile(r"(.*_)?(lm_head|classifier|score)|embed_out|output_projection")
# Names that mean one outside of the layers only: within them a "head" is one of attention's.
_OUTER_HEAD = re.compile(
    r"(.*_)?(heads?|logits|predictions)|cls|qa_outputs|seq_relationship|logits_proj|lm_loss|proj_out|"
    r"vocab_(transform|projector)|class_embed|bbox_embed|bbox_predictor|ctc_proj|decoder_pred"
)
# Names that are a head's where it is a linear layer outside of the others: torchtitan's, torchvision's.
_OUTER_LINEAR = ("output", "fc")


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer; GPT-2's Conv1D is one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def protected_modules(model: nn.Module) -> dict[nn.Module, frozenset[str]]:
    """Embeddings and output heads, and every module in one, with the words of which a pattern has to hold one.

    They are known by what they are: an ``nn.Embedding``, what ``get_input_embeddings`` and ``get_output_embeddings`` of
    the model or of a model in it give, what shares a weight with those, what PEFT trains whole (``modules_to_save``),
    the last linear layer into the vocabulary or the labels, and by their names. A name counts for all that is in the
    module, so that RoBERTa's ``classifier.dense`` is the head's as its ``classifier.out_proj`` is.

    Args:
        model: the bare model.
    """
    modules = list(_modules(model))
    found: dict[nn.Module, set[str]] = {}
    for name, module, inside in modules:
        word = _head_word(name, module, inside)
        if word:
            for part in module.modules():
                found.setdefault(part, {word})
    names = {module: name for name, module, _ in reversed(modules)}
    known = {module for module in names if isinstance(module, nn.Embedding)} | set(_given_by_getters(names))
    tied = {id(weight) for module in known if (weight := getattr(module, "weight", None)) is not None}
    for name, module, _ in modules:
        if module in known or id(getattr(module, "weight", None)) in tied:
            found.setdefault(module, set()).add(_own_word(name))
    for name, module in _last_linear(model, modules, found):
        found[module] = {_own_word(name)}
    return {module: frozenset(words) for module, words in found.items()}


def _modules(module: nn.Module, name: str = "", inside: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module with its name and whether it is in a repeated layer."""
    yield clean_name(name), module, inside
    children = list(module.named_children())
    repeats = not isinstance(module, nn.Sequential) or (len(children) > 1 and len({type(c) for _, c in children}) == 1)
    for part, child in children:
        yield from _modules(child, f"{name}.{part}" if name else part, inside or (repeats and part.isdigit()))


def _head_word(name: str, module: nn.Module, inside: bool) -> str | None:
    """The part of a module's name that makes it a head, if one does."""
    *above, last = name.split(".")
    if last == "modules_to_save" and above:
        return above[-1]
    outer = _OUTER_HEAD.fullmatch(last) or (last in _OUTER_LINEAR and is_linear(getattr(module, "base_layer", module)))
    return last if _HEAD.fullmatch(last) or (outer and not inside) else None


def _own_word(name: str) -> str:
    last = name.rsplit(".", 1)[-1]
    return name if last.isdigit() else last


def _given_by_getters(modules: dict[nn.Module, str]) -> Iterator[nn.Module]:
    for owner in modules:
        for getter in ("get_input_embeddings", "get_output_embeddings"):
            # What HF's base class raises where there is none, or where a wrapper's model has no such method.
            with contextlib.suppress(NotImplementedError, AttributeError):
                module = getattr(owner, getter, lambda: None)()
                if isinstance(module, nn.Module) and module in modules:
                    yield module


def _last_linear(
    model: nn.Module, modules: list[tuple[str, nn.Module, bool]], found: dict[nn.Module, set[str]]
) -> list[tuple[str, nn.Module]]:
    """Linear layers behind the repeated ones into the vocabulary or the labels that nothing else has found."""
    sizes = _head_sizes(model)
    last = max((k for k, (_, module, inside) in enumerate(modules) if inside and is_linear(module)), default=-1)
    behind = [(name, module) for name, module, inside in modules[last + 1 :] if is_linear(module) and not inside]
    seen = {_width(module) for _, module in behind if module in found}
    heads = []
    for name, module in reversed(behind):
        # A square one before a head of the same width is a pooler's or a transform's, in a model as wide as that.
        square = len(set(whole_shape(module.weight))) == 1  # type: ignore[arg-type]
        if module not in found and _width(module) in sizes and not (square and _width(module) in seen):
            heads.append((name, module))
            seen.add(_width(module))
    return heads


def _width(linear: nn.Module) -> int:
    """Outputs of a linear layer; Conv1D keeps its weight as in × out."""
    return whole_shape(linear.weight)[0 if isinstance(linear, nn.Linear) else 1]  # type: ignore[arg-type]


def _head_sizes(model: nn.Module) -> set[int]:
    """Sizes of the vocabulary and of the labels, as configurations have them, or else of the largest embedding."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    vocabularies = {getattr(config, "vocab_size", None) for config in configs}
    if not any(isinstance(size, int) for size in vocabularies):
        vocabularies = {max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)}
    labels = {getattr(config, "num_labels", None) for config in configs}
    return {size for size in vocabularies | labels if isinstance(size, int) and size > 0}
