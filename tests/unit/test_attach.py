"""ds_lowrank.attach: what it brings, what it refuses, and options that come from two places."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_lowrank
from ds_lowrank import CheckpointCallback, LowRankAdamW, LowRankCallback, LowRankConfig, ResumeAnywhere
from ds_lowrank.integrations.transformers import resolve_config


def model() -> LlamaForCausalLM:
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **shape))


def arguments(folder, **options) -> TrainingArguments:
    settings = {"use_cpu": True, "max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), **{**settings, **options})


class OwnInit(Trainer):
    """A Trainer that takes no optimizer class, as Seq2SeqTrainer and most of TRL's do not."""

    def __init__(self, folder, optimizers=(None, None), **options):
        tokens = torch.randint(0, 64, (16, 8)).tolist()
        data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
        super().__init__(model(), arguments(folder, **options), train_dataset=data, optimizers=optimizers)


def test_it_brings_all_that_a_trainer_needs(tmp_path):
    trainer = OwnInit(tmp_path, save_strategy="steps", save_steps=1)
    ds_lowrank.attach(trainer, {"rank": 4})
    assert type(trainer).__name__ == "OwnInit"
    assert isinstance(trainer, OwnInit)
    assert isinstance(trainer, ResumeAnywhere)
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(LowRankCallback) == kinds.count(CheckpointCallback) == 1
    assert kinds[-1] is CheckpointCallback
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, LowRankAdamW)
    assert {plan.r for plan in trainer.optimizer.optimizer.plans} == {4}
    assert ds_lowrank.newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_it_adds_no_callback_twice_and_none_that_is_not_needed(tmp_path):
    trainer = OwnInit(tmp_path)
    trainer.add_callback(LowRankCallback())
    ds_lowrank.attach(trainer, {"rank": 4})
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(LowRankCallback) == 1
    assert CheckpointCallback not in kinds


def test_an_attached_trainer_resumes_exactly(tmp_path):
    weights = []
    for folder, resume in (("whole", None), ("again", str(tmp_path / "whole" / "checkpoint-2"))):
        torch.manual_seed(0)
        trainer = OwnInit(tmp_path / folder, max_steps=4, save_strategy="steps", save_steps=2)
        ds_lowrank.attach(trainer, {"rank": 4, "update_proj_gap": 3})
        trainer.train(resume_from_checkpoint=resume)
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_resumed_trainer_projects_what_its_checkpoint_has_projected(tmp_path):
    """Earlier versions projected some heads, and what is not larger than the rank; all-linear means them no more."""
    for targets, resume in ((["all-linear", "lm_head"], None), ("all-linear", str(tmp_path / "checkpoint-1"))):
        trainer = OwnInit(tmp_path, save_strategy="steps", save_steps=1)
        ds_lowrank.attach(trainer, {"rank": 4, "optim_target_modules": targets})
        trainer.train(resume_from_checkpoint=resume)
        names = {plan.parameter for plan in trainer.optimizer.optimizer.plans}
        assert "lm_head.weight" in names
    assert len(names) == 15


def test_resume_from_checkpoint_true_takes_the_newest_that_counts(tmp_path):
    """The Trainer by itself would take checkpoint-4, which an earlier run has left."""
    saves = {"save_strategy": "steps", "save_steps": 2}
    for steps in (4, 2):
        trainer = OwnInit(tmp_path, max_steps=steps, **saves)
        ds_lowrank.attach(trainer, {"rank": 4})
        trainer.train()
    trainer = OwnInit(tmp_path, max_steps=3, **saves)
    ds_lowrank.attach(trainer, {"rank": 4})
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 3


def test_a_second_call_and_other_optimizers_are_refused(tmp_path):
    trainer = OwnInit(tmp_path)
    ds_lowrank.attach(trainer, {"rank": 4})
    with pytest.raises(ValueError, match="this OwnInit has the low-rank optimizer already"):
        ds_lowrank.attach(trainer, {"rank": 4})
    trainer.train()
    trainer.optimizer_cls_and_kwargs = None
    with pytest.raises(ValueError, match=r"has an optimizer already.*attach before train\(\)"):
        ds_lowrank.attach(trainer, {"rank": 4})
    theirs = Trainer(model(), arguments(tmp_path), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match="given optimizer_cls_and_kwargs with SGD"):
        ds_lowrank.attach(theirs)
    with pytest.raises(TypeError, match="got Linear"):
        ds_lowrank.attach(torch.nn.Linear(2, 2))


def test_a_refused_trainer_is_as_it_was(tmp_path):
    trainer = OwnInit(tmp_path)
    before = list(trainer.callback_handler.callbacks)
    for config, change, text in (
        ({"rnk": 4}, {}, "did you mean 'rank'"),
        ({"rank": 4}, {"fsdp": True}, "FSDP was asked for, but accelerate chose NO"),
        ({"rank": 4}, {"optim": "adafactor"}, "asks for another optimizer"),
    ):
        was = {name: getattr(trainer.args, name) for name in change}
        for name, value in change.items():
            setattr(trainer.args, name, value)
        with pytest.raises(ValueError, match=text):
            ds_lowrank.attach(trainer, config)
        assert trainer.callback_handler.callbacks == before
        assert type(trainer) is OwnInit
        assert trainer.optimizer_cls_and_kwargs is None
        for name, value in was.items():
            setattr(trainer.args, name, value)


def test_a_class_that_makes_an_optimizer_of_its_own_is_named(tmp_path):
    class Stubborn(OwnInit):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = Stubborn(tmp_path)
    ds_lowrank.attach(trainer, {"rank": 4})
    with pytest.raises(ValueError, match=r"Stubborn\.create_optimizer makes SGD"):
        trainer.train()


# ---- what TrainingArguments say about GaLore ----

GALORE = {"optim": "galore_adamw", "optim_target_modules": ["self_attn"], "optim_args": "rank=2, scale=0.5"}


def test_galore_arguments_are_taken_where_ours_do_not_say(tmp_path):
    trainer = OwnInit(tmp_path, **GALORE)
    ds_lowrank.attach(trainer, {"update_proj_gap": 7})
    optimizer = trainer.create_optimizer()
    assert {plan.name.split(".")[-3] for plan in optimizer.matrix_specs} == {"self_attn"}
    assert {spec.rank for spec in optimizer.matrix_specs} == {2}
    config = resolve_config({"update_proj_gap": 7}, trainer.args)
    assert (config.rank, config.scale, config.update_proj_gap, config.selection) == (2, 0.5, 7, "dominant")
    assert resolve_config({"selection": "importance"}, trainer.args).selection == "importance"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("galore_adamw", ("fp32", False)),
        ("galore_adamw_8bit", ("int8", False)),
        ("galore_adamw_layerwise", ("fp32", True)),
        ("galore_adamw_8bit_layerwise", ("int8", True)),
    ],
)
def test_the_name_of_the_optimizer_is_taken(tmp_path, name, expected):
    config = resolve_config(None, arguments(tmp_path, optim=name, optim_target_modules="all_linear"))
    assert (config.state_dtype, config.layerwise) == expected
    assert (config.optim_target_modules, config.selection) == ("all-linear", "dominant")


@pytest.mark.parametrize(
    ("config", "change", "text"),
    [
        ({"rank": 4}, {}, r'optim_args="rank=2"\) and lowrank.rank = 4 are two values of one option'),
        (LowRankConfig(rank=2), {}, r'optim_args="scale=0.5"\) and lowrank.scale = 0.25'),
        ({"optim_target_modules": ["mlp"]}, {}, r"optim_target_modules=\['self_attn'\]"),
        ({"state_dtype": "fp32"}, {"optim": "galore_adamw_8bit"}, 'optim="galore_adamw_8bit".*state_dtype'),
        (None, {"optim": "galore_adafactor"}, "asks for another optimizer"),
        (None, {"optim": "apollo_adamw"}, "asks for another optimizer"),
        (None, {"optim": "adamw_bnb_8bit"}, 'asks for another optimizer.*"state_dtype": "int8"'),
        (None, {"optim_args": "rnk=2"}, "unknown 'rnk'; did you mean 'rank'"),
        (None, {"optim_args": "rank=two"}, "rank must be a number, got 'two'"),
    ],
)
def test_two_values_of_one_option_are_refused(tmp_path, config, change, text):
    with pytest.raises(ValueError, match=text):
        resolve_config(config, arguments(tmp_path, **{**GALORE, **change}))


def test_equal_values_pass_and_silence_changes_nothing(tmp_path):
    args = arguments(tmp_path, **GALORE)
    same = {"rank": 2, "scale": 0.5, "optim_target_modules": ("self_attn",)}
    assert resolve_config(same, args).rank == 2
    assert resolve_config({"rank": 3}, arguments(tmp_path)) == LowRankConfig(rank=3)
    config = LowRankConfig(rank=3, optim_target_modules=["mlp"])
    assert resolve_config(config, arguments(tmp_path)) == config
