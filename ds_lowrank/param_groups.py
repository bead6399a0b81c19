"""Which parameters are low-rank, with which rank, and in which groups a sharding framework should see them."""

from __future__ import annotations

import contextlib
import itertools
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_lowrank.config import LowRankConfig
from ds_lowrank.geometry import matrix_shape
from ds_lowrank.layouts import bare_model, whole_shape

# A decoder layer's index: the first whole number between dots in a parameter's name.
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.)")
_HEAD_NAMES = ("lm_head", "embed_out", "score", "classifier", "output_projection")
MAX_GROUPS = 4


# What wrappers put into the names of parameters; the sampler is keyed by the name without it.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """A parameter that is trained in a subspace.

    Attributes:
        name: name in ``model.named_parameters()``, without what wrappers put into it.
        parameter: the weight.
        rank: r, clamped to min(m, n).
        stacked: whether it is several matrices stacked along the first dimension.
    """

    name: str
    parameter: nn.Parameter
    rank: int
    stacked: bool


@dataclass(frozen=True)
class _Candidate:
    """A parameter that a pattern may name.

    Attributes:
        name: what patterns are matched with: the module's name, or the parameter's where a module has several.
        parameter: the weight.
        stacked: see :class:`Target`.
        linear: whether ``all-linear`` means it.
        protected: an embedding or an output head, which only its own name reaches.
        refused: why it cannot be projected, if so.
    """

    name: str
    parameter: nn.Parameter
    stacked: bool = False
    linear: bool = True
    protected: bool = False
    refused: str | None = None


def find_targets(model: nn.Module, config: LowRankConfig) -> list[Target]:
    """The projected parameters, in the model's parameter order.

    ``all-linear`` means the two-dimensional weights of linear layers and the stacked weights of experts (E × m × n,
    each of the E matrices projected by itself). Embeddings, the output head and convolutions (as out × (in · k · k))
    are projected only where ``optim_target_modules`` names them; frozen parameters never are.

    Raises:
        ValueError: a pattern of ``optim_target_modules`` or ``rank_pattern`` matches nothing, or something that is no
            matrix, or a rank is larger than both sides of a weight.
    """
    model = bare_model(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("nothing is projected: every parameter of the model is frozen")
    candidates = [c for c in _candidates(model) if c.parameter.requires_grad]
    patterns = _patterns(config)
    used: set[str] = set()
    chosen: dict[int, _Candidate] = {}
    for candidate in candidates:
        hits = [p for p in patterns if _matches(p, candidate)]
        if not hits:
            continue
        if candidate.refused:
            raise ValueError(
                f"optim_target_modules: {hits[0]!r} matches {candidate.name} {whole_shape(candidate.parameter)}, "
                f"{candidate.refused}: name other modules, and it is trained full-rank"
            )
        used.update(hits)
        chosen[id(candidate.parameter)] = candidate
    unused = [p for p in patterns if p not in used]
    if unused:
        names = [c.name for c in _candidates(model) if c.linear and not c.protected]
        raise ValueError(
            f"optim_target_modules: {', '.join(map(repr, unused))} matches no trainable linear layer. "
            f"Linear layers here: {_shorten(names)}"
        )
    targets = [
        Target(name, parameter, _clamped_rank(name, parameter, stacked, config), stacked)
        for name, parameter in _named_parameters(model)
        if id(parameter) in chosen
        for stacked in [chosen[id(parameter)].stacked]
    ]
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

    Low-rank parameters come first, in natural order, alone in one group, or for ZeRO in a few groups of whole layers
    (see :func:`count_groups`); then the full-rank parameters with weight decay, then those without (biases, norms and
    every other parameter of fewer than two dimensions).

    Args:
        model: the model, before any sharding, so that names and shapes are its own.
        config: options; ``None`` for the defaults.
        ranks: data-parallel ranks over which DeepSpeed will cut the groups; ``None``: nobody flattens them, and the
            groups, which are a part of a checkpoint, are the same on any number of ranks.
        weight_decay: λ of the groups with decay, where ``config.weight_decay`` is ``None``.

    Returns:
        Groups with ``params`` as (name, parameter) pairs, as torch ≥ 2.6 takes them.

    Raises:
        ValueError: see :func:`find_targets`.
    """
    config = config or LowRankConfig()
    decay = weight_decay if config.weight_decay is None else config.weight_decay
    targets = find_targets(model, config)
    any_stacked = any(t.stacked for t in targets) or any(len(whole_shape(t.parameter)) > 2 for t in targets)
    groups: list[dict[str, Any]] = []
    for chunk in [targets] if ranks is None else _layer_chunks(targets, ranks):
        groups.append(
            {
                "params": [(t.name, t.parameter) for t in chunk],
                "name": f"lowrank.{len(groups)}",
                "weight_decay": decay,
                "scale": config.scale,
                "rank": [t.rank for t in chunk],
                "update_proj_gap": config.update_proj_gap,
                "proj_type": config.proj_type,
                **({"stacked": [t.stacked for t in chunk]} if any_stacked else {}),
            }
        )
    lowrank = {id(t.parameter) for t in targets}
    rest = [(n, p) for n, p in _named_parameters(model) if p.requires_grad and id(p) not in lowrank]
    for name, part, part_decay in (
        ("full.decay", [(n, p) for n, p in rest if len(whole_shape(p)) >= 2], decay),
        ("full.no_decay", [(n, p) for n, p in rest if len(whole_shape(p)) < 2], 0.0),
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


def _matches(pattern: str, candidate: _Candidate) -> bool:
    """The HF Trainer's reading: a name, a part of it, or a regular expression for the whole of it."""
    if pattern == "all-linear":
        return candidate.linear and not candidate.protected
    if candidate.protected and candidate.name.rsplit(".", 1)[-1] not in pattern:
        return False
    return pattern in candidate.name or re.fullmatch(pattern, candidate.name) is not None


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    """Weights of linear layers (GPT-2's Conv1D is one), embeddings and convolutions, and every other parameter of
    three or more dimensions, which is taken for stacked matrices if it has three.
    """
    protected = _embeddings_and_heads(model)
    for module_name, module in model.named_modules():
        module_name = clean_name(module_name)
        linear = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__ == "Conv1D"
        for name, parameter in module.named_parameters(recurse=False):
            dimensions = len(whole_shape(parameter))
            if linear and name == "weight" and dimensions == 2:
                yield _Candidate(module_name, parameter, protected=module in protected)
            elif isinstance(module, _CONVOLUTIONS) and name == "weight":
                yield _Candidate(module_name, parameter, linear=False)
            elif dimensions == 3 and "conv" not in type(module).__name__.lower():
                own = f"{module_name}.{name}" if module_name else name
                experts = "expert" in own.lower() or hasattr(module, "num_experts")
                yield _Candidate(own, parameter, stacked=True, linear=experts)
            elif dimensions > 2:
                reason = f"a {dimensions}-dimensional parameter of a {type(module).__name__}, which is no matrix"
                yield _Candidate(f"{module_name}.{name}", parameter, linear=False, refused=reason)


def clean_name(name: str) -> str:
    """A name without what torch.compile, activation checkpointing and FSDP put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict of the bare model has: parameters, tied ones under every name, and persistent buffers."""
    bare = bare_model(model)
    found: dict[str, Tensor] = {clean_name(n): p for n, p in bare.named_parameters(remove_duplicate=False)}
    for prefix, module in bare.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found[clean_name(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def _named_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters under the names that the bare model gives them."""
    return [(clean_name(name), parameter) for name, parameter in bare_model(model).named_parameters()]


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


def _clamped_rank(name: str, parameter: nn.Parameter, stacked: bool, config: LowRankConfig) -> int:
    rank = config.rank_of(name)
    shape = matrix_shape(whole_shape(parameter), stacked)
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


def _shorten(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(names[:most])
    return shown + (f", … ({len(names)} in all)" if len(names) > most else "")
