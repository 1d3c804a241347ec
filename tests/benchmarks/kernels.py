"""What is measured: for each kernel its sizes, counted work, and its variants; "plain" is the readable one.

Work is what the formula asks for: operations of products, and bytes of each input read once and each output written
once. Sizes are those of a video through the full model; ``small`` ones serve a rehearsal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vidi import precision
from vidi.attention import dispatch, limits, unpad
from vidi.attention.unpad import Rows
from vidi.bridge import fold
from vidi.bridge.projector import Projector
from vidi.config import VidiConfig
from vidi.decoder import decoder
from vidi.decoder.layer import DecoderLayer
from vidi.decoder.norm import GemmaNorm
from vidi.fast import ops, plan, streams, twins, weights
from vidi.fast.bridge import FastProjector

__all__ = ["KERNELS", "Kernel", "Site"]

HALF = torch.bfloat16
# Four times an H100's last level of cache: smaller weights take turns with copies of themselves.
CACHE_BYTES = 200_000_000


@dataclass(frozen=True)
class Site:
    """Where a kernel runs, and at what size."""

    device: torch.device
    small: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(HALF)

    def module(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for p in module.parameters():
                p.normal_(std=p.shape[-1] ** -0.5)
        return precision.cast_model(module, HALF).to(self.device).requires_grad_(False)

    @property
    def config(self) -> VidiConfig:
        return VidiConfig.tiny() if self.small else VidiConfig.full()


@dataclass(frozen=True)
class Kernel:
    """``variants`` by name, each a function without arguments that makes ``calls`` calls; flops and nbytes are one call's."""

    variants: dict[str, Callable[[], Any]]
    flops: int
    nbytes: int
    calls: int = 1


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
    asked = {"dtype": HALF, "device": site.device, "head_dim": head_dim, "softcap": softcap}
    able = [b for b in backends if limits.why_not(b, **asked) is None]

    def call(backend: str) -> Callable[[], Tensor]:
        return lambda: dispatch.attend(q, k, v, **options, backend=backend)

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
    split = plan.make(queries, (0, keys), (keys, keys), site.device)
    fused = ops.pick(site.device)

    def fast() -> None:
        fused.attend(q, rotated, pos, k, v, cross_SX, split, None, head_dim**-0.5, cap, out)

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

    def plain() -> Tensor:
        return following(x + post(branch))

    def fast() -> None:
        fused.add_gemma_norm(own, branch[None], post.weight, following.weight, 1e-6, out)

    return Kernel({"plain": plain, "fast": fast}, flops=0, nbytes=4 * x.nbytes)


def stream_update(site: Site) -> Kernel:
    """All tokens of a video of 300 frames through one decoder layer: keys and values, value as attention, MLP."""
    sizes = site.config.decoder
    tokens = 128 if site.small else 61_800
    layer: Any = site.module(DecoderLayer(sizes, 1))
    fused = weights.decoder_layer(layer)
    x = site.randn(1, tokens, sizes.hidden_size)
    used = x[0].clone()
    held = x.new_empty(1, tokens, 2 * sizes.num_kv_heads * sizes.head_dim)

    def plain() -> Tensor:
        _, v = layer.stream_keys_values(x)
        return decoder.update_in_chunks(layer, x, v)

    def fast() -> None:
        streams.run(used, [fused], sizes.rms_norm_eps, held, chunk=decoder.STREAM_CHUNK, last_stream=True)

    heads = sizes.num_heads + 2 * sizes.num_kv_heads
    products = sizes.hidden_size * (heads * sizes.head_dim + 3 * sizes.intermediate_size)
    return Kernel(
        {"plain": plain, "fast": fast},
        flops=2 * tokens * products,
        nbytes=2 * x.nbytes + held.nbytes + 2 * products,
    )


# ---- one decoding step ----------------------------------------------------------------------------------------------


def step(site: Site, height: int, width: int, call: Callable[[Any, Tensor], Any]) -> Kernel:
    """A product of one decoding step. ``call(operations, weights)``: the twins are the plain variant.

    A GPU runs all calls as one captured graph, as a step does: launched one by one they would wait for the host.
    """
    count = 2 if site.small else -(-CACHE_BYTES // (2 * height * width))
    matrices = [site.randn(height, width) * width**-0.5 for _ in range(count)]

    def variant(operations: Any) -> Callable[[], Any]:
        return _captured(site, [lambda w=w: call(operations, w) for w in matrices])

    return Kernel(
        {"plain": variant(twins), "fast": variant(ops.pick(site.device))},
        flops=2 * height * width,
        nbytes=matrices[0].nbytes,
        calls=count,
    )


@torch.inference_mode()
def _captured(site: Site, calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    def run() -> None:
        for call in calls:
            call()

    if site.device.type == "cpu":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def step_qkv(site: Site) -> Kernel:
    """Residual, norm, q k v, rotation, the new key and value into the cache."""
    d = site.config.decoder
    before, groups, head_dim = _before(site, 1), d.num_kv_heads, d.head_dim
    q, rotated = (site.randn(d.num_heads * head_dim) for _ in range(2))
    k, v = (site.randn(64, groups, head_dim) for _ in range(2))
    cos, pos = site.randn(64, head_dim), torch.tensor([40], device=site.device)
    return step(
        *(site, (d.num_heads + 2 * groups) * head_dim, d.hidden_size),
        lambda operations, w: operations.qkv_step(*before, w, pos, cos, cos, q, rotated, k, v),
    )


def step_gate_up(site: Site) -> Kernel:
    """Sum of the three attentions, residual, norm, gate and up."""
    d = site.config.decoder
    before, out = _before(site, 3), site.randn(d.intermediate_size)
    return step(
        *(site, 2 * d.intermediate_size, d.hidden_size),
        lambda operations, w: operations.gate_up_step(*before, w, out),
    )


def step_head(site: Site) -> Kernel:
    """Residual, last norm, logits, their softcap."""
    d = site.config.decoder
    before, out = _before(site, 1), site.randn(d.vocab_size)
    return step(
        *(site, d.vocab_size, d.hidden_size),
        lambda operations, w: operations.head_step(*before, w, d.final_softcap, out),
    )


def step_product(site: Site, rows: int) -> Kernel:
    """Output projection of three attentions (3 rows), or the MLP's last product (1 row)."""
    d = site.config.decoder
    width = d.num_heads * d.head_dim if rows == 3 else d.intermediate_size
    given, out = site.randn(rows, width), site.randn(rows, d.hidden_size)
    return step(
        *(site, d.hidden_size, width),
        lambda operations, w: operations.product_step(given, w, out),
    )


def _before(site: Site, branches: int) -> tuple[Any, ...]:
    """What each step's kernel starts with: x, branches to add, two norms, eps, and where the sum goes."""
    d = site.config.decoder
    width = d.hidden_size
    return (
        *(site.randn(width), site.randn(branches, width), site.randn(width), site.randn(width)),
        *(d.rms_norm_eps, site.randn(width)),
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
    "step-qkv": (step_qkv, ("plain", "fast")),
    "step-out": (lambda site: step_product(site, 3), ("plain", "fast")),
    "step-gate-up": (step_gate_up, ("plain", "fast")),
    "step-down": (lambda site: step_product(site, 1), ("plain", "fast")),
    "step-head": (step_head, ("plain", "fast")),
}
