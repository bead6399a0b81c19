"""Which parameters are low-rank, with which rank, and in which groups a sharding framework should see them."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ds_lowrank.config import LowRankConfig

# A decoder layer's index: the first whole number between dots in a parameter's name.
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.)")
_HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "output_projection")
MAX_GROUPS = 4


@dataclass(frozen=True)
class Target:
    """A parameter that is trained in a subspace.

    Attributes:
        name: name in ``model.named_parameters()``.
        parameter: the weight, m × n.
        rank: r, clamped to min(m, n).
    """

    name: str
    parameter: nn.Parameter
    rank: int


def find_targets(model: nn.Module, config: LowRankConfig) -> list[Target]:
    """The projected parameters, in the model's parameter order.

    Only two-dimensional weights of linear layers (and of embeddings that are named) are candidates. Embeddings and
    the output head are left out unless ``optim_target_modules`` names them; frozen parameters always are.

    Raises:
        ValueError: a pattern of ``optim_target_modules`` or ``rank_pattern`` matches nothing, or a rank is larger
            than both sides of a weight.
    """
    protected = _embeddings_and_heads(model)
    patterns = _patterns(config)
    used: set[str] = set()
    chosen: dict[int, str] = {}
    for module_name, module in _linear_like(model):
        if not module.weight.requires_grad:
            continue
        hits = [p for p in patterns if _matches(p, module_name, module)]
        if module in protected:
            hits = [p for p in hits if p != "all-linear" and module_name.rsplit(".", 1)[-1] in p]
        if hits:
            used.update(hits)
            chosen[id(module.weight)] = module_name
    unused = [p for p in patterns if p not in used]
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is projected: every parameter of the model is frozen")
    if unused:
        names = [name for name, module in _linear_like(model) if module not in protected]
        raise ValueError(
            f"optim_target_modules: {', '.join(map(repr, unused))} matches no trainable linear layer. "
            f"Linear layers here: {_shorten(names)}"
        )
    targets = [
        Target(name, parameter, _clamped_rank(name, parameter, config))
        for name, parameter in model.named_parameters()
        if id(parameter) in chosen and parameter.requires_grad
    ]
    if not targets:
        raise ValueError("nothing is projected: every weight that optim_target_modules matches is frozen")
    for pattern in config.rank_pattern:
        if not any(re.search(pattern, target.name) for target in targets):
            raise ValueError(
                f"rank_pattern: {pattern!r} matches no projected parameter. "
                f"Projected: {_shorten([t.name for t in targets])}"
            )
    return targets


def projected_names(model: nn.Module, config: LowRankConfig | None = None) -> list[str]:
    """Names of the parameters that :func:`param_groups` would project."""
    return [target.name for target in find_targets(model, config or LowRankConfig())]


def param_groups(
    model: nn.Module,
    config: LowRankConfig | None = None,
    *,
    ranks: int | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups for :class:`ds_lowrank.LowRankAdamW`: every trainable parameter exactly once.

    A group carries rank, gap, scale, side and decay; selection, moments, seed and schedule are arguments of the
    optimizer. :func:`ds_lowrank.build_optimizer` passes a configuration on whole.

    Low-rank parameters come first, in natural order, alone in a few groups of whole layers (see
    :func:`count_groups`); then the full-rank parameters with weight decay, then those without (biases, norms and
    every other parameter of fewer than two dimensions).

    Args:
        model: the model, before any sharding, so that names and shapes are its own.
        config: options; ``None`` for the defaults.
        ranks: data-parallel ranks the groups will be cut over; ``None`` asks torch.distributed (1 without it).
        weight_decay: λ of the groups with decay, where ``config.weight_decay`` is ``None``.

    Returns:
        Groups with ``params`` as (name, parameter) pairs, as torch ≥ 2.6 takes them.

    Raises:
        ValueError: see :func:`find_targets`.
    """
    config = config or LowRankConfig()
    decay = weight_decay if config.weight_decay is None else config.weight_decay
    targets = find_targets(model, config)
    groups: list[dict[str, Any]] = []
    for chunk in _layer_chunks(targets, _world_size() if ranks is None else ranks):
        groups.append(
            {
                "params": [(t.name, t.parameter) for t in chunk],
                "name": f"lowrank.{len(groups)}",
                "weight_decay": decay,
                "scale": config.scale,
                "rank": [t.rank for t in chunk],
                "update_proj_gap": config.update_proj_gap,
                "proj_type": config.proj_type,
            }
        )
    lowrank = {id(t.parameter) for t in targets}
    rest = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in lowrank]
    for name, part, part_decay in (
        ("full.decay", [(n, p) for n, p in rest if p.ndim >= 2], decay),
        ("full.no_decay", [(n, p) for n, p in rest if p.ndim < 2], 0.0),
    ):
        if part:
            groups.append({"params": part, "name": name, "weight_decay": part_decay})
    return groups


def count_groups(layers: int, ranks: int) -> int:
    """Into how many groups of whole layers the low-rank parameters go.

    A framework that flattens a group and cuts it into ``ranks`` equal parts cuts no matrix when the group's layers
    divide by the ranks; and because DeepSpeed widens one group's gradient to fp32 at a time, more groups mean a lower
    peak. So: the most groups up to ``MAX_GROUPS`` that leave nothing cut; where something is cut anyway, as many as
    keep a layer a rank in each.
    """
    for groups in range(MAX_GROUPS, 0, -1):
        if layers % (groups * ranks) == 0:
            return groups
    return max(1, min(MAX_GROUPS, layers // ranks))


def _layer_chunks(targets: Sequence[Target], ranks: int) -> list[list[Target]]:
    by_layer: dict[str, list[Target]] = {}
    layer = ""
    for target in targets:
        match = _LAYER.match(target.name)
        layer = match.group(0) if match else layer  # a matrix outside the layers joins the layer before it
        by_layer.setdefault(layer, []).append(target)
    layers = list(by_layer.values())
    count = count_groups(len(layers), ranks)
    bounds = [i * len(layers) // count for i in range(count + 1)]
    return [[t for part in layers[a:b] for t in part] for a, b in itertools.pairwise(bounds)]


def _patterns(config: LowRankConfig) -> list[str]:
    targets = config.optim_target_modules
    return [targets] if isinstance(targets, str) else list(targets)


def _matches(pattern: str, module_name: str, module: nn.Module) -> bool:
    """The HF Trainer's reading: a name, a part of it, or a regular expression for the whole of it."""
    if pattern == "all-linear":
        return not isinstance(module, nn.Embedding)
    return pattern in module_name or re.fullmatch(pattern, module_name) is not None


def _linear_like(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Modules with one two-dimensional weight that maps vectors: Linear, GPT-2's Conv1D, Embedding."""
    for name, module in model.named_modules():
        kind = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
        weight = getattr(module, "weight", None)
        if kind and isinstance(weight, nn.Parameter) and weight.ndim == 2:
            yield name, module


def _embeddings_and_heads(model: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = {m for m in model.modules() if isinstance(m, nn.Embedding)}
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(NotImplementedError):  # what HF's base class raises where there is none
            module = getattr(model, getter, lambda: None)()
            if isinstance(module, nn.Module):
                found.add(module)
    tied = {id(m.weight) for m in found if hasattr(m, "weight")}
    for name, module in model.named_modules():
        is_head = name.rsplit(".", 1)[-1] in _HEAD_NAMES
        if is_head or id(getattr(module, "weight", None)) in tied:
            found.add(module)
    return found


def _clamped_rank(name: str, parameter: nn.Parameter, config: LowRankConfig) -> int:
    rank = config.rank_of(name)
    shape = tuple(parameter.shape)
    if rank > max(shape):
        raise ValueError(
            f"rank {rank} is larger than both sides of {name} {shape}: choose a rank up to {min(shape)}, set "
            "rank_pattern for this parameter, or leave it out of optim_target_modules"
        )
    if rank > min(shape):
        warnings.warn(
            f"rank {rank} is larger than the shorter side of {name} {shape}: clamped to {min(shape)}", stacklevel=2
        )
    return min(rank, *shape)


def _world_size() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def _shorten(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")
