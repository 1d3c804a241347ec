"""`vidi retrieve`: a video and one or more queries in, time ranges out. Loads torch only when it runs."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from stageparity.strict import printable
from vidi.commands import arguments

__all__ = ["add_arguments", "run"]

MAX_QUERIES_BYTES = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", metavar="VIDEO", help="mp4, mkv, webm, ts, avi, ... file")
    parser.add_argument("query", metavar="QUERY", nargs="*", help="what to look for, such as 'an onion being sliced'")
    parser.add_argument("--queries", metavar="FILE", type=Path, help="a text file of further queries, one a line")
    arguments.add_checkpoint(parser, "--checkpoint", required=True)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, …")
    arguments.add_dtype(parser, "bfloat16", "bfloat16", "float16", "float32")
    parser.add_argument(
        "--backend", help="attention of the plain path: eager (default), flash, flex; of a 7B sdpa, too"
    )
    parser.add_argument(
        "--path",
        choices=("auto", "plain", "fast"),
        default="auto",
        help="auto: the fast path on a GPU, else the plain one",
    )
    parser.add_argument("--fps", type=float, default=1.0, help="frames a second to look at (default 1, as trained)")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=arguments.positive, default=1024, help="of an answer (default: 1024)"
    )
    parser.add_argument(
        "--max-frames",
        metavar="N",
        type=arguments.positive,
        help="most frames to look at (default 14400: four hours at one a second)",
    )
    parser.add_argument(
        "--check", action="store_true", help="decode every frame of the file, so that damage anywhere in it is noticed"
    )
    parser.add_argument("--json", action="store_true", help="print each answer as JSON, one object a line")


def run(args: argparse.Namespace) -> int:
    """Prints time ranges and the raw answer of each query as it comes; progress and costs go to stderr.

    The file is read while weights are loaded, and encoded while it is read. Raises ValueError for input that cannot be used.
    """
    import torch

    from stageparity.report import console as consoles
    from vidi import device, retrieval
    from vidi.attention import dispatch, limits
    from vidi.checkpoint import load
    from vidi.checkpoint.folder import read_folder
    from vidi.config import VidiConfig
    from vidi.costs import Costs
    from vidi.fast import accelerate, refusal
    from vidi.inputs import dialect, video
    from vidi.inputs.reader import Reader

    dtype = getattr(torch, args.dtype)
    # What is wrong with a word on the command line is said before 21 GB are read.
    where = device.check(args.device)
    if not Path(args.video).exists():
        raise ValueError(f"{args.video}: no such file")
    queries = [*map(arguments.text, args.query), *(_queries(args.queries) if args.queries else ())]
    if not queries:
        raise ValueError("no query; say what to look for: vidi retrieve VIDEO 'a red car'")
    folder = arguments.checkpoint(args.checkpoint, args)
    config = VidiConfig.from_file(folder)
    tokenizer = dialect.of(config).load(folder, config)
    for query in queries:
        retrieval.check_request(tokenizer, query, config, args.max_new_tokens)
    video.frame_step(1.0, args.fps)
    refused = refusal(config, where)
    worth_it = where.type == "cuda" and args.backend is None and refused is None
    fast = args.path == "fast" or (args.path == "auto" and worth_it)
    if fast and refused:
        raise ValueError(f"--path fast: {refused}")
    arguments.check_path("fast" if fast else "plain", args.backend)
    backend = dispatch.check(args.backend or "eager")
    decoder = config.decoder
    limits.check(backend, dtype=dtype, device=where, head_dim=decoder.head_dim, softcap=decoder.attn_softcap)
    if made := read_folder(folder).synthetic:
        print(f"NOTE: synthetic weights ({made}): this model speaks nonsense", file=sys.stderr)
    costs = Costs()
    with retrieval.progress_on(consoles.console(stderr=True)) as display:
        with Reader(
            args.video,
            config,
            fps=args.fps,
            max_frames=video.MAX_FRAMES if args.max_frames is None else args.max_frames,
            check=args.check,
            progress=retrieval.stage_progress(display, "frames"),
        ) as reader:
            with costs.spent("loading"):
                model = load.load(
                    folder,
                    device=args.device,
                    dtype=dtype,
                    progress=lambda done, total, name: display("weights", done / 1e9, total / 1e9),
                )
                model.backend = backend
                runner = accelerate(model) if fast else model
            film = retrieval.encode(runner, reader, costs, display)
        for number, query in enumerate(queries):
            answer = retrieval.ask(
                runner, tokenizer, film, query, max_new_tokens=args.max_new_tokens, costs=costs, progress=display
            )
            lines = [answer.times or "no time ranges in the answer", answer.text]
            if len(queries) > 1:
                lines = [*([""] if number else []), query, *lines]
            display.say(answer.to_json() if args.json else printable("\n".join(lines), keep="\n"))
    print(costs.line(film.reading), file=sys.stderr)
    return 0


def _queries(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    from vidi.inputs import container

    with container.open_regular(path, "text") as file:
        data = file.read(MAX_QUERIES_BYTES + 1)
    if len(data) > MAX_QUERIES_BYTES:
        raise ValueError(f"{path}: more than {MAX_QUERIES_BYTES:,} bytes of queries; split the file")
    try:
        lines = re.split(r"\r\n|\r|\n", data.decode("utf-8-sig"))  # no more ends a line: a question may hold U+2028
        return [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8 text; save the queries as UTF-8") from None
