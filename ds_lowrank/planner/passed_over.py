"""What of a framework's configuration changes memory and is not in a plan: it is named beside the figures.

A key is planned, or makes no difference to memory between the first step and the last, or is named where it is not at
its default. A key of a DeepSpeed that came later is named as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_lowrank.config import BLOCK

ZERO_PLANNED = frozenset(
    {
        "stage",
        "reduce_bucket_size",
        "overlap_comm",
        "offload_optimizer",
        "cpu_offload",
        "sub_group_size",
        "prefetch_bucket_size",
        "param_persistence_threshold",
        "max_live_parameters",
        "max_reuse_distance",
    }
)
# Checks, files, what other optimizers do, which collective; and what is refused.
ZERO_INDIFFERENT = frozenset(
    {
        "allgather_bucket_size",
        "cpu_offload_use_pin_memory",
        "elastic_checkpoint",
        "enable_sanity_checks",
        "gather_16bit_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "override_module_apply",
        "pipeline_loading_checkpoint",
        "round_robin_gradients",
        "save_muon_momentum_buffer_in_memory",
        "stage3_gather_fp16_weights_on_model_save",
        "use_multi_rank_bucket_allreduce",
        "zenflow",
    }
)
ZERO_NAMED = frozenset(
    {
        "allgather_partitions",
        "allgather_sequential",
        "compute_grad_norm",
        "contiguous_gradients",
        "cpu_offload_param",
        "leaf_module",
        "memory_efficient_linear",
        "mics_hierarchical_params_gather",
        "mics_shard_size",
        "model_persistence_threshold",
        "module_granularity_threshold",
        "offload_param",
        "parameter_alignment",
        "reduce_scatter",
        "use_all_reduce_for_fetch_params",
        "zero_hpz_partition_size",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_weights",
        "zeropp_loco_param",
    }
)
_TOP_PLANNED = {
    "bf16",
    "bfloat16",
    "communication_data_type",
    "fp16",
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "zero_optimization",
    BLOCK,
}
_TOP_INDIFFERENT = {
    "aio",
    "checkpoint",
    "comet",
    "comms_logger",
    "csv_monitor",
    "dataloader_drop_last",
    "dump_state",
    "gradient_clipping",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "optimizer",
    "prescale_gradients",
    "scheduler",
    "steps_per_print",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
_FSDP_INDIFFERENT = {
    "activation_checkpointing",
    "backward_prefetch",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "forward_prefetch",
    "limit_all_gathers",
    "min_num_params",
    "offload_params",
    "reshard_after_forward",
    "state_dict_type",
    "sync_module_states",
    "transformer_layer_cls_to_wrap",
    "use_orig_params",
    "version",
    BLOCK,
}


def of_deepspeed(content: Mapping[str, Any], zero: Any) -> tuple[str, ...]:
    """Keys of a DeepSpeed configuration that are not in a plan.

    Args:
        content: the configuration.
        zero: its ``DeepSpeedZeroConfig``.
    """
    usual = type(zero)(stage=zero.stage)

    def found() -> Iterator[str]:
        for key in type(zero).model_fields:
            if key in ZERO_PLANNED or key in ZERO_INDIFFERENT:
                continue
            # What a deprecated key was turned into is what counts, and it is gone itself.
            if getattr(zero, key, None) != getattr(usual, key, None):
                yield f"zero_optimization.{key}"
        if getattr(zero.offload_optimizer, "super_offload", False):
            yield "zero_optimization.offload_optimizer.super_offload"
        for key, value in content.items():
            if key == "data_types":
                yield from (f"data_types.{name}" for name in value if name != "grad_accum_dtype")
            elif key not in _TOP_PLANNED | _TOP_INDIFFERENT and not _off(value):
                yield key

    return tuple(found())


def of_fsdp(keys: Mapping[str, Any]) -> tuple[str, ...]:
    """Keys of an FSDP configuration that are not in a plan."""
    found = [key for key, value in keys.items() if key not in _FSDP_INDIFFERENT | {"auto_wrap_policy"} and value]
    if keys.get("auto_wrap_policy", "TRANSFORMER_BASED_WRAP") != "TRANSFORMER_BASED_WRAP":
        found.append("auto_wrap_policy")
    return tuple(found)


def _off(value: Any) -> bool:
    if isinstance(value, Mapping):
        return value.get("enabled") is False or all(map(_off, value.values()))
    return value is None or value is False
