"""What a rank's file of a DeepSpeed checkpoint needs so that any other layout can read it: what lies where.

DeepSpeed saves a rank's flat buffers. With this beside them the weights, AdamW's moments and the low-rank rows of every
parameter can be put together by name from the files of all ranks, on any number of ranks of any layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_lowrank.layouts import Group, Layout, Member, is_outside
from ds_lowrank.plan.matrices import MatrixPlan

# Low-rank states hang on a string key of ``state``: torch's and DeepSpeed's loaders cast what hangs on a parameter
# to its dtype and pass over the rest.
STATE_KEY = "lowrank"
EIGHT_BIT_KEY = "adamw8bit"  # the same for 8-bit moments of parameters that are not projected
PARTS_KEY = "adamw"  # and under DDP for a rank's parts of moments that are numbers
DESCRIPTION_KEY = "ds_lowrank"
INSIDE = 1  # all weights are in flat masters
FORMAT = 2  # some are in the model's file


def describe_pieces(
    layout: Layout, members: Sequence[Member], plans: Sequence[MatrixPlan], groups: Sequence[Group]
) -> dict[str, Any]:
    """Numbers, strings and lists only, so that ``weights_only=True`` loads it.

    Returns:
        ``format``, ``layout`` (its kind), ``ranks``, ``rank``; ``parameters``: name -> ``shape``, and where this rank
        holds a piece ``start`` and ``stop`` (elements of the flattened parameter), and either ``unit`` (number of the
        flat master buffer), ``state`` (number of the state in the packed optimizer) and ``offset`` (elements in both)
        or ``outside``, 1: its weights are in the model's file;
        ``matrices``: name -> ``parameter``, ``index`` in a stack or -1, ``shape``, ``rank``, ``left``.
    """
    flats = [tensor for group in groups for tensor in group["params"]]
    numbers = {id(tensor): number for number, tensor in enumerate(flats)}
    parameters: dict[str, dict[str, Any]] = {}
    for member in members:
        found = parameters[member.name] = {"shape": list(member.shape)}
        if member.name in layout.pieces:
            piece = layout.pieces[member.name]
            found.update(start=piece.start, stop=piece.stop)
            if is_outside(layout, member.name):
                found["outside"] = 1
                continue
            flat, offset = layout.place(member.name)
            found.update(unit=layout.unit(member.name), state=numbers.get(id(flat), -1), offset=offset)
    return {
        "format": FORMAT if any("outside" in found for found in parameters.values()) else INSIDE,
        "layout": layout.kind,
        "ranks": layout.ranks.size,
        "rank": layout.ranks.rank,
        "parameters": parameters,
        "matrices": {
            p.name: {
                "parameter": p.parameter,
                "index": -1 if p.index is None else p.index,
                "shape": list(p.shape),
                "rank": p.r,
                "left": int(p.side == "left"),
            }
            for p in plans
        },
    }
