"""`vidi retrieve`: a video and a query in, time ranges out. Loads torch only when it runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from stageparity.strict import printable
from vidi.commands import arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="mp4, mkv or webm file")
    parser.add_argument("query", metavar="QUERY", help="what to look for, such as 'an onion being sliced'")
    arguments.add_checkpoint(parser, "--checkpoint", required=True)
    parser.add_argument("--device", default="cpu")
    arguments.add_dtype(parser, "bfloat16", "bfloat16", "float16", "float32")
    parser.add_argument("--backend", help="attention of the plain path: eager (default), flash, flex")
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
    """Prints time ranges and the raw answer; progress goes to stderr. Raises ValueError for input that cannot be used."""
    import torch

    from vidi import device, retrieval
    from vidi.attention import dispatch, limits
    from vidi.checkpoint import load, progress
    from vidi.checkpoint.folder import read_folder
    from vidi.config import VidiConfig
    from vidi.fast import accelerate
    from vidi.inputs import dialect, video

    dtype, args.query = getattr(torch, args.dtype), arguments.text(args.query)
    # What is wrong with a word on the command line is said before 20 GB are read.
    where = device.check(args.device)
    if not Path(args.video).is_file():
        raise ValueError(f"{args.video}: no such file")
    folder = arguments.checkpoint(args.checkpoint, args)
    config = VidiConfig.from_file(folder)
    tokenizer = dialect.of(config).load(folder, config)
    retrieval.check_request(tokenizer, args.query, config, args.max_new_tokens)
    video.frame_step(1.0, args.fps)
    if not 1e-6 <= args.fps <= 1e6:
        raise ValueError(f"--fps {args.fps}: from 0.000001 to 1,000,000 frames a second")
    able = config.decoder.kind == "gemma2"
    fast = args.path == "fast" or (args.path == "auto" and where.type == "cuda" and args.backend is None and able)
    if fast and not able:
        raise ValueError("--path fast: it computes the layers of 1.5 9B alone; use --path plain")
    if fast and args.backend is not None:
        raise ValueError(f"--backend {args.backend}: the fast path has kernels of its own; use --path plain")
    backend = dispatch.check(args.backend or "eager")
    decoder = config.decoder
    limits.check(backend, dtype=dtype, device=where, head_dim=decoder.head_dim, softcap=decoder.attn_softcap)
    if made := read_folder(folder).synthetic:
        print(f"NOTE: synthetic weights ({made}): this model speaks nonsense", file=sys.stderr)
    with progress.bar("loading") as report:
        model = load.load(folder, device=args.device, dtype=dtype, progress=report)
    model.backend = backend
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
    if args.json:
        print(answer.to_json())
    else:
        print(answer.times or "no time ranges in the answer")
        print(printable(answer.text, keep="\n"))
    return 0
