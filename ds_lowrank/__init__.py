"""Low-rank optimizers (SARA, GaLore) that work under DeepSpeed ZeRO, FSDP2 and DDP."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ds_lowrank.config import LowRankConfig
from ds_lowrank.integrations.by_hand import refuse_what_a_trainer_would_drop
from ds_lowrank.integrations.ddp import exclude_from_ddp
from ds_lowrank.integrations.deepspeed import (
    build_optimizer,
    check_deepspeed_config,
    deepspeed_optimizer,
    prepare_cpu,
)
from ds_lowrank.layouts import LayoutError
from ds_lowrank.manifest import newest_complete
from ds_lowrank.optimizer import LowRankAdamW, construction_checks
from ds_lowrank.param_groups import param_groups, projected_names

if TYPE_CHECKING:
    from ds_lowrank.checkpoint.load import Loaded, load_checkpoint
    from ds_lowrank.checkpoint.opening import open_checkpoint
    from ds_lowrank.integrations.attach import attach
    from ds_lowrank.integrations.checkpoints import PREEMPTED_EXIT_CODE, CheckpointCallback
    from ds_lowrank.integrations.projected import route_clipping
    from ds_lowrank.integrations.resume import ResumeAnywhere
    from ds_lowrank.integrations.transformers import LowRankCallback, metrics, trainer_optimizer
    from ds_lowrank.layouts.fsdp import long_side_placement
    from ds_lowrank.report import describe

__all__ = [
    "PREEMPTED_EXIT_CODE",
    "CheckpointCallback",
    "LayoutError",
    "Loaded",
    "LowRankAdamW",
    "LowRankCallback",
    "LowRankConfig",
    "ResumeAnywhere",
    "attach",
    "build_optimizer",
    "check_deepspeed_config",
    "deepspeed_optimizer",
    "describe",
    "exclude_from_ddp",
    "load_checkpoint",
    "long_side_placement",
    "metrics",
    "newest_complete",
    "open_checkpoint",
    "param_groups",
    "prepare_cpu",
    "projected_names",
    "route_clipping",
    "trainer_optimizer",
]
__version__ = "0.1.0"

construction_checks.append(refuse_what_a_trainer_would_drop)

# Imported at their first use: these need Transformers, DTensors or distributed checkpoints, each of which takes as long
# to load as torch does, or much longer.
_LATE = {
    "PREEMPTED_EXIT_CODE": "integrations.checkpoints",
    "CheckpointCallback": "integrations.checkpoints",
    "Loaded": "checkpoint.load",
    "LowRankCallback": "integrations.transformers",
    "ResumeAnywhere": "integrations.resume",
    "attach": "integrations.attach",
    "describe": "report",
    "load_checkpoint": "checkpoint.load",
    "long_side_placement": "layouts.fsdp",
    "metrics": "integrations.transformers",
    "open_checkpoint": "checkpoint.opening",
    "route_clipping": "integrations.projected",
    "trainer_optimizer": "integrations.transformers",
}

if not TYPE_CHECKING:  # a type checker would take any name for one that there is

    def __getattr__(name: str) -> Any:
        if name not in _LATE:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
