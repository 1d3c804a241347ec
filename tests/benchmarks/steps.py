"""The kernels of one decoding step, each bound by reading its weights; the twins are the plain variant.

They are timed as one captured graph, as a step runs them: launched one by one they would wait for the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.site import Kernel, Site
from vidi.fast import ops, plan, twins
from vidi.fast.operands import GemmaWeight, Head, Keys, Queries, Residual, Rotation

__all__ = ["gate_up", "head", "product", "qkv"]

# Four times an H100's last level of cache: smaller weights take turns with copies of themselves.
CACHE_BYTES = 200_000_000


def _step(site: Site, height: int, width: int, call: Callable[[Any, Tensor], Any]) -> Kernel:
    """``call(operations, weights)`` over (height, width) weights."""
    count = 2 if site.small else -(-CACHE_BYTES // (2 * height * width))
    matrices = [site.randn(height, width) * width**-0.5 for _ in range(count)]

    def variant(operations: Any) -> Callable[[], Any]:
        def run() -> None:
            for w in matrices:
                call(operations, w)

        return run

    return Kernel(
        {"plain": variant(twins), "fast": variant(ops.pick(site.device))},
        flops=2 * height * width,
        nbytes=matrices[0].nbytes,
        calls=count,
    )


def qkv(site: Site) -> Kernel:
    """Residual, norm, q k v, rotation, the new key and value into the cache."""
    d = site.config.decoder
    before, groups, head_dim = _before(site, 1), d.num_kv_heads, d.head_dim
    q, rotated = (site.randn(1, d.num_heads * head_dim) for _ in range(2))
    k, v = (site.randn(64, groups, head_dim) for _ in range(2))
    queries, cos = Queries(q, rotated, torch.tensor([40], device=site.device)), site.randn(64, head_dim)
    keys = Keys(k, v, site.randn(1, 2 * groups * head_dim), plan.make(64, (0, 0), (0, 0), site.device))
    return _step(
        *(site, (d.num_heads + 2 * groups) * head_dim, d.hidden_size),
        lambda operations, w: operations.qkv_step(*before, w, Rotation(cos, cos), queries, keys),
    )


def gate_up(site: Site) -> Kernel:
    """Sum of the three attentions, residual, norm, gate and up."""
    d = site.config.decoder
    before, out = _before(site, 3), site.randn(d.intermediate_size)
    return _step(
        *(site, 2 * d.intermediate_size, d.hidden_size),
        lambda operations, w: operations.gate_up_step(*before, w, "gelu_tanh", out),
    )


def head(site: Site) -> Kernel:
    """Residual, last norm, logits, their softcap."""
    d = site.config.decoder
    before, out = _before(site, 1), site.randn(d.vocab_size)
    return _step(
        *(site, d.vocab_size, d.hidden_size),
        lambda operations, w: operations.head_step(*before, Head(w, d.final_softcap, w.dtype), out),
    )


def product(site: Site, rows: int) -> Kernel:
    """Output projection of three attentions (3 rows), or the MLP's last product (1 row)."""
    d = site.config.decoder
    width = d.num_heads * d.head_dim if rows == 3 else d.intermediate_size
    given, out = site.randn(rows, width), site.randn(rows, d.hidden_size)
    return _step(
        *(site, d.hidden_size, width),
        lambda operations, w: operations.product_step(given, w, out),
    )


def _before(site: Site, branches: int) -> tuple[Residual, Tensor]:
    """What each step's kernel starts with: x, branches to add, two norms; and where the sum goes."""
    width, eps = site.config.decoder.hidden_size, site.config.decoder.rms_norm_eps
    post, following = (GemmaWeight(site.randn(width), eps) for _ in range(2))
    return Residual(site.randn(width), site.randn(branches, width), post, following), site.randn(width)
