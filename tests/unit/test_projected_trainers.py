"""``gradients="projected"`` in the HF Trainer and in accelerate's loop, on one process: clip, accumulation, resume."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, get_scheduler

import ds_lowrank
from ds_lowrank import LowRankCallback, build_optimizer, trainer_optimizer
from ds_lowrank.integrations.projected import NORM, check_projected
from ds_lowrank.optimizer import STATE_KEY

OPTIONS = {"rank": 4, "update_proj_gap": 3, "gradients": "projected"}
NON_REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}


class Recorder(Trainer):
    """A Trainer that remembers its batches, and computes the mean loss of each whatever the version."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.batches.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss


def make(folder, options=OPTIONS, how="factory", callbacks=None, **arguments) -> Recorder:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": 32}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, **shape))
    tokens = torch.randint(0, 64, (48, 8)).tolist()
    settings = {"max_steps": 4, "learning_rate": 0.01, "gradient_accumulation_steps": 2, "logging_steps": 1}
    settings |= {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "weight_decay": 0.1}
    settings |= {"per_device_train_batch_size": 4, "warmup_steps": 1}
    args = TrainingArguments(output_dir=str(folder), **{**settings, **arguments})
    choice = {} if how == "attach" else {"optimizer_cls_and_kwargs": trainer_optimizer(options)}
    data = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    trainer = Recorder(model, args, train_dataset=data, callbacks=callbacks, **choice)
    trainer.model_accepts_loss_kwargs = False
    trainer.batches = []
    if how == "attach":
        ds_lowrank.attach(trainer, options)
    return trainer


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(run: Recorder, before, options=OPTIONS, left_out=None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same batches in a loop of a few lines: the weights at its end, and the norm of every step."""
    args = run.args
    model = LlamaForCausalLM(run.model.config)
    model.load_state_dict(before, strict=False)
    options = {**options, "gradient_dtype": "bfloat16" if args.bf16 else "auto"}
    optimizer = build_optimizer(model, options, lr=args.learning_rate, eps=args.adam_epsilon, weight_decay=0.1)
    optimizer.ensure_state()
    schedule = get_scheduler("linear", optimizer, args.warmup_steps, args.max_steps)
    batches, micro, norms = iter(run.batches), args.gradient_accumulation_steps, []
    bf16 = torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
    for step in range(args.max_steps):
        if step == left_out:
            _ = [next(batches) for _ in range(micro)]
            schedule.step()
            continue
        for _ in range(micro):
            with bf16:
                loss = model(**next(batches)).loss / micro
            loss.backward()
        norms.append(float(optimizer.clip_grad_norm_(args.max_grad_norm or float("inf"))))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return weights(model), norms


def check_equal(found, expected, before, bound=1e-5):
    for name, weight in expected.items():
        moved = (weight - before[name]).norm()
        assert moved > 0
        assert (found[name] - weight).norm() <= bound * moved, name


def norms_of(run: Recorder, name: str) -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("how", "callbacks", "options"),
    [
        ("factory", None, {"max_grad_norm": 0.5}),
        ("factory", [LowRankCallback], {"max_grad_norm": 0.5, "gradient_accumulation_steps": 1}),
        ("attach", None, {"max_grad_norm": 0.5, **NON_REENTRANT}),
        ("attach", None, {"max_grad_norm": 0.5, "bf16": True}),
        ("attach", None, {"max_grad_norm": 0.0}),
    ],
)
def test_a_trainer_trains_as_a_loop_does_that_clips_by_the_optimizer(tmp_path, how, callbacks, options):
    run = make(tmp_path, how=how, callbacks=[kind() for kind in callbacks or ()], **options)
    before = weights(run.model)
    run.train()
    expected, norms = by_hand(run, before)
    check_equal(weights(run.model), expected, before)
    assert norms_of(run, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert norms_of(run, NORM) == norms_of(run, "grad_norm")
    assert min(norms) > 0.5, "no clip would have been at work"
    assert all(p.grad is None for name, p in run.model.named_parameters() if "_proj" in name)


def test_a_norm_of_whole_gradients_has_no_other_name(tmp_path):
    run = make(tmp_path, {**OPTIONS, "gradients": "full"})
    run.train()
    assert len(norms_of(run, "grad_norm")) == 4
    assert norms_of(run, NORM) == []


def test_an_optimizer_that_is_passed_to_the_trainer_is_clipped_by_it_too(tmp_path):
    ready = make(tmp_path, max_grad_norm=0.5)
    before = weights(ready.model)
    optimizer = build_optimizer(ready.model, OPTIONS, lr=0.01, eps=1e-8, weight_decay=0.1)
    run = Recorder(
        ready.model,
        ready.args,
        train_dataset=ready.train_dataset,
        callbacks=[LowRankCallback()],
        optimizers=(optimizer, None),
    )
    run.model_accepts_loss_kwargs, run.batches = False, []
    run.train()
    check_equal(weights(run.model), by_hand(run, before)[0], before)


class Skip(TrainerCallback):
    """Leaves a step out, as a run does whose gradients are not finite."""

    def __init__(self, step):
        self.step, self.seen = step, []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            optimizer.zero_grad()
            self.seen = [self._all(model, optimizer)]

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            self.seen.append(self._all(model, optimizer))

    @staticmethod
    def _all(model, optimizer):
        states = optimizer.optimizer.state[STATE_KEY]
        kept = {f"{n}.{key}": torch.as_tensor(v).clone() for n, state in states.items() for key, v in state.items()}
        return {**weights(model), **kept}


class Broken(Recorder):
    """The loss of one micro-batch is not a number."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if len(self.batches) == 7 else loss


def test_a_step_that_is_left_out_leaves_nothing_behind(tmp_path):
    """Every matrix is due in it, and would take its basis from a gradient that is not finite."""
    skip = Skip(3)
    run = make(tmp_path, {**OPTIONS, "stagger": False}, callbacks=[skip], max_steps=5, max_grad_norm=0.5)
    run.__class__ = Broken
    begin = weights(run.model)
    run.train()
    assert [bool(torch.tensor(norm).isfinite()) for norm in norms_of(run, "grad_norm")] == [True] * 3 + [False, True]
    before, after = skip.seen
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    expected, _ = by_hand(run, begin, {**OPTIONS, "stagger": False}, left_out=3)
    check_equal(weights(run.model), expected, begin)


@pytest.mark.parametrize("began", ["projected", "full"])
def test_a_resumed_run_ends_where_it_would_have(tmp_path, began):
    """Bit by bit; where it began with gradients 'full', up to rounding: without accumulation and clip it is equal."""
    saves = {"how": "attach", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    same = began == "projected"
    saves |= {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5} if same else {"max_grad_norm": 0.0}
    saves |= {} if same else {"gradient_accumulation_steps": 1}
    whole = make(tmp_path / "whole", {**OPTIONS, "gradients": began}, **saves)
    before = weights(whole.model)
    whole.train()
    again = make(tmp_path / "again", **saves)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert again.state.global_step == 6
    assert len(again.batches) == (4 if same else 2)
    found, expected = weights(again.model), weights(whole.model)
    if same:
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    check_equal(found, expected, before)
    assert norms_of(again, NORM)[-2:] == norms_of(again, "grad_norm")[-2:]


class OutOfMemory(Recorder):
    """Its second backward pass fails half-way, once."""

    failed = False

    def training_step(self, model, inputs, *args, **kwargs):
        handle = None
        if len(self.batches) == 1 and not self.failed:
            self.failed, self.batches = True, []

            def fail(module, *_):
                raise RuntimeError("CUDA out of memory.")

            handle = self.model.model.layers[0].mlp.register_full_backward_hook(fail)
        try:
            return super().training_step(model, inputs, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
                self.batches = []


def test_a_smaller_batch_is_found_and_nothing_of_the_larger_is_left(tmp_path):
    run = make(tmp_path, auto_find_batch_size=True, max_grad_norm=0.5)
    run.__class__ = OutOfMemory
    before = weights(run.model)
    run.train()
    assert run.failed
    assert run._train_batch_size < 4
    check_equal(weights(run.model), by_hand(run, before)[0], before)


# ---- what does not go with it ----


def arguments(**options):
    plain = {"fp16": False, "n_gpu": 1, "world_size": 1, "auto_find_batch_size": False}
    return SimpleNamespace(**{**plain, **options})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fp16": True}, "fp16 = true scales the loss.*use bf16"),
        ({"n_gpu": 2}, "one process with 2 GPUs is DataParallel.*torchrun"),
        ({"auto_find_batch_size": True, "world_size": 2}, "auto_find_batch_size = true on several ranks"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            r"set gradient_checkpointing_kwargs=\{'use_reentrant': False\}",
        ),
    ],
)
def test_what_does_not_go_with_it_is_named(options, text):
    with pytest.raises(ValueError, match=text):
        check_projected(arguments(**options))
    check_projected(arguments(auto_find_batch_size=True, gradient_checkpointing=True))
    with pytest.raises(ValueError, match="fp16"):
        check_projected(arguments(), mixed_precision="fp16")


REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def test_reentrant_checkpointing_is_refused_before_the_run_starts(tmp_path):
    with pytest.raises(ValueError, match="use_reentrant"):
        make(tmp_path, how="attach", **REENTRANT)
    run = make(tmp_path, **REENTRANT)
    with pytest.raises(ValueError, match="use_reentrant"):
        run.create_optimizer()
    assert run.optimizer is None
    # As transformers 4 sets a model up where nothing is said.
    run = make(tmp_path)
    run.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        run.train()
    assert run.batches == []


def test_layerwise_has_its_hooks_before_the_first_backward_pass_without_a_callback(tmp_path):
    left = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            left.append(sum(p.grad is not None for p in model.parameters()))

    options = {"rank": 4, "layerwise": True, "wave_size": 1}
    run = make(tmp_path, options, callbacks=[Look()], max_grad_norm=0.0, gradient_accumulation_steps=1, max_steps=1)
    run.train()
    assert left == [0]


# ---- accelerate without the Trainer ----


class Loop:
    """A loop as accelerate's documentation has it."""

    def __init__(self, route=True, gradients="projected"):
        torch.manual_seed(0)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 8))
        self.before = weights(model)
        options = {**OPTIONS, "rank": 2, "optim_target_modules": ["0", "2"], "gradients": gradients}
        optimizer = build_optimizer(model, options, lr=0.01)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        optimizer.ensure_state()
        if route:
            ds_lowrank.route_clipping(self.accelerator, self.optimizer)
        self.norms = []

    def train(self, parameters=None, clip=None):
        for batch in torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(1)):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch).square().mean())
                if self.accelerator.sync_gradients:
                    clip = clip or self.accelerator.clip_grad_norm_
                    self.norms.append(clip(parameters or self.model.parameters(), 0.01))
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self


def test_accelerates_clip_is_the_optimizers_where_it_was_routed():
    routed = Loop().train()
    ours = Loop(route=False)
    ours.train(clip=lambda _, norm: ours.optimizer.optimizer.clip_grad_norm_(norm))
    assert len(routed.norms) == 3
    assert all(torch.equal(*pair) for pair in zip(routed.norms, ours.norms))
    assert all(float(norm) > 0.01 for norm in routed.norms)
    assert all(torch.equal(weight, weights(ours.model)[name]) for name, weight in weights(routed.model).items())


@pytest.mark.parametrize("clip", [True, False])
def test_a_backward_pass_before_there_are_hooks_is_refused(clip):
    """The step would be lost without a word."""
    model = torch.nn.Linear(8, 12)
    optimizer = build_optimizer(model, {**OPTIONS, "rank": 2}, lr=0.01)
    model(torch.ones(2, 8)).sum().backward()
    if clip:
        optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match=r"weight \(12, 8\) has a gradient that was not projected.*describe"):
        optimizer.step()
    optimizer.zero_grad()
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    assert [int(state["step"]) for state in optimizer.state[STATE_KEY].values()] == [1]


def test_the_optimizer_is_found_inside_a_wrapper_that_is_a_copy_of_it():
    """Lightning's is of a subclass of the optimizer's own class."""
    optimizer = build_optimizer(torch.nn.Linear(8, 12), {**OPTIONS, "rank": 2}, lr=0.01)
    kind = type("LightningLowRankAdamW", (ds_lowrank.LowRankAdamW,), {"__init__": lambda self: None})
    wrapper = kind()
    wrapper.__dict__.update(vars(optimizer), optimizer=optimizer)
    ds_lowrank.describe(wrapper)
    assert optimizer._layout is not None


def test_a_clip_that_was_not_routed_is_refused():
    loop = Loop(route=False)
    with pytest.raises(RuntimeError, match=r"ds_lowrank.route_clipping\(accelerator, optimizer\)"):
        loop.train()


def test_only_this_optimizers_parameters_are_routed():
    loop = Loop()
    other = torch.nn.Linear(3, 3)
    other(torch.ones(2, 3)).sum().backward()
    size = torch.nn.utils.get_total_norm([p.grad for p in other.parameters()])
    assert torch.equal(loop.accelerator.clip_grad_norm_(other.parameters(), 1e-3), size)
    assert torch.nn.utils.get_total_norm([p.grad for p in other.parameters()]) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(ValueError, match="2 are of another"):
        loop.train(parameters=[*loop.model.parameters(), *other.parameters()])
    with pytest.raises(ValueError, match="3 of its own are missing"):
        Loop().train(
            parameters=None, clip=lambda given, norm: loop.accelerator.clip_grad_norm_(loop.model[0].weight, norm)
        )


def test_whole_gradients_are_left_to_accelerate():
    loop = Loop(gradients="full")
    assert "clip_grad_norm_" not in vars(loop.accelerator)
    loop.train()
