# ruff: noqa: B023 (closures over loop variables run before the loop goes on)
"""Launch shapes of the fast path's kernels, measured side by side on a GPU; what it prints chose the constants in code.

python bench/probe_fast.py --json FILE [--only step,attend,stream,vision]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend, sdpa_kernel

from stageparity import evidence
from tools.studies import gpu
from vidi import cli, device
from vidi.commands import outputs
from vidi.config import VidiConfig
from vidi.fast import measure, plan
from vidi.fast.operands import Affine, GemmaWeight, Head, Keys, LayerNorm, Queries, Residual, Rotation, Scores

MISSING: ImportError | None = None
try:
    from triton.testing import do_bench_cudagraph

    from vidi.fast import kernels
    from vidi.fast.kernels import attention, product, rows
except ImportError as error:  # raised where it can be told in a line
    MISSING = error

CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def graph_ms(calls: list, rep_ms: int = 20) -> float:
    """Median milliseconds of one call, from a graph of all of them that is replayed for ten times ``rep_ms``."""

    def run() -> None:
        for call in calls:
            call()

    return do_bench_cudagraph(run, rep=rep_ms, return_mode="median") / len(calls)


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device=CUDA) * scale).to(BF16)


def best(found: list[dict[str, Any]], top: int = 6) -> list[dict[str, Any]]:
    found.sort(key=lambda row: row["ms"])
    for row in found[:top]:
        print("   ", row)
    return found


def step(report: dict[str, Any]) -> None:
    d = VidiConfig.full().decoder
    width, inner, q = d.hidden_size, d.intermediate_size, d.num_heads * d.head_dim
    x, b, w1 = draw(width), draw(3, width), GemmaWeight(draw(width, scale=0.1), 1e-6)
    one, three = Residual(x, b[:1], w1, w1), Residual(x, b, w1, w1)
    out, acted = draw(width), draw(inner)
    queries = Queries(draw(1, q), draw(1, q), torch.tensor([900], device=CUDA))
    rotation = Rotation(draw(1100, d.head_dim), draw(1100, d.head_dim))
    k, v = (draw(1100, d.num_kv_heads, d.head_dim) for _ in range(2))
    no_streams = plan.make(1100, (0, 0), (0, 0), CUDA)
    keys = Keys(k, v, draw(1, 2 * d.num_kv_heads * d.head_dim), no_streams)
    logits = draw(65536)
    heads = draw(3, q)
    shapes = {
        "gate_up": (2 * inner, width, 6, lambda w: kernels.gate_up_step(three, out, w, "gelu_tanh", acted)),
        "qkv": (8192, width, 12, lambda w: kernels.qkv_step(one, out, w, rotation, queries, keys)),
        "head": (65536, width, 3, lambda w: kernels.head_step(one, out, Head(w, 30.0, w.dtype), logits)),
        "down": (width, inner, 10, lambda w: kernels.product_step(acted[None], w, b[:1])),
        "o": (width, q, 24, lambda w: kernels.product_step(heads, w, b)),
    }
    for name, (height, columns, copies, call) in shapes.items():
        weights = [draw(height, columns, scale=columns**-0.5) for _ in range(copies)]
        calls = [lambda w=w, call=call: call(w) for w in weights]
        row = draw(columns)
        library = graph_ms([lambda w=w, row=row: torch.mv(w, row) for w in weights])
        key = {"down": "product of 1", "o": "product of 3"}.get(name, name)
        found = []
        for rows_, warps, programs in itertools.product((1, 2, 4, 8), (4, 8), (0, 264, 396, 528, 792, 1056, 1584)):
            if name not in ("down", "o") and rows_ == 8:
                continue
            product.SHAPES[key] = product.Shape(rows_, warps, programs)
            ms = graph_ms(calls)
            rate = weights[0].nbytes / ms / 1e9
            found.append({"ms": round(ms, 5), "tb_s": round(rate, 3), "shape": (rows_, warps, programs)})
        print(f"{name} ({height} x {columns}): library mv {library:.4f} ms")
        report[name] = {"library_ms": library, "found": best(found)}
        del weights, calls


def attend(report: dict[str, Any]) -> None:
    d = VidiConfig.full().decoder
    chosen = attention._shape
    for keys, queries in itertools.product((12360, 61800, 126000), (1, 30)):
        copies = max(2, 250_000 // keys)
        cross = [draw(keys, 2 * d.num_kv_heads * d.head_dim) for _ in range(copies)]
        k, v = (draw(1100, d.num_kv_heads, d.head_dim) for _ in range(2))
        q, r = (draw(queries, d.num_heads * d.head_dim) for _ in range(2))
        asked, scores = Queries(q, r, torch.arange(900, 900 + queries, device=CUDA)), Scores(d.scale, 50.0, 4096)
        out = draw(3, queries, d.num_heads * d.head_dim)
        found = []
        options = [(64, 4, 2), (64, 4, 3), (32, 4, 3), (32, 4, 4), (128, 8, 2), (64, 8, 3), (32, 4, 2), (64, 8, 2)]
        for shape, programs in itertools.product(options, (16, 33, 50, 66, 99, 132)):
            attention._shape = lambda t, shape=shape: shape
            split = plan.make(1100, (0, keys * 9 // 10), (keys * 9 // 10, keys), CUDA, programs)
            try:
                ms = graph_ms(
                    [lambda c=c, s=split: kernels.attend(asked, Keys(k, v, c, s), scores, out) for c in cross]
                )
            except Exception as error:
                found.append({"ms": 1e9, "shape": (*shape, programs), "error": type(error).__name__})
                continue
            rate = cross[0].nbytes / ms / 1e9
            found.append({"ms": round(ms, 5), "tb_s": round(rate, 3), "shape": (*shape, programs)})
        attention._shape = chosen
        print(f"attend: {queries} queries, {keys} keys")
        report[f"attend {queries} {keys}"] = best(found, 4)
        del cross


def stream(report: dict[str, Any], limit: float) -> None:
    d = VidiConfig.full().decoder
    width, inner, kv = d.hidden_size, d.intermediate_size, 2 * d.num_kv_heads * d.head_dim
    w_kv, w_own, w_gu, w_down = (
        draw(*shape, scale=shape[1] ** -0.5)
        for shape in ((kv, width), (width, kv // 2), (2 * inner, width), (width, inner))
    )
    w_full, norm = draw(width, 2 * kv // 2, scale=0.01), GemmaWeight(draw(width, scale=0.1), 1e-6)
    for count in (32768, 4096, 8192, 12544, 16384, 24576, 31744, 32768, 63232, 8192):
        x, n, y = draw(count, width), draw(count, width), draw(1, count, width)
        keys_values, gate_up, acted = draw(count, kv), draw(count, 2 * inner), draw(count, inner)
        heads = draw(count, kv)
        parts = {
            "kv": lambda: torch.mm(n, w_kv.T, out=keys_values),
            "own": lambda: torch.mm(keys_values[:, kv // 2 :], w_own.T, out=y[0]),
            "norm1": lambda: kernels.add_norm(Residual(x, y, norm, norm), n),
            "gate_up": lambda: torch.mm(n, w_gu.T, out=gate_up),
            "gelu_mul": lambda: kernels.gated_mul(gate_up, "gelu_tanh", acted),
            "down": lambda: torch.mm(acted, w_down.T, out=y[0]),
            "norm2": lambda: kernels.add_norm(Residual(x, y, norm, norm), n),
        }
        times = {name: graph_ms([call]) for name, call in parts.items()}
        times["o unfolded"] = graph_ms([lambda: torch.mm(heads, w_full.T, out=y[0])])
        # Long enough for the power limit to act, as in a prefill.
        whole = graph_ms(list(parts.values()), 300) * len(parts)
        floor = 1e3 * count * 2 * (width * kv * 2 + 3 * width * inner) / limit
        print(f"stream {count}: layer {whole:.3f} ms, floor {floor:.3f}, {whole / floor:.3f}x;",
              {name: round(value, 3) for name, value in times.items()})  # fmt: skip
        report[f"stream {count}"] = {"layer_ms": whole, "floor_ms": floor, **times}
        del x, n, y, keys_values, gate_up, acted, heads, parts


def vision(report: dict[str, Any]) -> None:
    v = VidiConfig.full().vision
    width, inner, length, heads = v.hidden_size, v.intermediate_size, 729, v.num_heads
    for frames in (60, 64, 90, 128, 60):
        count = frames * length
        x, n, y, h = draw(count, width), draw(count, width), draw(count, width), draw(count, inner)
        w_qkv, b_qkv = draw(3 * width, width, scale=0.03), draw(3 * width)
        w_o, b_o = draw(width, width, scale=0.03), draw(width)
        w_1, b_1, w_2 = draw(inner, width, scale=0.03), draw(inner), draw(width, inner, scale=0.015)
        w_p, b_p, h_p = draw(4352, width, scale=0.03), draw(4352), draw(count, 4352)
        w_2p = draw(width, 4352, scale=0.015)
        norm, pending = LayerNorm(draw(width), draw(width), 1e-6), torch.randn(width, device=CUDA)
        qkv = torch.addmm(b_qkv, n, w_qkv.T)
        parts = {
            "norm": lambda: kernels.layer_norm(x, pending, norm, n),
            "qkv": lambda: torch.addmm(b_qkv, n, w_qkv.T),
            "out": lambda: torch.addmm(b_o, n, w_o.T),
            "out+residual": lambda: y.addmm_(n, w_o.T),
            "fc2+residual": lambda: y.addmm_(h, w_2.T),
            "fc1+gelu": lambda: kernels.gelu_product(n, Affine(w_1, b_1), False, h),
            "fc2": lambda: torch.addmm(b_o, h, w_2.T),
            "fc1": lambda: torch.addmm(b_1, n, w_1.T),
            "fc1+gelu 4352": lambda: kernels.gelu_product(n, Affine(w_p, b_p), False, h_p),
            "fc1+gelu 4352 in wide": lambda: kernels.gelu_product(n, Affine(w_p[:inner], b_1), False, h_p[:, :inner]),
            "fc2+residual of 4352": lambda: y.addmm_(h_p[:, :inner], w_2.T),
            "fc2+residual 4352": lambda: y.addmm_(h_p, w_2p.T),
            "gelu": lambda: nnf.gelu(h, approximate="tanh"),
            "gelu_erf": lambda: rows._gelu_erf[(-(-h.numel() // 4096),)](h, h.numel(), BLOCK=4096, num_warps=4),
        }
        q, k, vv = qkv.view(-1, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        for name, backend in (
            ("default", None),
            ("cudnn", SDPBackend.CUDNN_ATTENTION),
            ("flash", SDPBackend.FLASH_ATTENTION),
            ("efficient", SDPBackend.EFFICIENT_ATTENTION),
        ):

            def call(backend=backend, q=q, k=k, vv=vv):
                if backend is None:
                    out = nnf.scaled_dot_product_attention(q, k, vv)
                else:
                    with sdpa_kernel(backend):
                        out = nnf.scaled_dot_product_attention(q, k, vv)
                return out.transpose(1, 2).reshape(-1, width)

            parts["sdpa " + name] = call
        times = {}
        for name, part in parts.items():
            try:
                times[name] = round(graph_ms([part]), 4)
            except Exception as error:
                times[name] = type(error).__name__
        print(f"vision {frames}:", times)
        report[f"vision {frames}"] = times


def tower(report: dict[str, Any]) -> None:
    """The whole vision tower over 300 frames, by batch; twice, because the card's clock moves."""
    from vidi.fast.towers import FastVisionTower, even_chunks
    from vidi.towers.siglip import VisionTower

    with CUDA:
        fast = FastVisionTower(VisionTower(VidiConfig.full().vision).to(BF16).eval())
    frames = torch.randint(0, 256, (300, 3, 384, 384), dtype=torch.uint8, device=CUDA)
    sizes = (30, 43, 50, 60, 64, 75, 86, 90, 100, 120, 150)
    for round_ in range(3):
        for size in sizes:
            covered = 300 // size * size

            def run(size=size, covered=covered):
                for part in even_chunks(covered, size):
                    fast(frames[part])

            seconds, _ = measure.timed(CUDA, run)
            if round_:
                report.setdefault(str(size), []).append(1e3 * seconds / covered)
    for size in sizes:
        print(f"tower, {size} frames a batch: {min(report[str(size)]):.4f} ms a frame", report[str(size)])
    print("BEST", min(sizes, key=lambda size: min(report[str(size)])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="probe_fast.py")


@torch.no_grad()
def _run(arguments: list[str]) -> None:
    probes: dict[str, Callable[..., None]] = {
        "step": step,
        "attend": attend,
        "stream": stream,
        "vision": vision,
        "tower": tower,
    }
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="step,attend,stream,vision")
    args = parser.parse_args(arguments)
    chosen = args.only.split(",")
    if unknown := [name for name in chosen if name not in probes]:
        raise ValueError(f"--only {unknown[0]}: choose {', '.join(probes)}")
    outputs.check(args.json)
    device.check("cuda")
    if MISSING is not None:
        raise MISSING
    limits = measure.ceilings(CUDA)
    report: dict[str, Any] = {
        "measured_on": gpu.measured_on("probe-kernels.json", measure.device_name(CUDA)),
        "product_tflops": limits.product_flops / 1e12,
        "copy_tb_s": limits.copy_bytes / 1e12,
    }
    print(report)
    for name in chosen:
        found: dict[str, Any] = {}
        if name == "stream":
            stream(found, limits.product_flops)
        else:
            probes[name](found)
        report[name] = found
        if args.json:
            evidence.write(args.json, report)


if __name__ == "__main__":
    sys.exit(main())
