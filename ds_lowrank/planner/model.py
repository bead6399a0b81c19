"""A model as numbers: shapes of its parameters, the order in which modules use them, and what activations depend on."""

from __future__ import annotations

import dataclasses
import math
import textwrap
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_lowrank.config import load_json
from ds_lowrank.param_groups import clean_name


@dataclass(frozen=True)
class Decoder:
    """What the activations of a decoder of LLaMA's kind depend on.

    Attributes:
        layers, hidden, inner, heads, kv_width, vocabulary: numbers of layers, of the residual stream, of the gated MLP,
            of attention heads, of all keys of a token, of tokens.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_width: int
    vocabulary: int


@dataclass(frozen=True)
class Model:
    """A model on the meta device.

    Attributes:
        module: the model; no weight of it is in memory.
        name: for humans.
        shapes: parameter name -> shape, in the model's order; a tied parameter once.
        modules: for each module with parameters of its own, in the order of a forward pass, their names.
        layers: for each decoder layer, the names of its parameters; the first place for FSDP2's units.
        decoder: ``None`` where the configuration lacks a number that activations are computed from.
        buffer_bytes: of registered buffers.
    """

    module: nn.Module
    name: str
    shapes: dict[str, tuple[int, ...]]
    modules: list[list[str]]
    layers: list[list[str]]
    decoder: Decoder | None
    buffer_bytes: int

    @property
    def numel(self) -> int:
        """Weights."""
        return sum(map(math.prod, self.shapes.values()))

    def numel_of(self, names: list[str]) -> int:
        """Weights of some parameters."""
        return sum(math.prod(self.shapes[name]) for name in names)


def read_model(source: str | Path | Mapping[str, Any] | nn.Module) -> Model:
    """A model from its Hugging Face configuration (path or content), or as it is, without any weights.

    Raises:
        FileNotFoundError: no such file.
        ValueError: transformers does not know the model, or cannot build it as a causal language model, or a parameter
            of it has no elements.
    """
    if isinstance(source, nn.Module):
        return describe(source, type(source).__name__)
    content = load_json(source)
    name = Path(source).stem if isinstance(source, (str, Path)) else str(content.get("model_type", "model"))
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = content.pop("model_type", None)
    if kind is None:
        raise ValueError(f"the model configuration {name!r} has no model_type: give it a Hugging Face config.json")
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = AutoConfig.for_model(kind, **content)
            module = AutoModelForCausalLM.from_config(config)
        model = describe(module, name)
    except Exception as error:  # numbers that make no model stop its code anywhere
        said = textwrap.shorten(str(error) or type(error).__name__, 300)  # it may list all models that there are
        raise ValueError(f"transformers cannot build the model {name!r} ({kind}): {said}") from error
    empty = [f"{parameter} {shape}" for parameter, shape in model.shapes.items() if not math.prod(shape)]
    if empty or not model.shapes:
        what = f"{empty[0]} has no elements" if empty else "it has no parameters"
        raise ValueError(f"the model {name!r} ({kind}) cannot be planned: {what}")
    return model


def describe(module: nn.Module, name: str) -> Model:
    """Numbers of a module; its weights may be anywhere."""
    shapes = {clean_name(n): tuple(p.shape) for n, p in module.named_parameters()}
    known = {id(p): clean_name(n) for n, p in module.named_parameters()}
    modules = [
        [known[id(p)] for p in part.parameters(recurse=False)]
        for part in module.modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    stacks = [
        m
        for m in module.modules()
        if isinstance(m, nn.ModuleList) and len(m) and next(m.parameters(), None) is not None
    ]
    layers = [[known[id(p)] for p in layer.parameters()] for layer in stacks[0]] if stacks else []
    return Model(
        module=module,
        name=name,
        shapes=shapes,
        modules=modules,
        layers=layers,
        decoder=_decoder(next((m.config for m in module.modules() if hasattr(m, "config")), None)),
        buffer_bytes=sum(b.numel() * b.element_size() for b in module.buffers()),
    )


def only(model: Model, names: Collection[str]) -> Model:
    """A model's parameters of these names, its buffers and what activations depend on."""

    def kept(parts: list[list[str]]) -> list[list[str]]:
        return [[name for name in part if name in names] for part in parts]

    return dataclasses.replace(
        model,
        shapes={name: shape for name, shape in model.shapes.items() if name in names},
        modules=[part for part in kept(model.modules) if part],
        layers=kept(model.layers),
    )


def _decoder(config: Any) -> Decoder | None:
    """Numbers of a LLaMA-like configuration."""
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    if config is None or not all(isinstance(getattr(config, key, None), int) for key in needed):
        return None
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_width=keys * head,
        vocabulary=config.vocab_size,
    )
