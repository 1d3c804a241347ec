"""`vidi retrieve`: a video and a query in, time ranges out. Loads torch only when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

__all__ = ["add_arguments", "run"]

UNUSABLE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="mp4, mkv or webm file")
    parser.add_argument("query", metavar="QUERY", help="what to look for, such as 'an onion being sliced'")
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="folder with config.json, shards, tokenizer.json"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "float32"), default="bf16")
    parser.add_argument("--backend", default="eager", help="attention of the decoder: eager, flash, flex")
    parser.add_argument(
        "--path",
        choices=("auto", "plain", "fast"),
        default="auto",
        help="auto: the fast path on a GPU, else the plain one",
    )
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second to look at (default 1, as trained)")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def run(args: argparse.Namespace) -> int:
    """Prints time ranges and the raw answer; progress goes to stderr. Returns 0, or 2 for input that cannot be used."""
    import torch

    from vidi import retrieval
    from vidi.attention import dispatch
    from vidi.checkpoint import load, progress
    from vidi.fast import accelerate
    from vidi.inputs import prompt

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[args.dtype]
    try:
        if not Path(args.video).is_file():
            raise ValueError(f"{args.video}: no such file")
        with progress.bar("loading") as report:
            model = load.load(args.checkpoint, device=args.device, dtype=dtype, progress=report)
        model.backend = dispatch.check(args.backend)
        fast = args.path == "fast" or (args.path == "auto" and model.device.type == "cuda")
        tokenizer = prompt.load_tokenizer(Path(args.checkpoint), model.config)
        with retrieval.progress_on_stderr() as report:
            answer = retrieval.retrieve(
                accelerate(model) if fast else model,
                tokenizer,
                args.video,
                args.query,
                fps=args.fps,
                max_new_tokens=args.max_new_tokens,
                progress=report,
            )
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"vidi retrieve: {error}", file=sys.stderr)
        return UNUSABLE
    if args.json:
        print(answer.to_json())
    else:
        print(answer.times or "no time ranges in the answer")
        print(answer.text)
    return 0
