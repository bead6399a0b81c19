"""The planner's inputs: a framework's file means what the framework takes it for, and what is no number is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_plan import TINY, zero

from ds_lowrank.cli import main
from ds_lowrank.integrations.deepspeed_config import read_deepspeed_config
from ds_lowrank.planner import from_deepspeed, from_fsdp, passed_over, plan_memory

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LOWRANK = {"lowrank": {"rank": 16}}


def deepspeed(stage: int = 2, **top: object) -> dict:
    return {**zero(stage), **top}


def test_every_key_of_deepspeeds_zero_block_is_planned_or_indifferent_or_named():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = (passed_over.ZERO_PLANNED, passed_over.ZERO_INDIFFERENT, passed_over.ZERO_NAMED)
    known = [key for kind in kinds for key in kind]
    assert len(known) == len(set(known))
    assert set(DeepSpeedZeroConfig.model_fields) - set(known) == set()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("zero*.json")), ids=lambda path: path.name)
def test_of_our_own_files_everything_is_planned(path):
    settings = read_deepspeed_config(path, here=False)
    assert passed_over.of_deepspeed(settings.content, settings.zero) == ()


@pytest.mark.parametrize(
    ("block", "top", "named"),
    [
        ({"offload_param": {"device": "cpu"}}, {}, ["zero_optimization.offload_param"]),
        ({"cpu_offload_param": True}, {}, ["zero_optimization.offload_param"]),
        ({"zero_hpz_partition_size": 2}, {}, ["zero_optimization.zero_hpz_partition_size"]),
        ({"contiguous_gradients": False}, {}, ["zero_optimization.contiguous_gradients"]),
        ({}, {"activation_checkpointing": {"cpu_checkpointing": True}}, ["activation_checkpointing"]),
        ({}, {"activation_checkpointing": {"cpu_checkpointing": False, "number_checkpoints": None}}, []),
        ({}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, ["torch_autocast"]),
        ({}, {"flops_profiler": {"enabled": False}, "steps_per_print": 7, "wall_clock_breakdown": True}, []),
        ({}, {"data_types": {"grad_accum_dtype": "fp32", "param_dtype": "bf16"}}, ["data_types.param_dtype"]),
        ({}, {"gradient_acumulation_steps": 4}, ["gradient_acumulation_steps"]),
    ],
)
def test_what_is_not_planned_is_named(block, top, named):
    plan = plan_memory(TINY, 2, deepspeed={**zero(3, **block), **top}, seq=32)
    assert list(plan.setup.passed_over) == named
    told = [note for note in plan.notes if note.startswith("set in the configuration")]
    assert told == ([f"set in the configuration, and not in the figures: {', '.join(named)}"] if named else [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (deepspeed(bf16={"enabled": True}), {**deepspeed(bfloat16={"enabled": True}), "bf16": None}),
        (zero(2, offload_optimizer={"device": "cpu"}), zero(2, cpu_offload=True)),
        (zero(3, stage3_max_live_parameters=0), zero(3, max_live_parameters=0)),
        (zero(3, stage3_max_reuse_distance=0), zero(3, max_reuse_distance=0)),
        (
            {**zero(3), "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": 50_000}},
            {**zero(3), "zero_optimization": {"stage": 3, "prefetch_bucket_size": 50_000}},
        ),
        (
            {**zero(3), "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": "auto"}},
            {**zero(3), "zero_optimization": {"stage": 3, "param_persistence_threshold": 640}},
        ),
    ],
)
def test_two_spellings_make_one_plan(one, other):
    plans = [plan_memory(TINY, 4, deepspeed=config, seq=32) for config in (one, other)]
    assert plans[0].setup == plans[1].setup
    assert plans[0].ours.moments == plans[1].ours.moments
    usual = plan_memory(TINY, 4, deepspeed={**zero((plans[0].setup.kind == "zero3" and 3) or 2), "bf16": {}}, seq=32)
    assert plans[0].setup != usual.setup


def test_fp16_is_planned_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    half = plan_memory(TINY, 4, deepspeed=deepspeed(bf16={}, fp16={"enabled": True}), seq=32)
    assert half.setup.dtype == "fp16"
    assert half.ours.moments == plan_memory(TINY, 4, deepspeed=deepspeed(), seq=32).ours.moments


@pytest.mark.parametrize(
    ("sizes", "given", "expected"),
    [
        ({}, {}, (1, 1)),
        ({"train_micro_batch_size_per_gpu": 4}, {}, (4, 1)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, {}, (4, 8)),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 8}, {}, (4, 8)),
        ({"train_batch_size": 64}, {}, (32, 1)),
        ({"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}, {"micro_batch": 3}, (3, 1)),
        ({"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4}, {"micro_batch": 2}, (2, 16)),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8}, {"accumulation": 2}, (4, 2)),
    ],
)
def test_batch_sizes_are_completed_as_deepspeed_does(sizes, given, expected):
    setup, _ = from_deepspeed(deepspeed(**sizes), 2, 64, **given)
    assert (setup.micro_batch, setup.accumulation) == expected


def test_batch_sizes_that_contradict_each_other():
    sizes = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}
    with pytest.raises(ValueError, match="train_batch_size = 64 cannot be had by 2 ranks"):
        from_deepspeed(deepspeed(**sizes), 2, 64)


@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_switches_of_fsdp(prefix):
    def read(**keys: object):
        return from_fsdp({prefix + key: value for key, value in keys.items()}, 2)[0]

    assert read(version=2).reshard is True
    for value in (False, "false", "False", "no", "0"):
        assert read(version=2, reshard_after_forward=value).reshard is False
    assert read(version="2", activation_checkpointing="true").checkpointing is True
    for key in ("offload_params", "cpu_offload"):
        for value in (True, "true"):
            with pytest.raises(ValueError, match="is not planned"):
                read(version=2, **{key: value})
    with pytest.raises(ValueError, match=r"FSDP version 1 .*\n.*must be true or false, got 'FULL_SHARD'"):
        read(version=1, reshard_after_forward="FULL_SHARD")
    assert read(version=2, auto_wrap_policy="NO_WRAP").passed_over == ("auto_wrap_policy",)


def test_accelerates_files(tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    sharded, _ = from_fsdp(CONFIGS / "accelerate_fsdp2.yaml", 2)
    assert (sharded.kind, sharded.reshard, sharded.passed_over) == ("fsdp2", True, ())
    for stage in (2, 3):
        by_yaml = from_deepspeed(CONFIGS / f"accelerate_zero{stage}.yaml", 2, 64)
        assert by_yaml == from_deepspeed(CONFIGS / f"zero{stage}.json", 2, 64)
    path = tmp_path / "mine.yaml"
    for text, match in (
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 1\n", "FSDP version 1 is not supported"),
        ("distributed_type: FSDP\nfsdp_config:\n  fsdp_offload_params: false\n", "FSDP version 1 is not supported"),
        ("distributed_type: FSDP\n", "has no fsdp_config block"),
        ("distributed_type: MULTI_GPU\n", "distributed_type is 'MULTI_GPU' there"),
        ("a: [\n", "is not valid YAML"),
        ("- 1\n", "must hold a mapping"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=match):
            from_fsdp(path, 2)
    path.write_text("distributed_type: DEEPSPEED\ndeepspeed_config:\n  zero_stage: 2\n")
    with pytest.raises(ValueError, match="name a file in it, deepspeed_config_file"):
        from_deepspeed(path, 2, 64)
    path.write_text("distributed_type: FSDP\nmixed_precision: 'no'\nfsdp_config:\n  fsdp_version: 2\n")
    assert from_fsdp(path, 2)[0].dtype == "fp32"


# ---- the command: exit code 2 and a sentence ----


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"hidden_size": -64},
        {"hidden_size": "wide"},
        {"hidden_size": None},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0},
        {"vocab_size": 0},
        {"intermediate_size": 0},
        {"model_type": 3},
        {"model_type": ["llama"]},
    ],
    ids=str,
)
def test_a_model_file_that_makes_no_model(change, tmp_path, capsys):
    assert _plan(tmp_path, {**TINY, **change}) == 2
    error = capsys.readouterr().err
    assert "error: " in error
    assert len(error) < 1200


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--gpu_memory", "nan"], "gpu_memory must be a number of GiB above 0, got nan"),
        (["--gpu_memory", "0"], "gpu_memory must be"),
        (["--gpu_memory=-5"], "gpu_memory must be"),
        (["--gpu_memory", "inf"], "gpu_memory must be"),
        (["--margin", "nan"], "margin must be a number of GiB >= 0, got nan"),
        (["--margin=-50"], "margin must be"),
        (["--micro_batch", "0"], "micro_batch must be an integer >= 1"),
        (["--accumulation", "0"], "accumulation must be an integer >= 1"),
        (["--seq", "0"], "seq must be an integer >= 1"),
        (["--gpus", "0"], "ranks must be an integer >= 1"),
    ],
)
def test_numbers_that_are_none(flags, text, tmp_path, capsys):
    for config in (None, deepspeed()):
        assert _plan(tmp_path, TINY, flags, config) == 2
        assert f"error: {text}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config",
    [
        deepspeed(bf16=[1]),
        deepspeed(fp16="yes"),
        zero(2, offload_optimizer="cpu"),
        deepspeed(zero_optimization=[2]),
        deepspeed(gradient_accumulation_steps="two"),
        deepspeed(communication_data_type=5),
        deepspeed(data_types=[1]),
        deepspeed(lowrank=[1]),
        zero(2, reduce_bucket_size="many"),
    ],
    ids=str,
)
def test_a_file_that_deepspeed_could_not_read(config, tmp_path, capsys):
    assert _plan(tmp_path, TINY, [], config) == 2
    assert "error: " in capsys.readouterr().err


def test_a_file_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "model.json"
    path.write_bytes(b"\x80\x02\xff")
    assert main(["plan", "--model_config", str(path), "--gpus", "2", "--gpu_memory", "8", "--rank", "8"]) == 2
    assert "model.json" in capsys.readouterr().err


def _plan(folder: Path, model: dict, flags: list[str] = [], config: dict | None = None) -> int:  # noqa: B006
    (folder / "model.json").write_text(json.dumps(model))
    command = ["plan", "--model_config", str(folder / "model.json"), "--gpus", "2", "--gpu_memory", "8", "--rank", "8"]
    if config is not None:
        (folder / "deepspeed.json").write_text(json.dumps(config))
        command += ["--deepspeed", str(folder / "deepspeed.json")]
    return main([*command, *flags])
