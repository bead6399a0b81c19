"""README and docs/: what their commands and code name exists, and the recipes do what they say."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arguments import DataArguments, LowRankArguments, ModelArguments, PretrainArguments
from test_families import FAMILIES
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments

import ds_lowrank
from ds_lowrank import cli
from ds_lowrank.planner import plan_setup, read_model

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a reader puts a file of their own in the place of.
THEIRS = {"script.py", "my_train.py", "sweep.txt", "hostfile", "corpus.jsonl", "lowrank_plugin.py", "train.bin"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page.name, " ".join(line.split())) for line in lines if line.strip() and line.strip()[0] != "#"]
    return found


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_names_files_and_flags_that_exist(page, command):
    words = shlex.split(command, comments=True)
    paths = [w for w in words if re.fullmatch(r"[\w./]+\.(py|json|yaml|sbatch|sh|md)", w) and w not in THEIRS]
    assert [path for path in paths if not (ROOT / path).exists()] == []
    if "launch/pretrain.py" in words or any(word.endswith(".sbatch") for word in words):
        ours = next(i for i, word in enumerate(words) if word == "launch/pretrain.py" or word.endswith(".sbatch"))
        parser = HfArgumentParser(
            (ModelArguments, DataArguments, LowRankArguments, PretrainArguments), allow_abbrev=False
        )
        known = {*parser._option_string_actions, "--dry-run"}
        flags = [word.split("=")[0] for word in words[ours + 1 :] if word.startswith("--")]
        assert [flag for flag in flags if flag not in known] == []
    if words[0] == "ds-lowrank" and words[1] == "plan":
        assert cli.main(words[1:]) in (0, None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_there_is_something_to_test():
    assert len(commands()) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_is_python_and_names_what_there_is(page):
    for block in blocks(page, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ds_lowrank":
                assert hasattr(ds_lowrank, node.attr), node.attr


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them: letters, digits and hyphens of the heading, in lower case."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), target
        assert not anchor or anchor in _anchors(found), f"{target}#{anchor}"


# ---- recipes ----


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(256, 200)

    def forward(self, x):
        return {"loss": self.inner(x).square().mean()}


class _AsksForAnOptimizer(Trainer):
    """As LLaMA-Factory's Trainers do; axolotl's do not ask."""

    ask = None

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None and type(self).ask is not None:
            self.optimizer = type(self).ask(self)
        return super().create_optimizer(*args, **kwargs)


def _trained(tmp_path, ask, callbacks, created=lambda trainer: None) -> Trainer:
    kind = type("Framework", (_AsksForAnOptimizer,), {"ask": ask and staticmethod(ask)})
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, report_to=[], learning_rate=0.1, save_steps=2, disable_tqdm=True
    )
    data = [{"x": torch.randn(256)} for _ in range(16)]
    trainer = kind(model=_Model(), args=args, train_dataset=data, callbacks=callbacks)
    created(trainer)
    trainer.train()
    return trainer


def _recipe(number: int, monkeypatch, modules: dict[str, types.ModuleType]) -> dict:
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    namespace: dict = {"__name__": "recipe"}
    exec(compile(blocks(ROOT / "docs" / "integrations.md", "python")[number], "integrations.md", "exec"), namespace)
    return namespace


def test_the_axolotl_plugin(tmp_path, monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})  # type: ignore[attr-defined]
    names = ("axolotl", "axolotl.integrations")
    modules = {name: types.ModuleType(name) for name in names}
    plugin = _recipe(0, monkeypatch, {**modules, "axolotl.integrations.base": base})["LowRank"]()
    callbacks = plugin.add_callbacks_post_trainer(None, None)
    # After the Trainer's construction, as axolotl 0.19's train.py does; its Trainer would make AdamW.
    trainer = _trained(tmp_path, None, callbacks, created=lambda trainer: plugin.post_trainer_create(None, trainer))
    _check(trainer, tmp_path)


def test_the_llama_factory_script(tmp_path, monkeypatch):
    names = ["llamafactory", "llamafactory.train", "llamafactory.train.tuner"]
    names += [f"llamafactory.train.{stage}{rest}" for stage in ("pt", "sft") for rest in ("", ".trainer")]
    modules = {name: types.ModuleType(name) for name in names}
    for name in names[1:]:
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, modules[name])
    _recipe(1, monkeypatch, modules)
    hook = modules["llamafactory.train.sft.trainer"].create_custom_optimizer
    assert modules["llamafactory.train.pt.trainer"].create_custom_optimizer is hook
    callbacks = [ds_lowrank.LowRankCallback(), ds_lowrank.CheckpointCallback()]
    trainer = _trained(tmp_path, lambda trainer: hook(trainer.model, trainer.args, None), callbacks)
    _check(trainer, tmp_path)


def _check(trainer: Trainer, folder: Path) -> None:
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    assert isinstance(inner, ds_lowrank.LowRankAdamW)
    assert [plan.name for plan in inner.plans] == ["inner.weight"]
    assert inner.param_groups[0]["initial_lr"] == 0.1
    assert (folder / "checkpoint-2" / "complete.json").is_file()


def test_the_table_of_hardware_is_the_planners(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import hardware

    page = (ROOT / "docs" / "hardware.md").read_text()
    rows = [*hardware.rows(), *hardware.command_rows()]
    assert len(rows) == len(re.findall(r"^\| llama_", page, re.MULTILINE))
    some = hardware.LARGEST[:2]  # the others take a minute
    assert [row for row in [*rows, *hardware.largest_rows(some)] if row not in page] == []
    assert "does not fit" not in page


def _strings() -> list[str]:
    """Texts in the code, with a blank in the place of what is filled in."""
    found = []
    for path in [*(ROOT / "ds_lowrank").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\*\*`([^`]+)`", page, re.MULTILINE)
    strings = _strings()
    assert len(messages) > 8
    for message in messages:
        for piece in message.split("..."):
            assert any(piece.strip() in string for string in strings), message


# ---- figures: sizes of models, defaults of options ----


def _weights(size: str, vocabulary: int | None = None) -> int:
    content = json.loads((ROOT / "configs" / f"llama_{size}.json").read_text())
    return read_model({**content, **({"vocab_size": vocabulary} if vocabulary else {})}).numel


def _flag(name: str) -> Any:
    return HfArgumentParser((DataArguments, LowRankArguments, PretrainArguments)).get_default(name)


def _default(function: Callable[..., Any], option: str) -> Any:
    return inspect.signature(function).parameters[option].default


def _gap() -> int:
    """The one of launch/pretrain.py and of every file of configurations."""
    found = {int(gap) for gap in re.findall(r'"update_proj_gap": (\d+)', (ROOT / "launch" / "pretrain.py").read_text())}
    blocks = [json.loads(path.read_text()).get("lowrank") for path in (ROOT / "configs").glob("*.json")]
    found |= {block["update_proj_gap"] for block in blocks if block}
    (gap,) = found
    return gap


def _first_run() -> list[str]:
    """Mean, smallest and largest perplexity of SARA, AdamW and the frozen run, as the results have them."""
    page = (ROOT / "benchmarks" / "results" / "first_run.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| [\d.]+ \| ([\d.]+ \| [\d.]+ \| [\d.]+) \| [\d.]+ \|$", page, re.MULTILINE))
    return [figure for name in ("lowrank", "adamw", "frozen") for figure in rows[name].split(" | ")]


SPREAD = r"([\d.]+) \(([\d.]+) to ([\d.]+)"
# What a page says -> what is. Every phrase stands somewhere, and wherever it stands it is right.
FIGURES: dict[str, Callable[[], list[Any]]] = {
    r"LLaMA of ([\d.]+[MB]) weights": lambda: [_weights("9m", _flag("vocab_size"))],
    r"1600 steps and ([\d.]+[MB]) weights": lambda: [_weights("9m", _flag("vocab_size"))],
    r"the smallest, which is the default, has ([\d.]+[MB]) with (\d+) tokens": lambda: [
        _weights("9m", _flag("vocab_size")),
        _flag("vocab_size"),
    ],
    r"llama_9m.json`, which has ([\d.]+[MB]) with the vocabulary of its family, and (\d+) tokens here": lambda: [
        _weights("9m"),
        _flag("vocab_size"),
    ],
    r"family's sizes, ([\d.]+M), ([\d.]+M), ([\d.]+M), ([\d.]+M), ([\d.]+B), ([\d.]+B) and ([\d.]+B) weights with a "
    r"vocabulary of ([\d,]+)": lambda: [
        *(_weights(size) for size in ("9m", "60m", "130m", "350m", "1b", "7b", "13b")),
        32000,
    ],
    r"the peak is ([\d.]+) GiB \(`projected`, 8 micro-steps\) and ([\d.]+) GiB \(`layerwise`\), where AdamW with bf16 "
    r"weights, gradients and moments peaks at ([\d.]+) and ([\d.]+): (\d+) % and (\d+) % lower. On 8 ranks of FSDP2 it "
    r"is ([\d.]+) GiB, ([\d.]+) without": lambda: _seven_billion(),
    r"llama_7b, ([\d,]+) weights": lambda: [_weights("7b")],
    r"Its default is (1e-\d+) in both": lambda: [_default(ds_lowrank.LowRankAdamW, "eps")],
    r"`adam_epsilon`, (1e-\d+) unless set": lambda: [_default(TrainingArguments, "adam_epsilon")],
    r"(\d+) steps of (\d+) sequences of (\d+) tokens a rank, a tokenizer of (\d+) tokens": lambda: [
        _flag("max_steps"),
        _flag("per_device_train_batch_size"),
        _flag("max_length"),
        _flag("vocab_size"),
    ],
    r"`--batch_size` is of one rank, (\d+) unless given": lambda: [_flag("per_device_train_batch_size")],
    r"`--max_length` (\d+) and the tokenizer a byte-level BPE of `--vocab_size` (\d+)": lambda: [
        _flag("max_length"),
        _flag("vocab_size"),
    ],
    r"`--eval_sequences` \((\d+)\)": lambda: [_flag("eval_sequences")],
    r"`--ddp_timeout` \((\d+) seconds\)": lambda: [_flag("ddp_timeout")],
    r"`launch/pretrain.py` and `configs/` have (\d+)": lambda: [_gap()],
    r"in waves of (\d+) matrices": lambda: [ds_lowrank.LowRankConfig().wave_size],
    r"less than ([\d,]+) weights by rows \(`min_numel`\)": lambda: [
        _default(ds_lowrank.long_side_placement, "min_numel")
    ],
    r"end the run with code (\d+)": lambda: [ds_lowrank.PREEMPTED_EXIT_CODE],
    r"exit with (\d+) \(`ds_lowrank": lambda: [ds_lowrank.PREEMPTED_EXIT_CODE],
    rf"SARA ends at a validation perplexity of {SPREAD} over three seeds\), full-rank AdamW at {SPREAD}\), with the "
    rf"projected matrices frozen {SPREAD}\)": _first_run,
    r"in (\d+) families of Transformers": lambda: [len({family.kind for family in FAMILIES})],
}


def _seven_billion() -> list[float]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import hardware
    finally:
        sys.path.pop(0)
    model = read_model(ROOT / "configs" / "llama_7b.json")
    plans = [command.plan() for command in hardware.COMMANDS[:2]]
    ours = [plan.ours.peak / 2**30 for plan in plans]
    adamw = [plan.optimizers["AdamW"].peak / 2**30 for plan in plans]
    lower = [100 * (1 - a / b) for a, b in zip(ours, adamw)]
    eight = next(c for c in hardware.COMMANDS if (c.model, c.gpus) == ("llama_7b", 8)).plan()
    local = plan_setup(model, eight.config, eight.setup.replace(no_sync=True))
    return [*ours, *adamw, *lower, eight.ours.peak / 2**30, local.ours.peak / 2**30]


def _agrees(said: str, true: Any) -> bool:
    """Whether a figure is a number rounded to as many digits as it has."""
    number, unit = said.replace(",", ""), 1.0
    if number[-1] in "MB":
        number, unit = number[:-1], {"M": 1e6, "B": 1e9}[number[-1]]
    last = 0.0 if "e" in number else 10.0 ** -len(number.partition(".")[2])
    return abs(float(number) - float(true) / unit) <= last / 2 * (1 + 1e-9) or float(number) == float(true) / unit


@pytest.mark.parametrize("phrase", FIGURES)
def test_a_figure_is_what_the_code_says(phrase):
    results = [ROOT / "benchmarks" / "results" / "low_bit_loss.md"]
    texts = {page.name: " ".join(page.read_text().split()) for page in [*PAGES, *results]}
    said = [(name, found.groups()) for name, text in texts.items() for found in re.finditer(phrase, text)]
    true = FIGURES[phrase]()
    assert said
    assert all(len(figures) == len(true) for _, figures in said)
    wrong = [(name, figures) for name, figures in said if not all(map(_agrees, figures, true))]
    assert not wrong, f"it is {true}"


def test_figures_agree_to_their_last_digit():
    assert _agrees("1.07M", 1_066_112)
    assert _agrees("32,000", 32000)
    assert _agrees("1e-6", 1e-6)
    assert not _agrees("1.06M", 1_066_112)
    assert not _agrees("9M", 1_066_112)
    assert not _agrees("1e-8", 1e-6)


def test_the_table_of_options_has_their_defaults():
    page = (ROOT / "README.md").read_text()
    table = page.split("| option | default | meaning |\n|---|---|---|\n")[1].split("\n\n")[0]
    said: dict[str, str] = {}
    for row in table.splitlines():
        options, defaults = row.split(" | ")[:2]
        names = re.findall(r"`(\w+)`", options)
        values = [value.strip("` ") for value in defaults.split(", ")]
        said.update(zip(names, values * len(names) if len(values) == 1 else values))
    config = ds_lowrank.LowRankConfig().to_dict()
    shown = {name: "unset" if v is None else v if isinstance(v, str) else json.dumps(v) for name, v in config.items()}
    assert said == shown
