"""``ds-lowrank``: what there is to do without a training run."""

from __future__ import annotations

import argparse
import json
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
    args = parser.parse_args(argv)
    try:
        return _inspect(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _inspect(args: argparse.Namespace) -> int:
    from ds_lowrank.inspect import describe_checkpoint, print_checkpoint  # imports torch and DeepSpeed: --help does not

    facts = describe_checkpoint(args.checkpoint)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print_checkpoint(facts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
