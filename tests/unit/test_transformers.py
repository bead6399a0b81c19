"""One argument of the HF Trainer, on one process; under DeepSpeed see tests/integration."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from storage import state_bytes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import ds_lowrank
from ds_lowrank import LowRankAdamW, LowRankCallback, LowRankConfig, trainer_optimizer
from ds_lowrank.integrations.resume import _fit_schedule
from ds_lowrank.integrations.transformers import check_saving
from ds_lowrank.optimizer import STATE_KEY

ZERO2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}


def model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    )


def arguments(tmp_path, **options) -> TrainingArguments:
    settings = {"use_cpu": True, "max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(tmp_path), **{**settings, **options})


def trainer(tmp_path, choice, callbacks=None, **options) -> Trainer:
    tokens = torch.randint(0, 64, (16, 8)).tolist()
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    args = arguments(tmp_path, **options)
    return Trainer(model(), args, train_dataset=data, optimizer_cls_and_kwargs=choice, callbacks=callbacks)


TRAINING = {"learning_rate": 0.03, "weight_decay": 0.2, "adam_beta1": 0.7, "adam_beta2": 0.8, "adam_epsilon": 1e-5}


def test_training_arguments_are_honoured(tmp_path):
    run = trainer(tmp_path, trainer_optimizer({"rank": 4}), **TRAINING)
    optimizer = run.create_optimizer()
    assert isinstance(optimizer, LowRankAdamW)
    for group in optimizer.param_groups:
        decay = 0.0 if group["name"] == "full.no_decay" else 0.2
        found = (group["lr"], group["betas"], group["eps"], group["weight_decay"])
        assert found == (0.03, (0.7, 0.8), 1e-5, decay)


def test_a_trainer_without_factories_gets_the_optimizer_too(tmp_path):
    """transformers < 5 calls optimizer_cls(groups, **kwargs) and expects an optimizer of its model's parameters."""
    run = trainer(tmp_path, trainer_optimizer({"rank": 4}), **TRAINING)

    class OldTrainer:
        args, model = run.args, run.model

        def create_optimizer(self):
            kind, kwargs = run.optimizer_cls_and_kwargs
            return kind([{"params": list(self.model.parameters())}], **kwargs)

    optimizer = OldTrainer().create_optimizer()
    assert isinstance(optimizer, LowRankAdamW)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert len(optimizer.matrix_specs) == 14


def test_the_configuration_wins_over_training_arguments(tmp_path):
    config = LowRankConfig(rank=4, lr=0.5, betas=(0.1, 0.2), eps=1e-3, weight_decay=0.3)
    group = trainer(tmp_path, trainer_optimizer(config), **TRAINING).create_optimizer().param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.1, 0.2), 1e-3, 0.3)


def test_a_run_trains_in_subspaces_and_reports(tmp_path, capsys, caplog):
    run = trainer(tmp_path, trainer_optimizer({"rank": 4}), [LowRankCallback()], weight_decay=0.0, max_steps=1)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    projected = ds_lowrank.projected_names(run.model, LowRankConfig(rank=4))
    assert len(projected) == 14
    for name, p in run.model.named_parameters():
        moved = p.detach() - before[name]
        assert moved.abs().max() > 0
        if name in projected:
            assert torch.linalg.matrix_rank(moved, rtol=1e-3) <= 4
    printed = capsys.readouterr().out
    assert "16 x 16" in printed
    assert "40 x 16" in printed
    assert "optimizer state per rank" in printed
    assert "layout: one process on 1 rank" in printed
    assert "start anew" not in caplog.text  # accelerate loads back the empty state that it took from the optimizer
    found = ds_lowrank.metrics(run.optimizer)
    assert found["lowrank/refreshes"] == 14


@pytest.mark.parametrize(
    ("selection", "when"), [("dominant", "refreshed every 9 steps"), ("online_pca", "which move in every step")]
)
def test_the_report_says_when_bases_change(selection, when):
    from ds_lowrank.report import make_report, print_report

    options = {"rank": 4, "selection": selection, "update_proj_gap": 9}
    console = Console(record=True, width=110)
    print_report(make_report(ds_lowrank.build_optimizer(model(), options, lr=0.1)), console)
    assert f"{selection} subspaces, {when}" in console.export_text()


def test_the_printed_bytes_are_the_measured_ones():
    from ds_lowrank.integrations.deepspeed import build_optimizer
    from ds_lowrank.report import make_report

    net = model()
    optimizer = build_optimizer(net, LowRankConfig(rank=4), lr=0.1)
    tokens = torch.randint(0, 64, (2, 8))
    net(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    small = [s[key] for s in optimizer.state[STATE_KEY].values() for key in ("indices", "overlaps")]
    counted = 4 * len(optimizer.state) + sum(4 * tensor.numel() for tensor in small)
    assert make_report(optimizer).state_bytes == [pytest.approx(state_bytes(optimizer.state) - counted, abs=64)]


def test_the_printed_ratio_is_right_for_bf16_weights_without_a_master():
    """torch's AdamW keeps bf16 moments there; the low-rank states stay fp32."""
    from ds_lowrank.integrations.deepspeed import build_optimizer
    from ds_lowrank.report import make_report

    net = model().bfloat16()
    report = make_report(build_optimizer(net, LowRankConfig(rank=4), lr=0.1))
    assert report.adamw_bytes == [2 * 2 * sum(p.numel() for p in net.parameters())]


def test_the_callback_refuses_another_optimizer(tmp_path):
    with pytest.raises(ValueError, match="AdamW and not LowRankAdamW"):
        trainer(tmp_path, None, [LowRankCallback()]).train()


def test_an_optimizer_that_the_trainer_would_drop_is_refused():
    """Trainer(optimizers=(optimizer, None)) under DeepSpeed trains with AdamW without a word."""
    active = HfTrainerDeepSpeedConfig(ZERO2)
    with pytest.raises(ValueError, match="optimizer_cls_and_kwargs"):
        LowRankAdamW(ds_lowrank.param_groups(model(), LowRankConfig(rank=4)))
    del active
    LowRankAdamW(ds_lowrank.param_groups(model(), LowRankConfig(rank=4)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"optimizer": {"type": "AdamW"}}, '"optimizer" block'),
        ({"zero_optimization": {"stage": 0}}, "stage = 0"),
        ({"lowrank": {"rnk": 4}}, "did you mean 'rank'"),
    ],
)
def test_the_trainers_deepspeed_configuration_is_checked(change, text, tmp_path):
    run = trainer(tmp_path, trainer_optimizer())
    run.args.hf_deepspeed_config = HfTrainerDeepSpeedConfig({**ZERO2, **change})
    with pytest.raises(ValueError, match=text):
        run.create_optimizer()


@pytest.mark.parametrize("launcher", ["deepspeed", "accelerate"])
def test_the_block_is_read_where_no_configuration_is_given(tmp_path, launcher):
    run = trainer(tmp_path, trainer_optimizer())
    wrapped = HfTrainerDeepSpeedConfig({**ZERO2, "lowrank": {"rank": 3, "selection": "dominant"}})
    if launcher == "deepspeed":
        run.args.hf_deepspeed_config = wrapped
    else:  # accelerate launch --use_deepspeed --deepspeed_config_file
        run.args.deepspeed_plugin = SimpleNamespace(hf_ds_config=wrapped)
    run.is_deepspeed_enabled = True
    another = HfTrainerDeepSpeedConfig({**ZERO2, "lowrank": {"rank": 7}})  # the global one is now another Trainer's
    optimizer = run.create_optimizer()
    del another
    assert {s.rank for s in optimizer.matrix_specs} == {3}
    assert optimizer.config.selection == "dominant"


def test_the_block_is_read_from_the_fsdp_configuration(tmp_path, monkeypatch):
    path = tmp_path / "fsdp.json"
    path.write_text(json.dumps({"version": 2, "lowrank": {"rank": 3, "selection": "dominant"}}))
    # What the Trainer makes of the file: it must leave our block in its place.
    args = arguments(tmp_path, fsdp=True, fsdp_config=str(path))
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)  # transformers 4 sets it, and accelerate asks for a GPU
    run = trainer(tmp_path, trainer_optimizer())
    run.args = args
    run.is_fsdp_enabled = True
    monkeypatch.setattr(run.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=2), raising=False)
    optimizer = run.create_optimizer()
    assert {s.rank for s in optimizer.matrix_specs} == {3}
    assert optimizer.config.selection == "dominant"


def test_what_accelerate_dropped_is_refused(tmp_path, monkeypatch):
    """On a CPU it trains with DDP where FSDP was asked for; after `accelerate launch --cpu` without DeepSpeed."""
    run = trainer(tmp_path, trainer_optimizer({"rank": 4}))
    run.args.fsdp = True
    with pytest.raises(ValueError, match="FSDP was asked for, but accelerate chose NO"):
        run.create_optimizer()
    run.args.fsdp = None
    run.args.hf_deepspeed_config = HfTrainerDeepSpeedConfig(ZERO2)
    with pytest.raises(ValueError, match="DeepSpeed was asked for, but accelerate chose NO"):
        run.create_optimizer()
    del run.args.hf_deepspeed_config
    run.is_fsdp_enabled = True
    monkeypatch.setattr(run.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=1), raising=False)
    with pytest.raises(ValueError, match="FSDP1 flattens parameters"):
        run.create_optimizer()


def test_checkpoints_of_one_ranks_states_are_refused(tmp_path):
    run = trainer(tmp_path, trainer_optimizer({"rank": 4}), save_strategy="steps")
    assert isinstance(run.create_optimizer(), LowRankAdamW)  # one process holds all
    with pytest.raises(ValueError, match=r"add ds_lowrank.CheckpointCallback\(\)"):
        check_saving(run.args, 2, run.callback_handler.callbacks)
    run.add_callback(ds_lowrank.CheckpointCallback())
    check_saving(run.args, 2, run.callback_handler.callbacks)


def test_layerwise_steps_in_the_backward_pass_and_refuses_a_clip(tmp_path):
    choice = trainer_optimizer({"rank": 4, "layerwise": True})
    with pytest.raises(ValueError, match=r"max_grad_norm = 1\.0 cannot go with layerwise.*--grad_clipping"):
        trainer(tmp_path, choice).train()
    weights = []
    for option in (choice, trainer_optimizer({"rank": 4})):
        torch.manual_seed(0)
        run = trainer(tmp_path, option, [LowRankCallback()], max_grad_norm=0.0, gradient_accumulation_steps=2)
        run.train()
        weights.append({n: p.detach() for n, p in run.model.named_parameters()})
    assert run.optimizer.optimizer.config.accumulation_steps == 1  # read with layerwise only
    for name, weight in weights[0].items():
        assert torch.allclose(weight, weights[1][name], rtol=0, atol=1e-6), name


def test_bad_options_are_refused_at_once():
    with pytest.raises(ValueError, match="did you mean 'selection'"):
        trainer_optimizer({"selections": "importance"})


def test_arguments_that_cannot_be_found_are_asked_for():
    factory, kwargs = trainer_optimizer({"rank": 4})
    with pytest.raises(ValueError, match="args=training_args"):
        factory()(model(), **kwargs)


def test_a_schedule_fits_another_number_of_groups():
    """Under ZeRO the number of groups of whole layers depends on the number of ranks."""
    saved = {"base_lrs": [0.1] * 3, "_last_lr": [0.05] * 3, "last_epoch": 4, "lr_lambdas": [None] * 3}
    fitted = _fit_schedule(saved, 2)
    assert fitted == {"base_lrs": [0.1] * 2, "_last_lr": [0.05] * 2, "last_epoch": 4, "lr_lambdas": [None] * 2}
    assert _fit_schedule(saved, 3) is saved
    with pytest.raises(ValueError, match="3 parameter groups with different base_lrs and this run 2"):
        _fit_schedule({**saved, "base_lrs": [0.1, 0.2, 0.1]}, 2)


@pytest.mark.parametrize(("flags", "told"), [({}, "auto"), ({"bf16": True}, "bfloat16")])
def test_the_trainers_autocast_is_known(tmp_path, flags, told):
    assert trainer(tmp_path, trainer_optimizer({"rank": 4}), **flags).create_optimizer().config.gradient_dtype == told
