"""In which groups a sharding framework should see the parameters."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from ds_lowrank.config import LowRankConfig
from ds_lowrank.layouts import whole_shape
from ds_lowrank.targets.names import clean_name, named_parameters, named_weights
from ds_lowrank.targets.patterns import Target, Targets, find_targets, list_targets

__all__ = [
    "MAX_GROUPS",
    "Target",
    "Targets",
    "clean_name",
    "count_groups",
    "find_targets",
    "named_weights",
    "param_groups",
    "projected_names",
]

# A decoder layer's index: the first whole number between dots in a parameter's name.
_LAYER = re.compile(r"^(.*?\.)?\d+(?=\.)")
MAX_GROUPS = 4


def projected_names(model: nn.Module, config: LowRankConfig | None = None) -> list[str]:
    """Names of the parameters that :func:`param_groups` would project; it refuses where there are none."""
    return [target.name for target in list_targets(model, config or LowRankConfig()).projected]


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
    every other parameter of fewer than two dimensions). The optimizer's report names those of the full-rank ones that
    ``all-linear`` means and the rank leaves out, which is why their group lists them (``narrow``).

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
    found = find_targets(model, config)
    targets = found.projected
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
    rest = [(n, p) for n, p in named_parameters(model) if p.requires_grad and id(p) not in lowrank]
    for name, part, part_decay in (
        ("full.decay", [(n, p) for n, p in rest if len(whole_shape(p)) >= 2], decay),
        ("full.no_decay", [(n, p) for n, p in rest if len(whole_shape(p)) < 2], 0.0),
    ):
        if part:
            groups.append({"params": part, "name": name, "weight_decay": part_decay})
            if name == "full.decay" and found.narrow:
                groups[-1]["narrow"] = found.narrow
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
