"""Timing of a whole model on one device: encode, prefill, decode, memory, beside floors measured in the same run."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vidi.config import VidiConfig
from vidi.fast import floors
from vidi.fast.floors import Ceilings
from vidi.inputs.batch import Batch

__all__ = ["ceilings", "device_ms", "device_name", "linear_fit", "make_batch", "measure", "profile"]

TEXT_TOKENS = 24


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds on the host's clock, the device idle before and after; and what ``run`` returns."""
    synchronize(device)
    start = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - start, result


def ceilings(device: torch.device, dtype: torch.dtype = torch.bfloat16, side: int | None = None) -> Ceilings:
    """What a large product of random data and a large device copy (bytes read plus written) reach: medians.

    The product twice: over a tenth of a second, and over three, where the card's power limit lowers its clock.
    """
    cuda = device.type == "cuda"
    side = side or (8192 if cuda else 1024)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.full_like(a, torch.nan)
    product, sustained = (1e-3 * device_ms(device, lambda: torch.mm(a, b.T, out=out), rep_ms) for rep_ms in (10, 300))
    assert torch.isfinite(out).all(), "the product left values unwritten"
    source = torch.randn((1 << 30) if cuda else (1 << 24), device=device)
    target = torch.empty_like(source)
    copy = 1e-3 * device_ms(device, lambda: target.copy_(source))
    assert torch.equal(source, target)
    return Ceilings(2 * side**3 / product, 2 * source.nbytes / copy, 2 * side**3 / sustained)


def device_ms(device: torch.device, run: Callable[[], Any], rep_ms: int = 20) -> float:
    """Median milliseconds of one call: on a GPU of ten replays of a graph that lasts ``rep_ms``; ``run`` must be capturable."""
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(run, rep=rep_ms, return_mode="median")
    return 1e3 * statistics.median(timed(device, run)[0] for _ in range(5))


def make_batch(config: VidiConfig, num_frames: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Batch:
    """One video of random pixels with sound as long, a text of 24 ids with the placeholder; all on the device."""
    random = torch.Generator(device).manual_seed(seed + num_frames)
    side, a = config.vision.image_size, config.audio
    frames = torch.randint(0, 256, (num_frames, 3, side, side), dtype=torch.uint8, device=device, generator=random)
    per_second = a.mel_frames // 30 if a.mel_frames >= 30 else 1
    mel_frames = max(num_frames * per_second, 2 * config.audio_pool_size)
    pieces = -(-mel_frames // a.mel_frames)
    mel = torch.randn(pieces, a.num_mel_bins, a.mel_frames, device=device, generator=random).to(dtype)
    ids = torch.randint(3, config.decoder.vocab_size, (1, TEXT_TOKENS + 1), device=device, generator=random)
    ids[0, 5] = config.image_placeholder
    return Batch(ids, None, (frames,), (mel,), (mel_frames,))


@torch.no_grad()
def measure(model: Any, batch: Batch, limits: Ceilings, *, new_tokens: int, repeats: int = 2) -> dict[str, Any]:
    """One length: a warm-up (compilation and the decoding graph included, told apart), then the best of ``repeats``.

    ``model``: the plain or the fast one. decode_ms covers the step, the choice of the token and its way to the host.
    """
    device, config = model.device, model.config
    images, audios, sizes = batch.images or (), batch.audios or (), batch.audio_sizes or ()
    capacity = batch.input_ids_BT.shape[1] + new_tokens + 1
    width = torch.finfo(model.dtype).bits // 8
    work = floors.count(config, len(images[0]), sizes[0], len(audios[0]), TEXT_TOKENS, width)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    best = {"encode_s": float("inf"), "prefill_s": float("inf"), "decode_ms": float("inf")}
    warmup_s, capture_s = 0.0, 0.0
    for repeat in range(repeats + 1):
        encode, streams = timed(device, lambda: model.streams(batch))
        prefill, (logits_BV, cache) = timed(device, functools.partial(model.prefill, batch, capacity, streams))
        del streams
        seconds = []
        for _ in range(1 + new_tokens):
            took, logits_BV = timed(device, functools.partial(_next, model, logits_BV, cache))
            seconds.append(took)
        first, *steps = seconds
        if not torch.isfinite(logits_BV).all():
            raise FloatingPointError("the logits hold NaN or Inf: this run measured nothing")
        if repeat == 0:
            warmup_s, capture_s = encode + prefill, first
        else:
            found = {"encode_s": encode, "prefill_s": prefill, "decode_ms": 1e3 * sorted(steps)[len(steps) // 2]}
            best = {name: min(best[name], value) for name, value in found.items()}
        del logits_BV, cache
    limit = work.floors(limits)
    return {
        "frames": len(images[0]),
        "visual_tokens": work.visual_tokens,
        "audio_tokens": work.audio_tokens,
        **best,
        "peak_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
        "floors": limit,
        "ratios": {name: best[name] / limit[name] for name in best},
        "warmup_s": warmup_s,
        "first_step_s": capture_s,
    }


def _next(model: Any, logits_BV: Tensor, cache: Any) -> Tensor:
    """One round of greedy decoding, the host reading the token as `vidi.generate` does."""
    ids_B = logits_BV.argmax(-1)
    logits_BV = model.step(ids_B, cache)
    ids_B.tolist()
    return logits_BV


def profile(run: Callable[[], Any], device: torch.device, top: int = 12) -> list[dict[str, Any]]:
    """The kernels that take the device's time, largest first: name, milliseconds, calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        run()
        synchronize(device)
    rows = [
        {"kernel": e.key[:90], "ms": e.self_device_time_total / 1e3, "calls": e.count}
        for e in found.key_averages()
        if e.self_device_time_total > 0 and not e.key.startswith(("aten::", "cuda"))
    ]
    return sorted(rows, key=lambda row: -row["ms"])[:top]


def linear_fit(x: list[float], y: list[float]) -> dict[str, float]:
    """y = base + slope · x by least squares, and the largest deviation from it relative to y."""
    matrix = torch.tensor([[1.0, value] for value in x], dtype=torch.float64)
    target = torch.tensor(y, dtype=torch.float64)
    base, slope = torch.linalg.lstsq(matrix, target).solution.tolist()
    worst = max(abs(base + slope * a - b) / b for a, b in zip(x, y, strict=True))
    return {"base": base, "slope": slope, "worst_relative_deviation": worst}
