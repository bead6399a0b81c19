"""``zero.Init`` of DeepSpeed's stage 3, among the ranks that accelerate has started without DeepSpeed's knowledge."""

from __future__ import annotations

import functools
from typing import Any

import torch


def count_all_ranks() -> None:
    """Have ``zero.Init`` take over torch.distributed's process group where there is one and DeepSpeed has none.

    On a CPU accelerate starts the group by itself. ``zero.Init``, which ``from_pretrained`` and ``from_config`` call
    under stage 3, then counts one rank, and fails at batch sizes that are those of several.
    """
    import deepspeed

    made = deepspeed.zero.Init.__init__
    if getattr(made, "counts_all_ranks", False):
        return

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
            deepspeed.init_distributed()
        made(self, *args, **kwargs)

    init.counts_all_ranks = True  # type: ignore[attr-defined]
    deepspeed.zero.Init.__init__ = init
