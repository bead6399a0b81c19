"""Memory of a run, ahead of it: what each rank holds, how high it gets, and what makes it fit."""

from ds_lowrank.planner.advice import Advice, advise
from ds_lowrank.planner.memory import TERMS, MemoryPlan, RankMemory, check_gpu_memory, plan_memory, plan_setup
from ds_lowrank.planner.model import Model, read_model
from ds_lowrank.planner.setup import Setup, from_deepspeed, from_fsdp, low_rank_config
from ds_lowrank.planner.show import print_plan

__all__ = [
    "TERMS",
    "Advice",
    "MemoryPlan",
    "Model",
    "RankMemory",
    "Setup",
    "advise",
    "check_gpu_memory",
    "from_deepspeed",
    "from_fsdp",
    "low_rank_config",
    "plan_memory",
    "plan_setup",
    "print_plan",
    "read_model",
]
