"""What is measured: for each kernel its sizes, counted work, and its variants; "plain" is the readable one.

Work is what the formula asks for: operations of products, and bytes of each input read once and each output written
once. Sizes are those of a video through the full model; ``small`` ones serve a rehearsal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks import steps
from tests.benchmarks.site import HALF, Kernel, Site
from vidi.attention import dispatch, limits, unpad
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows
from vidi.bridge import fold
from vidi.bridge.projector import Projector
from vidi.decoder import decoder
from vidi.decoder.layer import DecoderLayer
from vidi.decoder.norm import GemmaNorm
from vidi.fast import ops, plan, streams, weights
from vidi.fast.bridge import FastProjector
from vidi.fast.operands import Keys, Queries, Residual, Scores

__all__ = ["KERNELS"]


def attention(
    site: Site,
    backends: tuple[str, ...],
    *,
    samples: int = 1,
    queries: int,
    keys: int,
    heads: tuple[int, int],
    head_dim: int,
    softcap: float | None,
    window: int | None = None,
    causal: bool = False,
) -> Kernel:
    q = site.randn(samples, queries, heads[0], head_dim)
    k, v = (site.randn(samples, keys, heads[1], head_dim) for _ in range(2))
    options: dict[str, Any] = {"scale": head_dim**-0.5, "softcap": softcap, "window": window}
    if causal:
        options["q_pos_BT"] = torch.arange(queries, device=site.device).expand(samples, queries)
    asked: dict[str, Any] = {"dtype": HALF, "device": site.device, "head_dim": head_dim, "softcap": softcap}
    able = [b for b in backends if limits.why_not(b, **asked) is None]

    def call(backend: str) -> Callable[[], Tensor]:
        return lambda: dispatch.attend(AttentionCall(q, k, v, **options), backend)

    pairs = queries * keys // 2 if causal else queries * keys
    return Kernel(
        {"plain": call("eager"), **{b: call(b) for b in able}},
        flops=4 * samples * pairs * heads[0] * head_dim,
        nbytes=2 * q.nbytes + k.nbytes + v.nbytes,
    )


def cross(site: Site, queries: int, keys: int) -> Kernel:
    """Text to a video's tokens, as the decoder has it. ``fast`` attends to a handful of text keys beside them."""
    keys = keys // 100 if site.small else keys
    heads, groups, head_dim, cap = 16, 8, 256, 50.0
    found = attention(
        *(site, ("flash", "flex")),
        queries=queries,
        keys=keys,
        heads=(heads, groups),
        head_dim=head_dim,
        softcap=cap,
    )
    q, rotated = (site.randn(queries, heads * head_dim) for _ in range(2))
    k, v = (site.randn(queries, groups, head_dim) for _ in range(2))
    cross_SX, out = site.randn(keys, 2 * groups * head_dim), site.randn(3, queries, heads * head_dim)
    pos = torch.arange(queries, device=site.device)
    held = Keys(k, v, cross_SX, plan.make(queries, (0, keys), (keys, keys), site.device))
    asked, scores, fused = Queries(q, rotated, pos), Scores(head_dim**-0.5, cap, None), ops.pick(site.device)

    def fast() -> None:
        fused.attend(asked, held, scores, out)

    return dataclasses.replace(found, variants=found.variants | {"fast": fast})


def self_text(site: Site) -> Kernel:
    length = 64 if site.small else 2048
    return attention(
        site,
        ("flash", "flex"),
        queries=length,
        keys=length,
        heads=(16, 8),
        head_dim=256,
        softcap=50.0,
        window=4096,
        causal=True,
    )


def self_siglip(site: Site) -> Kernel:
    return attention(
        *(site, ("sdpa", "flash")),
        samples=1 if site.small else 64,
        queries=729,
        keys=729,
        heads=(16, 16),
        head_dim=72,
        softcap=None,
    )


def unpad_keys(site: Site) -> Kernel:
    """Keys of two videos, the second half as long, gathered to one axis. Plain: Boolean indexing, which waits."""
    length = 600 if site.small else 60_000
    keys = site.randn(2, length, 8, 256)
    keep = torch.arange(length, device=site.device) < torch.tensor([[length], [length // 2]], device=site.device)
    rows = Rows(keep)
    kept = int(rows.lengths_B.sum())
    return Kernel(
        {"plain": lambda: keys[keep], "unpad": lambda: unpad.unpad(keys, rows)},
        flops=0,
        nbytes=2 * kept * 8 * 256 * keys.element_size(),
    )


def fold_projector(site: Site) -> Kernel:
    """64 frames of the tower: fold 2×2 patches, two linear layers."""
    width_in, width_out = (32, 40) if site.small else (1152, 3584)
    frames = 2 if site.small else 64
    tower = site.randn(frames, 729, width_in)
    projector: Any = site.module(Projector(4 * width_in, width_out))
    fused = FastProjector(projector)

    def run(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: module(fold.space_to_depth(fold.pad(tower)).permute(0, 2, 3, 1))

    tokens = frames * 14 * 14
    products = 4 * width_in * width_out + width_out**2
    return Kernel(
        {"plain": run(projector), "fast": run(fused)},
        flops=2 * tokens * products,
        nbytes=tower.nbytes + 2 * products + 2 * tokens * width_out,
    )


def norm_residual(site: Site) -> Kernel:
    """x + norm(branch), and the norm that the next product reads."""
    rows, width = (64, 40) if site.small else (32_768, 3584)
    x, branch = site.randn(rows, width), site.randn(rows, width)
    post, following = (site.module(GemmaNorm(width, 1e-6)) for _ in range(2))
    own, out = x.clone(), torch.empty_like(x)
    fused = ops.pick(site.device)
    residual = Residual(own, branch[None], weights.norm_weight(post), weights.norm_weight(following))

    def plain() -> Tensor:
        return following(x + post(branch))

    def fast() -> None:
        fused.add_norm(residual, out)

    return Kernel({"plain": plain, "fast": fast}, flops=0, nbytes=4 * x.nbytes)


def stream_update(site: Site) -> Kernel:
    """All tokens of a video of 300 frames through one decoder layer: keys and values, value as attention, MLP."""
    sizes = site.config.decoder
    tokens = 128 if site.small else 61_800
    layer = site.module(DecoderLayer(sizes, 1))
    fused = weights.decoder_layer(layer)
    x = site.randn(1, tokens, sizes.hidden_size)
    used = x[0].clone()
    held = x.new_empty(1, tokens, 2 * sizes.num_kv_heads * sizes.head_dim)

    def plain() -> Tensor:
        _, v = layer.stream_keys_values(x)
        return decoder.update_in_chunks(layer, x, v)

    def fast() -> None:
        streams.run(used, [fused], [held[0]], chunk=decoder.STREAM_CHUNK, last_stream=True)

    heads = sizes.num_heads + 2 * sizes.num_kv_heads
    products = sizes.hidden_size * (heads * sizes.head_dim + 3 * sizes.intermediate_size)
    return Kernel(
        {"plain": plain, "fast": fast},
        flops=2 * tokens * products,
        nbytes=2 * x.nbytes + held.nbytes + 2 * products,
    )


# Name -> (how to build it, its variants). A new fast kernel is one more name in its kernel's ``variants``.
KERNELS: dict[str, tuple[Callable[[Site], Kernel], tuple[str, ...]]] = {
    "cross-30q-60000": (lambda site: cross(site, 30, 60_000), ("plain", "flash", "flex", "fast")),
    "cross-30q-126000": (lambda site: cross(site, 30, 126_000), ("plain", "flash", "flex", "fast")),
    "decode-1q-60000": (lambda site: cross(site, 1, 60_000), ("plain", "flash", "flex", "fast")),
    "decode-1q-126000": (lambda site: cross(site, 1, 126_000), ("plain", "flash", "flex", "fast")),
    "self-text-2048": (self_text, ("plain", "flash", "flex")),
    "self-siglip-64": (self_siglip, ("plain", "sdpa", "flash")),
    "unpad": (unpad_keys, ("plain", "unpad")),
    "fold-projector": (fold_projector, ("plain", "fast")),
    "norm-residual": (norm_residual, ("plain", "fast")),
    "stream-update": (stream_update, ("plain", "fast")),
    "step-qkv": (steps.qkv, ("plain", "fast")),
    "step-out": (lambda site: steps.product(site, 3), ("plain", "fast")),
    "step-gate-up": (steps.gate_up, ("plain", "fast")),
    "step-down": (lambda site: steps.product(site, 1), ("plain", "fast")),
    "step-head": (steps.head, ("plain", "fast")),
}
