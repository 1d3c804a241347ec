"""`vidi synth`: a synthetic checkpoint of any size. Loads torch only when it runs."""

from __future__ import annotations

import argparse

from stageparity.strict import printable
from vidi.commands import arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="tiny: 0.4 MB; full: 21 GB")
    parser.add_argument("--model", choices=("9b", "7b"), default="9b", help="Vidi 1.5 9B or Vidi 7B (full: 17 GB)")
    parser.add_argument("--seed", type=int, default=0, help="of its weights (default: 0)")
    arguments.add_dtype(parser, "bfloat16")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint folder that is there")


def run(args: argparse.Namespace) -> int:
    """Write a synthetic checkpoint. Returns 0; raises CheckpointError where OUT cannot be written."""
    import torch

    from vidi import sizes_7b
    from vidi.checkpoint import progress, synthetic
    from vidi.commands import outputs
    from vidi.config import VidiConfig

    outputs.check_folder(args.out)
    if args.model == "7b":
        config = sizes_7b.config(args.size)
    else:
        config = VidiConfig.tiny() if args.size == "tiny" else VidiConfig.full()
    dtype, extra = getattr(torch, args.dtype), dict[str, str]()
    if args.size == "tiny":
        from vidi.inputs import prompt, prompt_7b

        extra = (prompt_7b if args.model == "7b" else prompt).tiny_files()
    with progress.bar("writing") as report:
        synthetic.synth(args.out, config, args.seed, dtype=dtype, extra=extra, force=args.force, progress=report)
    print(f"{printable(args.out)}: {args.model}, {args.size}, seed {args.seed}, {args.dtype}, 5 shards")
    return 0
