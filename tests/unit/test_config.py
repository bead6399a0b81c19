"""Bad input is refused before anything starts, with a text that says what to change."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import ds_lowrank
from ds_lowrank import LowRankConfig, check_deepspeed_config
from ds_lowrank.integrations import deepspeed_config as integration

GOOD = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
BF16 = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def test_defaults_are_the_fields():
    config = LowRankConfig()
    assert (config.rank, config.update_proj_gap, config.scale, config.proj_type) == (128, 200, 0.25, "std")
    assert (config.selection, config.moments, config.optim_target_modules) == ("importance", "keep", "all-linear")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rnk": 8}, "lowrank.rnk; did you mean 'rank'?"),
        ({"update_gap": 8}, "did you mean 'update_proj_gap'?"),
        ({"rank": 0}, "lowrank.rank must be an integer >= 1, got 0"),
        ({"rank": -4}, "got -4"),
        ({"rank": 8.0}, "lowrank.rank must be an integer"),
        ({"rank": True}, "lowrank.rank must be an integer"),
        ({"rank_pattern": {"mlp": 0}}, "rank_pattern['mlp']"),
        ({"rank_pattern": {"(": 4}}, "'(' is not a regular expression"),
        ({"update_proj_gap": 0}, "update_proj_gap must be an integer >= 1"),
        ({"scale": -1}, "lowrank.scale must be a number above 0"),
        ({"scale": "1"}, "lowrank.scale must be a number above 0"),
        ({"proj_type": "full"}, "must be one of std, reverse_std, right, left, got 'full'"),
        ({"selection": "sara"}, "must be one of dominant, importance, uniform, random"),
        ({"selection": "sara"}, "(SARA is importance, GaLore is dominant), got 'sara'. One of your own is known once"),
        ({"rule": "apolo"}, "lowrank.rule must be one of adamw, apollo, "),
        ({"rule": "apolo"}, "got 'apolo'; did you mean 'apollo'? One of your own"),
        ({"moments": "drop"}, "must be one of keep, project"),
        ({"optim_target_modules": []}, "non-empty list"),
        ({"optim_target_modules": "a("}, "is not a regular expression"),
        ({"stagger": "yes"}, "must be true or false"),
        ({"seed": 1.5}, "must be an integer"),
        ({"gram_dtype": "bf16"}, "must be one of auto, float32, float64"),
        ({"state_dtype": "int4"}, "lowrank.state_dtype must be one of fp32, bf16, int8, got 'int4'"),
        ({"basis_dtype": "8bit"}, "lowrank.basis_dtype must be one of fp32, bf16, int8, int4"),
        ({"stochastic_rounding": 1}, "lowrank.stochastic_rounding must be true or false"),
        ({"lr": -1.0}, "lowrank.lr must be a number >= 0"),
        ({"betas": [0.9]}, "lowrank.betas must be two numbers"),
        ({"eps": 0}, "lowrank.eps must be a number above 0"),
        ({"weight_decay": float("nan")}, "lowrank.weight_decay"),
        ({"scale": float("inf")}, "lowrank.scale must be a number above 0"),
        ([1], "must be a mapping"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        LowRankConfig.from_dict(options)


def test_block_of_a_deepspeed_json(tmp_path):
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps({**GOOD, "lowrank": {"rank": 32, "betas": [0.9, 0.95]}}))
    config = LowRankConfig.from_deepspeed(path)
    assert config == LowRankConfig(rank=32, betas=(0.9, 0.95))
    assert LowRankConfig.from_dict(config.to_dict()) == config
    assert config.replace(rank=16).rank == 16
    with pytest.raises(ValueError, match="did you mean 'scale'"):
        config.replace(scales=1.0)
    assert LowRankConfig.from_deepspeed(GOOD) == LowRankConfig()


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.json"):
        check_deepspeed_config(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_deepspeed_config(tmp_path / "broken.json")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"optimizer": {"type": "AdamW"}}, '"optimizer" block beside'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage = 4 is not supported"),
        ({"zero_optimization": {}}, "sets no zero_optimization.stage"),
        ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "mics_shard_size"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio < 1"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "ZenFlow|zenflow"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, "nvme"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "zero_force_ds_cpu_optimizer"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size = 2"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 4}}, "expert_parallel.autoep_size = 4"),
        ({"pipeline": {"stages": 2}}, "pipeline.stages = 2"),
        ({"compile": {"deepcompile": True}}, "deepcompile"),
        ({"fp16": {"enabled": True}}, "fp16 needs a GPU"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
            "without bf16.bf16_optimizer_states = true",
        ),
        ({"bf16": {**BF16, "enabled": False}}, "set bf16.enabled to true"),
        (
            {
                "bf16": BF16,
                "zero_force_ds_cpu_optimizer": False,
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            },
            "takes no optimizer but its own DeepSpeedCPUAdam",
        ),
        (
            {"bf16": BF16, "zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "whose BF16_Optimizer keeps an fp32 master",
        ),
        ({"lowrank": {"stochastic_rounding": True}}, 'set "bf16": .*"bf16_master_weights_and_grads": true'),
        (
            {"bf16": {"enabled": True}, "lowrank": {"stochastic_rounding": True}},
            'set "bf16": .*"bf16_master_weights_and_grads": true',
        ),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast with float16"),
        ({"checkpoint": {"load_universal": True}}, "load_universal"),
        ({"lowrank": {"rank": 0}}, "lowrank.rank"),
        ({"low_rank": {"rank": 8}}, 'unknown block "low_rank".*did you mean "lowrank"'),
        ({"LowRank": {"rank": 8}}, 'did you mean "lowrank"'),
    ],
)
def test_unsupported_deepspeed_settings_are_refused(change, text, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    check_deepspeed_config({**GOOD, "optimizer": None})
    with pytest.raises(ValueError, match=text):
        check_deepspeed_config({**GOOD, **change})


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("enabled", [True, "auto"])
@pytest.mark.parametrize("rounding", [True, False])
def test_bf16_weights_without_a_master(stage, enabled, rounding):
    config = {**GOOD, "zero_optimization": {"stage": stage}, "bf16": {**BF16, "enabled": enabled}}
    config["lowrank"] = {"stochastic_rounding": rounding}
    assert check_deepspeed_config(config) == config


@pytest.mark.parametrize("module", [None, SimpleNamespace(DeepSpeedBF16Config=SimpleNamespace(model_fields={}))])
def test_a_deepspeed_that_keeps_its_master_anyway_is_told(monkeypatch, module):
    """As those that have no such class, or no such option."""
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.precision_config", module)
    with pytest.raises(ValueError, match=r"DeepSpeed .* cannot do without an fp32 master copy"):
        check_deepspeed_config({**GOOD, "bf16": BF16})


@pytest.mark.parametrize(
    ("version", "fine"), [("0.15.4", False), ("0.16.0", True), ("0.19.8+cu", True), ("0.20.0", False)]
)
def test_deepspeed_versions(version, fine, monkeypatch):
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: version)
    if fine:
        check_deepspeed_config(GOOD)
    else:
        with pytest.raises(ValueError, match=r"install deepspeed>=0\.16,<0\.20"):
            check_deepspeed_config(GOOD)


@pytest.mark.parametrize(
    ("version", "fine"), [("0.16.0", True), ("0.17.5", False), ("0.18.6", False), ("0.19.8", True)]
)
def test_bf16_optimizer_where_deepspeed_has_it(version, fine, monkeypatch):
    """Seen in 0.17.6 and 0.18.0: stage 1 with bf16 and fp32 accumulation is taken for stage 0."""
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: version)
    config = {
        **GOOD,
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    if fine:
        check_deepspeed_config(config)
    else:
        with pytest.raises(ValueError, match="use stage 2, or another DeepSpeed"):
            check_deepspeed_config(config)


@pytest.mark.parametrize(
    ("version", "stage", "offload", "fine"),
    [
        ("0.17.5", 2, "none", True),
        ("0.17.6", 2, "none", False),
        ("0.18.2+cu", 2, "none", False),
        ("0.18.2", 2, "cpu", True),
        ("0.18.2", 3, "none", True),
        ("0.18.3", 2, "none", True),
    ],
)
def test_deepspeeds_that_drop_micro_batches(version, stage, offload, fine, monkeypatch):
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: version)
    zero = {"stage": stage, "offload_optimizer": {"device": offload}}
    config = {**GOOD, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}
    if fine:
        check_deepspeed_config(config)
    else:
        with pytest.raises(ValueError, match=r"drops, in stage 2, .* install deepspeed<0\.17\.6 or >=0\.18\.3"):
            check_deepspeed_config(config)


def test_raw_deepspeed_cannot_fill_in_auto():
    """DeepSpeed itself dies of it with a TypeError, one key at initialize() and another at the first step."""
    config = {**GOOD, "gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    with pytest.raises(ValueError, match=r"give gradient_clipping, bf16\.enabled a value"):
        ds_lowrank.deepspeed_optimizer(torch.nn.Linear(8, 8), config)


def test_an_option_of_ours_may_be_auto():
    config = {**GOOD, "gradient_clipping": 1.0, "lowrank": {"rank": 4, "gram_dtype": "auto", "gradient_dtype": "auto"}}
    assert ds_lowrank.deepspeed_optimizer(torch.nn.Linear(8, 8), config).config.gram_dtype == "auto"


def test_raw_deepspeed_needs_its_permission():

    with pytest.raises(ValueError, match="zero_allow_untested_optimizer"):
        ds_lowrank.deepspeed_optimizer(torch.nn.Linear(8, 8), {"zero_optimization": {"stage": 2}})
