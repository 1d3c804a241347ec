"""`vidi bench`: speed and memory of the whole model at several video lengths, beside floors of the same run.

Synthetic weights straight in device memory; on a CPU the tiny model, which shows that the command works and no speed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from vidi.commands import arguments

__all__ = ["add_arguments", "run"]

FULL_FRAMES, TINY_FRAMES = (60, 150, 300, 1800, 3600), (5, 10, 20, 40, 80)


def lengths(text: str) -> tuple[int, ...]:
    """Numbers of frames: "60,300" -> (60, 300). Raises ArgumentTypeError as `arguments.positive` does."""
    return tuple(map(arguments.positive, text.split(",")))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--frames", type=lengths, help="video lengths at one frame a second (default: five lengths)")
    parser.add_argument("--model", choices=("9b", "7b"), default="9b", help="Vidi 1.5 9B (default) or Vidi 7B")
    parser.add_argument("--size", choices=("full", "tiny"), help="model size (default: full on a GPU, tiny on a CPU)")
    parser.add_argument(
        "--max-new-tokens", type=arguments.positive, default=64, help="decoding steps to time (default: 64)"
    )
    parser.add_argument("--plain", type=lengths, default=(), help="lengths at which the plain path is timed as well")
    parser.add_argument("--plain-backend", default="eager", help="attention of the plain path (default: eager)")
    parser.add_argument("--profile", type=lengths, default=(), help="lengths at which kernels are profiled")
    parser.add_argument(
        "--frame-batch",
        type=arguments.positive,
        help="frames that pass through the tower together (default: FastModel's)",
    )
    parser.add_argument("--device", help="torch device (default: cuda where there is one)")
    parser.add_argument(
        "--video",
        metavar="FILE",
        type=Path,
        help="measure the way from this file to an answer instead of made-up frames",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures to this file")


def run(args: argparse.Namespace) -> int:
    """Measure and print; 0 when every length ran."""
    import torch

    from vidi import device as devices
    from vidi import sizes_7b
    from vidi.attention import dispatch
    from vidi.checkpoint import synthetic
    from vidi.commands import outputs
    from vidi.config import VidiConfig
    from vidi.fast import accelerate, measure, refusal

    outputs.check(args.json)
    if args.video is not None:
        arguments.unread(args, "with --video, whose length is its own", frames=None, plain=(), profile=())
    device = devices.check(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dispatch.check(args.plain_backend)
    if args.video is not None:
        from vidi.inputs import container  # PyAV: lengths of synthetic frames are measured without it

        container.open_regular(args.video).close()  # before weights are made
        outputs.apart(args.video, args.json)
    size = args.size or ("full" if device.type == "cuda" else "tiny")
    frames = args.frames or (FULL_FRAMES if size == "full" else TINY_FRAMES)
    if args.model == "7b":
        config = sizes_7b.config(size)
    else:
        config = VidiConfig.full() if size == "full" else VidiConfig.tiny()
    made_s, model = measure.timed(device, lambda: synthetic.create(config, 0, device=device, dtype=torch.bfloat16))
    # The plain path runs over the same parameters.
    model.backend = args.plain_backend
    runs: list[tuple[str, Any, tuple[int, ...]]] = [("plain", model, args.plain)]
    fused_s = 0.0
    if refused := refusal(config, device):
        print(f"no fast path: {refused}; the plain one is measured")
        runs = [("plain", model, args.plain or frames)]
    else:
        options = {} if args.frame_batch is None else {"frame_batch": args.frame_batch}
        fused_s, fast = measure.timed(device, lambda: accelerate(model, **options))
        runs.insert(0, ("fast", fast, frames))
    first, best, _ = runs[0]
    if args.video is not None:
        return _video(args, best, made_s + fused_s)
    limits = measure.ceilings(device)
    report: dict[str, Any] = {
        "measured_on": _measured_on(measure.device_name(device)),
        "model": args.model,
        "size": size,
        "frame_batch": None if refused else best.frame_batch,
        "dtype": "bfloat16",
        "product_tflops": limits.product_flops / 1e12,
        "sustained_product_tflops": limits.sustained_flops / 1e12,
        "copy_tb_s": limits.copy_bytes / 1e12,
        "make_weights_s": made_s,
        "fuse_weights_s": fused_s,
        "fast": [],
        "plain": [],
        "profiles": {},
    }
    print(
        f"device: {report['measured_on']['device']}, torch {torch.__version__}; "
        f"model: {args.model}, {size}, bfloat16, synthetic weights\n"
        f"ceilings of this run: product {limits.product_flops / 1e12:.3g} TFLOP/s "
        f"({limits.sustained_flops / 1e12:.3g} over seconds), copy {limits.copy_bytes / 1e12:.3g} TB/s"
    )
    print(HEADER)
    for path, runner, chosen in runs:
        for num_frames in chosen:
            batch = measure.make_batch(config, num_frames, device, torch.bfloat16)
            steps = args.max_new_tokens if path == first else min(args.max_new_tokens, 8)
            row = measure.measure(runner, batch, limits, new_tokens=steps)
            report[path].append(row)
            print(line(path, row), flush=True)
            _write(args.json, report)
    for num_frames in args.profile:
        batch = measure.make_batch(config, num_frames, device, torch.bfloat16)
        report["profiles"][str(num_frames)] = _profiles(best, batch, device)
        _write(args.json, report)
    rows = report[first]
    if len(rows) > 2:
        tokens = [float(row["visual_tokens"] + row["audio_tokens"]) for row in rows]
        seconds = [float(row["frames"]) for row in rows]
        report["fits"] = {
            "encode_s per frame": measure.linear_fit(seconds, [row["encode_s"] for row in rows]),
            "prefill_s per token": measure.linear_fit(tokens, [row["prefill_s"] for row in rows]),
            "decode_ms per token": measure.linear_fit(tokens, [row["decode_ms"] for row in rows]),
        }
        print(f"linear fit over {len(rows)} lengths:")
        for name, fit in report["fits"].items():
            print(
                f"  {name}: {fit['base']:.4g} + {fit['slope']:.4g} x, off by at most "
                f"{100 * fit['worst_relative_deviation']:.1f} %"
            )
    _write(args.json, report)
    return 0


def _video(args: argparse.Namespace, model: Any, loading_s: float) -> int:
    """A file through reader, towers, prefill and decoding, and a second question over the first one's keys."""
    from vidi import retrieval
    from vidi.costs import Costs
    from vidi.fast import measure
    from vidi.inputs import prompt
    from vidi.inputs.reader import Reader

    # Weights that mean nothing end an answer at any step, or never: the ids of any prompt will do.
    ids = prompt.build_ids(prompt.tiny_tokenizer(), "a red car")
    costs, second = Costs(), Costs()
    costs.seconds["loading"] = loading_s
    started = time.perf_counter()
    with Reader(args.video, model.config) as reader:
        film = retrieval.encode(model, reader, costs)
    tokens = retrieval.decode(model, film, ids, max_new_tokens=args.max_new_tokens, costs=costs)
    whole_s = time.perf_counter() - started
    retrieval.decode(model, film, ids, max_new_tokens=args.max_new_tokens, costs=second)
    device = measure.device_name(model.device)
    print(f"device: {device}; {film.duration_sec:.0f} s of video, read {film.reading} {film.why}")
    print(f"file to answer ({len(tokens)} tokens): {whole_s:.2f} s; {costs.line(film.reading)}")
    print(f"second question: prefill {second.seconds['prefill']:.2f} s, decoding {second.seconds['decoding']:.2f} s")
    report: dict[str, Any] = {"measured_on": _measured_on(device), "video_sec": film.duration_sec}
    report |= {"reading": film.reading, "why": film.why}
    report |= {"whole_s": whole_s, "seconds": costs.seconds, "second": second.seconds, "peak_gib": costs.peak_gib()}
    _write(args.json, report)
    return 0


HEADER = (
    "path   frames  visual+audio tokens   encode s (x floor)   prefill s (x floor)   decode ms (x floor)   peak GiB  "
    "warm-up s  first step s"
)


def line(path: str, row: dict[str, Any]) -> str:
    """One row of the table."""
    ratios = row["ratios"]
    peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
    return (
        f"{path:6} {row['frames']:6}  {row['visual_tokens']:8} + {row['audio_tokens']:<8}"
        f"   {row['encode_s']:8.3f} ({ratios['encode_s']:.2f})    {row['prefill_s']:9.3f} ({ratios['prefill_s']:.2f})"
        f"    {row['decode_ms']:10.2f} ({ratios['decode_ms']:.2f})   {peak:>8}  {row['warmup_s']:9.2f}  "
        f"{row['first_step_s']:12.3f}"
    )


def _profiles(model: Any, batch: Any, device: Any) -> dict[str, Any]:
    """Kernels of each phase at one length."""
    from vidi.fast import measure

    kept: dict[str, Any] = {}

    def encode() -> None:
        kept["streams"] = model.streams(batch)

    def prefill() -> None:
        kept["logits"], kept["cache"] = model.prefill(batch, 64, kept["streams"])

    def step() -> None:
        kept["logits"] = model.step(kept["logits"].argmax(-1), kept["cache"])

    found = {}
    for name, phase in (("encode", encode), ("prefill", prefill)):
        found[name] = measure.profile(phase, device)
    step()
    found["decode"] = measure.profile(step, device)
    for name, rows in found.items():
        print(f"{name} at {len(batch.images[0])} frames: device time by kernel")
        for row in rows:
            print(f"  {row['ms']:10.3f} ms  {row['calls']:6} x  {row['kernel']}")
    return found


def _measured_on(device: str) -> dict[str, Any]:
    from stageparity import evidence

    root = Path(__file__).resolve().parents[2]
    basis = evidence.Basis(evidence.code(["vidi/commands/bench.py"], root, evidence.ASIDE))
    return evidence.measured_on(basis, root, device)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    from stageparity import evidence

    if path is not None:
        evidence.write(path, report)
