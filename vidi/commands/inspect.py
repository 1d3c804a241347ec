"""`vidi inspect`: what a checkpoint folder holds, and with --frames what a run of it needs. Loads torch only for --frames."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.inspect import inspect_folder
from vidi.commands import arguments
from vidi.config import VidiConfig

__all__ = ["add_arguments", "run"]

FITS, DOES_NOT_FIT, UNUSABLE = 0, 1, 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_checkpoint(parser, "dir")
    parser.add_argument(
        "--frames",
        type=arguments.positive,
        help="GPU memory for a video of so many seconds, a frame a second, with sound",
    )
    parser.add_argument(
        "--memory", type=arguments.memory, help="a GPU's memory, such as 24GiB: does it fit, and how many frames would"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report. Returns 0 fits, 1 does not fit (the folder its config, or the run the memory), 2 unusable."""
    try:
        report = inspect_folder(arguments.checkpoint(args.dir, args))
    except CheckpointError as error:
        if args.json:
            reason = {"error": error.problem, "file": error.file, "tensor": error.tensor}
            print(json.dumps({"path": str(args.dir), "fits": False, "unusable": True, **reason}, indent=1))
        else:
            print(f"unusable: {error}", file=sys.stderr)
        return UNUSABLE
    needs = None
    if report.config is not None and report.fits and (args.frames is not None or args.memory is not None):
        needs = _needs(report.config, args.frames, args.memory)
    if args.json:
        print(json.dumps(report.as_dict() | ({"needs": needs} if needs else {}), indent=1))
    else:
        print(report.render())
        if needs:
            print("\n" + _rendered(needs))
    return FITS if report.fits and (needs is None or needs.get("fits", True)) else DOES_NOT_FIT


def _needs(config: VidiConfig, frames: int | None, memory: int | None) -> dict[str, Any]:
    """What ``--frames`` and ``--memory`` ask, ready for JSON; bytes."""
    from vidi.fast import needs

    found: dict[str, Any] = {"cuda_context_bytes": needs.CONTEXT_BYTES}
    if frames is not None:
        one = needs.count(config, frames)
        found |= {"frames": frames, "visual_tokens": one.visual_tokens, "audio_tokens": one.audio_tokens}
        found |= {"phase": one.phase, "terms": one.terms, "peak_bytes": one.peak}
    if memory is not None:
        found |= {"memory_bytes": memory, "frames_that_fit": needs.room(config, memory)}
        found["fits"] = one.fits(memory) if frames is not None else bool(found["frames_that_fit"])
    return found


def _rendered(needs: dict[str, Any]) -> str:
    lines = []
    if "frames" in needs:
        lines += [
            f"{needs['frames']:,} frames (1 a second, with sound): {needs['visual_tokens']:,} visual + "
            f"{needs['audio_tokens']:,} audio tokens; GPU memory in bfloat16, at its peak in {needs['phase']}:"
        ]
        lines += [f"{_gib(size):>10}  {name}" for name, size in needs["terms"].items()]
        lines += [
            f"{_gib(needs['peak_bytes']):>10}  peak, and about {_gib(needs['cuda_context_bytes'])} for CUDA itself"
        ]
    if "memory_bytes" in needs:
        verdict = "fits" if needs["fits"] else "does not fit"
        runs = " and ".join(f"{first:,} to {last:,}" for first, last in needs["frames_that_fit"])
        room = f"{runs} frames" if runs else "no video at all"
        lines.append(f"{verdict} in {_gib(needs['memory_bytes'])}, which has room for {room}")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
