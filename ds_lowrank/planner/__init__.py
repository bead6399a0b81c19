"""A run ahead of it: what each rank holds, how high it gets, what makes it fit, and what a step sends."""

from ds_lowrank.planner.advice import Advice, advise
from ds_lowrank.planner.choice import Comparison, compare, verdict
from ds_lowrank.planner.memory import TERMS, MemoryPlan, RankMemory, check_gpu_memory, plan_memory, plan_setup
from ds_lowrank.planner.model import Model, read_model
from ds_lowrank.planner.others import Other, others_of
from ds_lowrank.planner.setup import Setup, from_deepspeed, from_fsdp, low_rank_config
from ds_lowrank.planner.show import print_plan
from ds_lowrank.planner.show_wire import print_wire
from ds_lowrank.planner.wire import PURPOSES, Traffic

__all__ = [
    "PURPOSES",
    "TERMS",
    "Advice",
    "Comparison",
    "MemoryPlan",
    "Model",
    "Other",
    "RankMemory",
    "Setup",
    "Traffic",
    "advise",
    "check_gpu_memory",
    "compare",
    "from_deepspeed",
    "from_fsdp",
    "low_rank_config",
    "others_of",
    "plan_memory",
    "plan_setup",
    "print_plan",
    "print_wire",
    "read_model",
    "verdict",
]
