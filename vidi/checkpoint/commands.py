"""`vidi inspect` and `vidi synth`: arguments and printing. Loads torch only where a checkpoint is made."""

from __future__ import annotations

import argparse
import json
import sys

from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.inspect import inspect_folder

__all__ = ["add_inspect_arguments", "add_synth_arguments", "run_inspect", "run_synth"]

FITS, DOES_NOT_FIT, UNUSABLE = 0, 1, 2


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", metavar="DIR", help="checkpoint folder: config.json, index and safetensors shards")
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run_inspect(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 fits, 1 does not fit, 2 unusable."""
    try:
        report = inspect_folder(args.dir)
    except CheckpointError as error:
        if args.json:
            reason = {"error": error.problem, "file": error.file, "tensor": error.tensor}
            print(json.dumps({"path": str(args.dir), "fits": False, "unusable": True, **reason}, indent=1))
        else:
            print(f"unusable: {error}", file=sys.stderr)
        return UNUSABLE
    print(report.to_json() if args.json else report.render())
    return FITS if report.fits else DOES_NOT_FIT


def add_synth_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--size", choices=("tiny", "full"), default="tiny", help="tiny: 0.4 MB; full: 21 GB")
    parser.add_argument("--model", choices=("9b", "7b"), default="9b", help="Vidi 1.5 9B or Vidi 7B (full: 17 GB)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "float32"), default="bf16")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint folder that is there")


def run_synth(args: argparse.Namespace) -> int:
    """Write a synthetic checkpoint. Returns 0, or 2 where OUT cannot be written."""
    import torch

    from vidi import sizes_7b
    from vidi.checkpoint import progress, synthetic
    from vidi.config import VidiConfig

    if args.model == "7b":
        config = sizes_7b.config(args.size)
    else:
        config = VidiConfig.tiny() if args.size == "tiny" else VidiConfig.full()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[args.dtype]
    extra: dict[str, str] = {}
    if args.size == "tiny":
        from vidi.inputs import prompt, prompt_7b

        extra = (prompt_7b if args.model == "7b" else prompt).tiny_files()
    try:
        with progress.bar("writing") as report:
            synthetic.synth(args.out, config, args.seed, dtype=dtype, extra=extra, force=args.force, progress=report)
    except CheckpointError as error:
        print(f"unusable: {error}", file=sys.stderr)
        return UNUSABLE
    print(f"{args.out}: {args.model}, {args.size}, seed {args.seed}, {args.dtype}, 5 shards")
    return 0
