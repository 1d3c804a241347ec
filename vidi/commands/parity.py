"""`vidi parity`: arguments and what they run. Loads torch only when it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

EQUAL, DIFFERENT, UNUSABLE, NOTHING = 0, 1, 2, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--goldens", metavar="DIR", help="folder of golden cases or sets (default: the embedded ones)")
    parser.add_argument("--case", metavar="NAME", help="one case, or SET/NAME (default: all)")
    parser.add_argument("--stage", metavar="GLOB", help="only stages that match, such as 'layer.*.t2v,logits'")
    parser.add_argument("--backend", default="eager", help="attention of the decoder: eager, sdpa, flash, flex")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    parser.add_argument("--path", choices=("plain", "fast"), default="plain", help="the readable path, or vidi.fast")
    parser.add_argument(
        "--size",
        choices=("tiny", "full"),
        default="tiny",
        help="full: the 9B sizes on a GPU, fast against plain by ratio",
    )
    parser.add_argument("--chained", action="store_true", help="only from raw inputs on, no stage fed alone (faster)")
    parser.add_argument("--json", metavar="FILE", help="write the whole result as JSON")
    parser.add_argument("--html", metavar="FILE", help="write a self-contained page")
    parser.add_argument("--dump", metavar="DIR", help="write this run's chained tensors to DIR/CASE.safetensors")
    parser.add_argument("--quiet", action="store_true", help="no table, only what differs and the summary")


def run(args: argparse.Namespace) -> int:
    """Returns 0 equal, 1 different, 2 unusable input, 3 nothing compared."""
    from rich.console import Console

    from vidi import device
    from vidi.commands import outputs
    from vidi.parity import html, report, store, suite, tolerance
    from vidi.parity.dump import Dump
    from vidi.parity.golden import GoldenError

    console, status = Console(), Console(stderr=True)
    try:
        outputs.check(args.json, args.html)
        if args.size == "full":
            import torch

            from vidi.parity import full

            if not torch.cuda.is_available():
                print("NOT RUN full size: no CUDA device; 9B parameters in float32 need a GPU of 80 GB")
                return NOTHING
            whole = full.run(args.goldens, device=args.device if args.device != "cpu" else "cuda")
            console.print(whole.text(), soft_wrap=True, highlight=False, markup=False)
            return whole.exit_code
        device.check(args.device)
        goldens = store.goldens_dir(args.goldens)
        refs = suite.select(goldens, args.case)
        # Imported recordings bring no tolerances of their own: the embedded ones judge them.
        own_tolerances = (goldens / "tolerances.toml").exists()
        tolerances = tolerance.load(goldens if own_tolerances else store.goldens_dir())
        dump = Dump(Path(args.dump), [ref.name for ref in refs]) if args.dump else None
        with status.status("") as line:

            def on_case(case: suite.CaseRun, tensors: Mapping[str, Any]) -> None:
                line.update(f"{case.name} done")
                if dump is not None:
                    dump.write(case.case, tensors)

            line.update(f"{len(refs)} cases")
            found = suite.run(
                refs,
                tolerances,
                dtype=args.dtype,
                device=args.device,
                backend=args.backend,
                glob=args.stage,
                isolate=not args.chained,
                fast=args.path == "fast",
                on_case=on_case,
            )
    except (GoldenError, ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"vidi parity: {error}", file=sys.stderr)
        return UNUSABLE
    # What a rerun of one stage needs beside case, stage, dtype and backend.
    given = (
        ("--goldens", args.goldens),
        ("--device", args.device if args.device != "cpu" else None),
        ("--path", args.path if args.path != "plain" else None),
    )
    options = shlex.join(word for name, value in given if value for word in (name, value))
    report.print_run(found, console, verbose=not args.quiet, options=options)
    try:
        if args.json:
            report.write_json(found, Path(args.json))
        if args.html:
            html.write(found, Path(args.html), options=options)
    except OSError as error:
        print(f"vidi parity: {error}", file=sys.stderr)
        return UNUSABLE
    return found.exit_code
