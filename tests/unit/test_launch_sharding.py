"""launch/: configuration files, launchers that do something else than they were told, impossible checkpoints."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from arguments import LowRankArguments, parse_arguments
from sharding import check_checkpoints, check_launch, read_config

ROOT = Path(__file__).resolve().parents[2]
ZERO2, ZERO3, FSDP2 = (str(ROOT / "configs" / f"{name}.json") for name in ("zero2", "zero3", "fsdp2"))
RANK_0_OF_2 = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)


def changed(tmp_path, source, lowrank=None, **changes) -> str:
    """A copy of a configuration file with changes."""
    content = json.loads(Path(source).read_text())
    content["lowrank"].update(lowrank or {})
    path = tmp_path / "changed.json"
    path.write_text(json.dumps({**content, **changes}))
    return str(path)


def test_the_files_in_configs_are_accepted_and_train_alike():
    zero = [ROOT / "configs" / f"{name}.json" for name in ("zero1", "zero2", "zero3", "zero2_offload")]
    contents = [*(read_config(str(path), None) for path in zero), read_config(None, FSDP2)]
    assert all(content["lowrank"] == contents[0]["lowrank"] for content in contents)
    assert [c["zero_optimization"]["stage"] for c in contents[:4]] == [1, 2, 3, 2]


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (ZERO2, {"lowrank": {"update_gap": 5}}, "did you mean 'update_proj_gap'?"),
        (ZERO2, {"lowrank": {"rank": 0}}, "lowrank.rank must be an integer >= 1, got 0"),
        (ZERO2, {"optimizer": {"type": "AdamW"}}, '"optimizer" block'),
        (ZERO3, {"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save"),
        (FSDP2, {"lowrank": {"update_gap": 5}}, "did you mean 'update_proj_gap'?"),
        (FSDP2, {"lowrnk": {}}, 'did you mean "lowrank"?'),
        (FSDP2, {"version": 1}, "FSDP version 1 is not supported"),
    ],
)
def test_bad_configuration_file(tmp_path, source, changes, message):
    flag = "--fsdp_config" if source == FSDP2 else "--deepspeed"
    with pytest.raises(ValueError, match=r".") as caught:
        parse_arguments([flag, changed(tmp_path, source, **changes)])
    assert message in str(caught.value)


def test_several_gpus_are_not_left_to_one_process(monkeypatch):
    args = SimpleNamespace(deepspeed=None, fsdp=None, fsdp_config=None, use_cpu=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(ValueError, match="one process sees 4 GPUs"):
        check_launch(args)
    args.use_cpu = True
    check_launch(args)


def test_flags_win_over_the_block(tmp_path):
    block = read_config(None, changed(tmp_path, FSDP2, {"rank": 16, "scale": 2.0}))["lowrank"]
    options = LowRankArguments(rank=4, shard_projection=False).options(block, ["q_proj", "v_proj"])
    assert (options["rank"], options["scale"], options["shard_projection"]) == (4, 2.0, False)
    assert options["optim_target_modules"] == ["q_proj", "v_proj"]


# ---- what would run as something else without a word ----


@pytest.mark.parametrize(
    ("argv", "environment", "message"),
    [
        (["--deepspeed", ZERO2, "--fsdp_config", FSDP2], {}, "exclude each other"),
        (["--deepspeed", ZERO2], {**RANK_0_OF_2, "ACCELERATE_USE_FSDP": "true"}, "exclude each other"),
        (["--deepspeed", ZERO2], {}, "--deepspeed needs a launcher"),
        (["--fsdp_config", FSDP2], {}, "--fsdp_config needs a launcher"),
        (["--fsdp"], {}, "--fsdp_config needs a launcher"),
        # accelerate launch --num_processes 2 without GPUs: one process, and the port of the other's rendezvous
        ([], {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "started one process where several"),
        (["--deepspeed", ZERO2], {**RANK_0_OF_2, "ACCELERATE_USE_CPU": "True"}, "--cpu drops DeepSpeed"),
        ([], {**RANK_0_OF_2, "ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed_config_file: configs/zero2.json"),
        (
            [],
            {**RANK_0_OF_2, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"},
            "'nowhere.json' does not exist",
        ),
    ],
)
def test_bad_launch(argv, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, FileNotFoundError), match=r".") as caught:
        parse_arguments(argv)
    assert message in str(caught.value)


# ---- checkpoints ----


def saving(**changes):
    options = {"save_strategy": "steps", "save_only_model": False, "fsdp": None, "deepspeed": None, "world_size": 2}
    return SimpleNamespace(**{**options, "resume_from_checkpoint": None, **changes})


@pytest.mark.parametrize(
    ("files", "flags", "ranks", "message"),
    [
        ([], {"deepspeed": ZERO2}, 2, "was written without DeepSpeed"),
        (["optim"], {}, 1, "was written with DeepSpeed"),
        (["optim"], {"deepspeed": ZERO2}, 2, "was written by 1 ranks and this run has 2: start 1"),
        (["optim"], {"deepspeed": ZERO3}, 1, "was not written by stage 3 and this run has stage 3"),
        (["optim", "model"], {"deepspeed": ZERO2}, 1, "was written by stage 3 and this run has stage 2"),
        ([], {}, 1, None),
        (["optim"], {"deepspeed": ZERO2}, 1, None),
        (["optim", "model"], {"deepspeed": ZERO3}, 1, None),
    ],
)
def test_resume(tmp_path, files, flags, ranks, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for kind in files:
        (tmp_path / "global_step3").mkdir(exist_ok=True)
        (tmp_path / "global_step3" / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt").touch()
    args = saving(save_strategy="no", resume_from_checkpoint=str(tmp_path), **flags)
    check_checkpoints(args, low_rank=True)  # ours go on anywhere
    if message is None:
        return check_checkpoints(args, low_rank=False)
    with pytest.raises(ValueError, match=r".") as caught:
        check_checkpoints(args, low_rank=False)
    assert message in str(caught.value)


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_accelerate_on_two_machines_starts_one_run(stage, monkeypatch):
    """As docs/multi_node.md does: without a line of the file each machine would start a run of its own."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    started = []
    monkeypatch.setattr("torch.distributed.run.run", started.append)
    machines = ["--num_machines", "2", "--num_processes", "16", "--machine_rank", "1"]
    head = ["--main_process_ip", "node-0", "--main_process_port", "29500"]
    file = str(ROOT / "configs" / f"accelerate_{stage}.yaml")
    launch_command(launch_command_parser().parse_args(["--config_file", file, *machines, *head, "launch/pretrain.py"]))
    (run,) = started
    assert (int(run.nnodes), int(run.node_rank), int(run.nproc_per_node)) == (2, 1, 8)
    assert run.rdzv_endpoint == "node-0:29500"
