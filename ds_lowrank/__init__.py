"""Low-rank optimizers (SARA, GaLore) that work under DeepSpeed ZeRO, FSDP2 and DDP."""

from ds_lowrank.checkpoint import Loaded, load_checkpoint, open_checkpoint
from ds_lowrank.config import LowRankConfig
from ds_lowrank.integrations.checkpoints import PREEMPTED_EXIT_CODE, CheckpointCallback
from ds_lowrank.integrations.ddp import exclude_from_ddp
from ds_lowrank.integrations.deepspeed import (
    build_optimizer,
    check_deepspeed_config,
    deepspeed_optimizer,
    prepare_cpu,
)
from ds_lowrank.integrations.resume import ResumeAnywhere
from ds_lowrank.integrations.transformers import LowRankCallback, metrics, trainer_optimizer
from ds_lowrank.layouts import LayoutError, long_side_placement
from ds_lowrank.manifest import newest_complete
from ds_lowrank.optimizer import LowRankAdamW
from ds_lowrank.param_groups import param_groups, projected_names
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
    "trainer_optimizer",
]
__version__ = "0.1.0"
