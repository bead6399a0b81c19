"""What has to be true of the first gradients where the optimizer holds the model's own parameters."""

from __future__ import annotations

from collections.abc import Sequence

from ds_lowrank.comm import Comm
from ds_lowrank.layouts import Layout, LayoutError, Member
from ds_lowrank.plan import check_equal

NO_GRADIENT = (
    "no parameter of the optimizer has a gradient: nothing moves. If the model was sharded (fully_shard) or replaced "
    "after the optimizer was built, build the optimizer after it"
)


def find_gradients(layout: Layout, comm: Comm, members: Sequence[Member], layerwise: bool) -> bool:
    """Whether any parameter has a gradient; where ranks hold whole parameters, on any rank. Collective there.

    Args:
        layout: how the parameters lie.
        comm: the collectives.
        members: all parameters.
        layerwise: gradients may be used up already.

    Raises:
        LayoutError: ranks that hold whole parameters have different gradients, or none at all.
    """
    found = any(m.parameter.grad is not None for m in members)  # a rank may hold no element, and a gradient
    if not layout.dealt:
        return found
    everywhere = comm.gather_objects((found, layout.checksums("gradients")))
    remedy = (
        "nobody averages them. Wrap the model in DistributedDataParallel; with layerwise, call "
        "ds_lowrank.describe(optimizer) before the first backward pass"
    )
    check_equal([checksums for _, checksums in everywhere], "gradients", remedy)
    found = any(there for there, _ in everywhere)
    if not found and not layerwise:
        raise LayoutError(f"on {layout.kind}: {NO_GRADIENT}")
    return found
