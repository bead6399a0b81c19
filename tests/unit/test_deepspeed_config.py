"""A DeepSpeed configuration means what DeepSpeed takes it for, and all that is wrong with one is told at once."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from torch import nn

import ds_lowrank
from ds_lowrank.integrations import deepspeed_config as integration
from ds_lowrank.integrations.deepspeed_config import read_deepspeed_config
from ds_lowrank.integrations.transformers import trainer_optimizer
from ds_lowrank.report import Report, print_report

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GOOD = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "gradient_clipping": 1.0,
}


def zero(stage: int = 2, **more: object) -> dict:
    return {**GOOD, "zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (zero(offload_optimizer={"device": "cpu"}), zero(cpu_offload=True)),
        (zero(3, offload_param={"device": "cpu"}), zero(3, cpu_offload_param=True)),
        (zero(3, stage3_max_live_parameters=7), zero(3, max_live_parameters=7)),
        (zero(3, stage3_prefetch_bucket_size=7), zero(3, prefetch_bucket_size=7.0)),
        (zero(overlap_comm=True), zero(overlap_comm="true")),
        (zero(3), zero(3, overlap_comm=True, reduce_bucket_size="auto")),
        ({**GOOD, "bf16": {"enabled": True}}, {**GOOD, "bfloat16": {"enabled": "yes"}}),
        ({**GOOD, "data_types": {"grad_accum_dtype": "fp32"}}, {**GOOD, "data_types": {"grad_accum_dtype": "float"}}),
    ],
)
def test_two_spellings_of_one_thing(one, other):
    first, second = read_deepspeed_config(one), read_deepspeed_config(other)
    fields = {f.name for f in dataclasses.fields(first)} - {"content", "zero"}
    assert {f: getattr(first, f) for f in fields} == {f: getattr(second, f) for f in fields}
    deprecated = {"cpu_offload", "cpu_offload_param"}
    kept = [{k: v for k, v in dict(read.zero).items() if k not in deprecated} for read in (first, second)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("block", "own", "expected"),
    [
        ({"enabled": True, "dtype": "bfloat16"}, "auto", "bfloat16"),
        ({"enabled": "true", "dtype": "bf16"}, "float32", "float32"),
        ({"enabled": False, "dtype": "bfloat16"}, "auto", "auto"),
    ],
)
def test_the_dtype_of_deepspeeds_autocast_is_that_of_the_gradients(block, own, expected):
    """Its weights are fp32, and what bf16 rounded would count as directions of the gradient."""
    config = {**GOOD, "torch_autocast": block, "lowrank": {"rank": 4, "gradient_dtype": own}}
    assert ds_lowrank.deepspeed_optimizer(nn.Linear(8, 12), config).config.gradient_dtype == expected


# What is wrong, and how each is told.
FAULTS: list[tuple[dict, str]] = [
    ({"optimizer": {"type": "AdamW"}}, '"optimizer" block beside'),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2 is not supported"),
    ({"compile": {"enabled": True}}, "compile.enabled is unknown to DeepSpeed"),
    ({"bf16": {"enable": True}}, "bf16.enable is unknown to DeepSpeed"),
    ({"fp16": [1]}, "fp16 must be a block of options, got [1]"),
    ({"communication_data_type": "int3"}, "communication_data_type: "),
    ({"gradient_clipping": "much"}, "gradient_clipping must be a number >= 0"),
    ({"train_batch_size": 0}, "train_batch_size must be an integer >= 1, got 0"),
    ({"data_types": {"grad_accum_dtype": "fp33"}}, "grad_accum_dtype = 'fp33' is unknown"),
    ({"zero_force_ds_cpu_optimizer": True}, '"zero_force_ds_cpu_optimizer": false'),
    ({"lowrank": {"rnk": 8}}, "lowrank.rnk"),
]
ZERO_FAULTS: list[tuple[dict, str]] = [
    ({"reduce_bucket_size": 0}, "zero_optimization.reduce_bucket_size: Input should be greater than 0, got 0"),
    ({"overlap_com": True}, "did you mean 'overlap_comm'?"),
    ({"offload_param": "cpu"}, "zero_optimization.offload_param: "),
    ({"max_live_parameters": 1, "stage3_max_live_parameters": 1}, "also as stage3_max_live_parameters"),
    ({"allgather_bucket_size": 5}, "allgather_bucket_size must be even"),
    ({"round_robin_gradients": True}, "round_robin_gradients = true is not supported"),
    ({"zero_quantized_gradients": True}, "zero_quantized_gradients = true needs a GPU"),
    ({"cpu_offload": True}, ""),  # with zero_force_ds_cpu_optimizer, above
]


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def test_all_reasons_are_told_at_once(no_gpu):
    block = {"stage": 2}
    for change, _ in ZERO_FAULTS:
        block.update(change)
    config: dict = {**GOOD, "zero_optimization": block}
    for change, _ in FAULTS:
        config.update(change)
    with pytest.raises(ValueError, match="not supported") as raised:
        ds_lowrank.check_deepspeed_config(config)
    lines = str(raised.value).splitlines()
    for _, text in [*FAULTS, *ZERO_FAULTS]:
        assert any(text in line for line in lines), text
    assert len(lines) == len(set(lines)) == len(FAULTS) + len(ZERO_FAULTS) - 1


ALONE = [*FAULTS[:9], *((zero(**block), text) for block, text in ZERO_FAULTS[:7])]


@pytest.mark.parametrize(("change", "text"), ALONE)
def test_one_reason_is_told_alone(change, text, no_gpu):
    with pytest.raises(ValueError, match=re.escape(text)) as raised:
        ds_lowrank.check_deepspeed_config({**GOOD, **change})
    assert "\n" not in str(raised.value)


def test_what_only_a_gpu_can_do_is_no_fault_of_another_machine(no_gpu):
    config = {**zero(3, zero_quantized_gradients=True), "fp16": {"enabled": True}}
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        read_deepspeed_config(config)
    assert read_deepspeed_config(config, here=False).dtype == "fp16"


def test_accelerates_file_is_told_by_its_name(tmp_path):
    with pytest.raises(ValueError, match="accelerate's configuration"):
        ds_lowrank.check_deepspeed_config(CONFIGS / "accelerate_zero2.yaml")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zero*.json")), ids=lambda path: path.name)
def test_our_own_files_say_what_is_clipped(path):
    assert "gradient_clipping" in json.loads(path.read_text())
    assert read_deepspeed_config(path).notes == []


# ---- projected gradients ----

PROJECTED = {"lowrank": {"gradients": "projected"}}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (zero(offload_optimizer={"device": "cpu"}), "with offload_optimizer or offload_param is not supported yet"),
        (zero(3, offload_param={"device": "cpu"}), "with offload_optimizer or offload_param is not supported yet"),
        ({**zero(1), **BF16, "data_types": {"grad_accum_dtype": "fp32"}}, "uses its BF16_Optimizer there"),
        (zero(3, zero_hpz_partition_size=2), "zero_hpz_partition_size > 1 is not supported"),
        ({"gradient_allreduce_op": "sum"}, "averages gradients over the ranks"),
    ],
)
def test_what_does_not_go_with_projected_gradients(change, text, no_gpu):
    ds_lowrank.check_deepspeed_config({**GOOD, **change})
    with pytest.raises(ValueError, match=re.escape(text)) as raised:
        ds_lowrank.check_deepspeed_config({**GOOD, **change, **PROJECTED})
    assert "\n" not in str(raised.value)


def test_fp16_does_not_go_with_projected_gradients():
    config = {**GOOD, "fp16": {"enabled": True}}
    assert read_deepspeed_config(config, here=False).dtype == "fp16"
    with pytest.raises(ValueError, match="with fp16 is not supported"):
        read_deepspeed_config({**config, **PROJECTED}, here=False)


def test_ordinary_bf16_rounds_projected_matrices_stochastically():
    """They have no master copy, whatever DeepSpeed keeps of the rest."""
    rounded = {"stochastic_rounding": True}
    read_deepspeed_config({**GOOD, **BF16, "lowrank": {"gradients": "projected", **rounded}})
    for config in ({**GOOD, **BF16, "lowrank": rounded}, {**GOOD, "lowrank": {**PROJECTED["lowrank"], **rounded}}):
        with pytest.raises(ValueError, match="stochastic_rounding = true is for bf16 weights"):
            read_deepspeed_config(config)


# ---- the clip that nobody asked for ----


def unasked(monkeypatch, default: float) -> dict:
    """A configuration without the key, under a DeepSpeed with this default: 1.0 from 0.19.8 on, 0 before."""
    import deepspeed.runtime.config

    monkeypatch.setattr(deepspeed.runtime.config, "GRADIENT_CLIPPING_DEFAULT", default)
    return {key: value for key, value in GOOD.items() if key != "gradient_clipping"}


def test_a_clip_by_default_is_told(monkeypatch):
    config = unasked(monkeypatch, 0.7)
    with pytest.warns(UserWarning, match=r"clipped at a norm of 0\.7: the configuration has no gradient_clipping"):
        ds_lowrank.check_deepspeed_config(config)
    with pytest.warns(UserWarning, match=r"norm of 0\.7"):
        optimizer = ds_lowrank.deepspeed_optimizer(nn.Linear(256, 200), config)
    assert "norm of 0.7" in _report(optimizer.notes)
    assert "clipped" not in _report([])


def test_a_clip_that_was_asked_for_or_is_none_is_not(monkeypatch):
    for default, more in ((0.0, {}), (1.0, {"gradient_clipping": 0.0}), (1.0, {"gradient_clipping": "auto"})):
        config = {**unasked(monkeypatch, default), **more}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ds_lowrank.check_deepspeed_config(config)


def test_the_trainers_report_tells_it(monkeypatch):
    factory, kwargs = trainer_optimizer()
    wrapped = SimpleNamespace(config=unasked(monkeypatch, 0.7))
    args = SimpleNamespace(
        hf_deepspeed_config=wrapped,
        fsdp="",
        optim="adamw_torch",
        optim_args=None,
        optim_target_modules=None,
        learning_rate=0.1,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        world_size=2,
    )
    optimizer = factory()(nn.Linear(256, 200), kwargs["config"], args)
    assert "norm of 0.7" in _report(optimizer.notes)


def _report(notes: list[str]) -> str:
    console = Console(record=True, width=300, file=io.StringIO())
    print_report(
        Report("zero2", 2, {(8, 8, 2): 1}, 64, [], 0, [], 0, 0, [8], [8], 200, "importance", tuple(notes)), console
    )
    return console.export_text()


def test_an_older_deepspeed_without_classes_of_precision(monkeypatch):
    """Before 0.17 ``bf16`` was read key by key."""
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.precision_config", None)
    for key in ("bf16", "bfloat16"):
        assert read_deepspeed_config({**GOOD, key: {"enabled": True}}).dtype == "bf16"
    assert read_deepspeed_config({**GOOD, "bf16": {"enabled": "auto"}}).dtype == "auto"
    assert read_deepspeed_config(GOOD).dtype == "fp32"
    assert integration.bf16_master({"bfloat16": {"bf16_master_weights_and_grads": True}})
