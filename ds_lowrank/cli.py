"""``ds-lowrank``: what there is to do without a training run."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code, 2 when something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="ds-lowrank", description="Low-rank optimizers under DeepSpeed, FSDP2 and DDP."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect", help="what is in a checkpoint, by parameter: sizes, ranks, layout, steps, overlaps of the subspaces"
    )
    inspect.add_argument(
        "checkpoint", help="folder: checkpoint-N of a Trainer, or what engine.save_checkpoint was given"
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)
    plan = commands.add_parser("plan", help="memory of each rank before a run, and what makes it fit")
    _add_plan(plan)
    for command in (inspect, plan):
        command.add_argument(
            "--import",
            dest="methods",
            action="append",
            default=[],
            metavar="FILE_OR_MODULE",
            help="a file.py or module that registers rules and selections of your own; may be given again",
        )
    args = parser.parse_args(argv)
    try:
        if args.methods:
            from ds_lowrank.registry import import_methods

            import_methods(args.methods)
        return args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_plan)
    parser.add_argument("--model_config", required=True, help="Hugging Face config.json of a causal language model")
    parser.add_argument("--gpus", type=int, required=True, help="data-parallel ranks")
    parser.add_argument("--gpu_memory", type=float, required=True, help="of each, in GiB")
    parser.add_argument(
        "--margin", type=float, default=1.0, help="GiB to leave to CUDA, NCCL and fragmentation: a guess (default: 1)"
    )
    parser.add_argument("--deepspeed", help="DeepSpeed JSON, or accelerate's YAML; without it and --fsdp_config: DDP")
    parser.add_argument("--fsdp_config", help="the Trainer's FSDP2 JSON, or accelerate's YAML")
    parser.add_argument("--seq", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--micro_batch", type=int, help="sequences of one; default: the DeepSpeed JSON's, or 1")
    parser.add_argument("--accumulation", type=int, help="micro-steps a step; default: the DeepSpeed JSON's, or 1")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: the DeepSpeed JSON's, or bf16")
    parser.add_argument(
        "--master_dtype", choices=("fp32", "bf16"), help="bf16: no fp32 master; default: the DeepSpeed JSON's, or fp32"
    )
    parser.add_argument("--rank", type=int, help="default: that of the configuration's lowrank block")
    parser.add_argument("--rule", help="default: the lowrank block's, or adamw")
    parser.add_argument("--selection", help="default: the lowrank block's, or importance")
    parser.add_argument(
        "--state_dtype", choices=("fp32", "bf16", "int8"), help="of moments; default: the lowrank block's, or fp32"
    )
    parser.add_argument("--basis_dtype", choices=("fp32", "bf16", "int8", "int4"), help="default: as above")
    parser.add_argument(
        "--gradients", choices=("full", "projected"), help="what is kept and sent of them; default: as above, or full"
    )
    parser.add_argument(
        "--accumulator_dtype", choices=("fp32", "bf16"), help="of projected gradients; default: as above"
    )
    parser.add_argument("--layerwise", action="store_true", default=None, help="step in the backward pass")
    parser.add_argument("--lowrank_config", help="JSON with a lowrank block, for DDP and one process")
    parser.add_argument("--copies", type=int, help="of the model, HSDP: FSDP2 shards it among gpus / copies")
    parser.add_argument(
        "--sync_each_batch",
        action="store_true",
        help="FSDP2 reduces gradients in every micro-step, as accelerate's option of that name makes it",
    )
    parser.add_argument("--network", type=float, help="Gb/s of a rank, for seconds of what is sent")
    parser.add_argument(
        "--tflops", type=float, help="TFLOP/s of the device in products of fp32 (TF32), for seconds of projecting"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")


def _inspect(args: argparse.Namespace) -> int:
    from ds_lowrank.checkpoint.contents import (  # imports torch and DeepSpeed: --help does not
        describe_checkpoint,
        print_checkpoint,
    )

    facts = describe_checkpoint(args.checkpoint)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_checkpoint(facts)
    return 0


def _plan(args: argparse.Namespace) -> int:
    from ds_lowrank.planner import (
        advise,
        check_gpu_memory,
        compare,
        others_of,
        plan_memory,
        print_plan,
        print_wire,
        read_model,
        verdict,
    )

    check_gpu_memory(args.gpu_memory, args.margin)
    for flag in ("network", "tflops"):
        rate = getattr(args, flag)
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"{flag} must be a number above 0, got {rate}")
    options = ("rule", "selection", "gradients", "accumulator_dtype", "layerwise")
    plan = plan_memory(
        args.model_config,
        args.gpus,
        deepspeed=args.deepspeed,
        fsdp_config=args.fsdp_config,
        lowrank_config=args.lowrank_config,
        rank=args.rank,
        lowrank={name: value for name in options if (value := getattr(args, name)) is not None},
        seq=args.seq,
        micro_batch=args.micro_batch,
        accumulation=args.accumulation,
        checkpointing=args.activation_checkpointing,
        dtype=args.dtype,
        master=args.master_dtype,
        state_dtype=args.state_dtype,
        basis_dtype=args.basis_dtype,
        copies=args.copies,
        no_sync=False if args.sync_each_batch else None,
    )
    model = read_model(args.model_config)
    advice = advise(model, plan.config, plan.setup, args.gpu_memory, args.margin)
    others, found = others_of(model, plan), compare(model, plan)
    says = verdict(found, args.gpu_memory, args.margin, args.network, args.tflops)
    if args.json:
        facts = plan.to_dict()
        facts["fits"] = plan.fits(args.gpu_memory, margin=args.margin)
        facts["advice"] = [{"changes": a.changes, "peak": a.plan.ours.peak} for a in advice]
        facts["others"] = {o.name: {"layout": o.layout, "peak": o.memory.peak} for o in others}
        facts["step"] = found.to_dict()
        facts["verdict"] = says
        print(json.dumps(facts, indent=2))
    else:
        print_plan(plan, args.gpu_memory, args.margin, advice, others=others)
        print_wire(found, args.network, args.tflops)
        print(says)
    return 0


if __name__ == "__main__":
    sys.exit(main())
