"""Process groups beside the framework's, for what communicates in the backward pass.

In one group all ranks have to start collectives in the same order. Ours are in a fixed order, and the framework's are;
but where ranks differ in what has a gradient, ours come earlier among the framework's on one rank than on another.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import distributed as dist

from ds_lowrank.layouts.base import Ranks

_Key = tuple[tuple[int, ...], str]
# Made once: a group keeps connections and threads, or a GPU's buffers. Those of a destroyed world are forgotten.
_made: MutableMapping[Any, dict[_Key, Any]] = weakref.WeakKeyDictionary()


def own_groups(ranks: Ranks) -> Ranks:
    """The same ranks with process groups of our own. Collective.

    Args:
        ranks: of a layout.
    """
    if ranks.size == 1 or not (dist.is_available() and dist.is_initialized()):
        return ranks
    everyone = _twin(ranks.process_group, ranks.device, [_members(ranks.process_group)])
    if ranks.replica_group is None:
        return dataclasses.replace(ranks, process_group=everyone, copy_group=everyone)
    # Of all ranks, since every rank has to take part in making every group.
    told: list[Any] = [None] * ranks.size
    dist.all_gather_object(told, (_members(ranks.copy_group), _members(ranks.replica_group)), group=everyone)
    copies, replicas = (sorted({pair[k] for pair in told}) for k in (0, 1))
    return dataclasses.replace(
        ranks,
        process_group=everyone,
        copy_group=_twin(ranks.copy_group, ranks.device, copies),
        replica_group=_twin(ranks.replica_group, ranks.device, replicas),
    )


def _members(group: Any) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(group))


def _twin(group: Any, device: torch.device, lists: list[tuple[int, ...]]) -> Any:
    """A group like this one, of those that the lists make.

    Args:
        group: the framework's.
        device: of the ranks.
        lists: the ranks of all groups that are made; this rank is in one.
    """
    mine, found = _members(group), None
    made = _made.setdefault(dist.group.WORLD, {})
    backend, world = dist.get_backend(group), dist.get_world_size()
    for members in lists:
        key = (members, backend)
        if key not in made:
            made[key] = dist.new_group(
                list(members),
                timeout=_timeout(group, device),
                backend=None if backend == dist.get_backend() else backend,
                # Where others of the world train something else, they do not come here.
                use_local_synchronization=len(lists) == 1 and len(members) < world,
            )
        if members == mine:
            found = made[key]
    return found


def _timeout(group: Any, device: torch.device) -> Any:
    """What the framework's group allows a collective; ``None``, torch's default, where this torch does not say."""
    whole: Any = dist.group.WORLD
    try:
        return (group or whole)._get_backend(device).options._timeout
    except (AttributeError, RuntimeError):
        return None
