"""Attention of a few text rows over many keys: every program reads one run of keys of one kv head, a second kernel joins.

All query heads that share a kv head and all text rows form one tile, so each key is read once from memory. Scores,
softcap and softmax are float32.

Dims: P programs (runs of keys), T text rows, N query heads, G key/value heads, H head dim, M = T·N/G rows of a kv head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidi.fast.kernels.rows import tanh
from vidi.fast.operands import Keys, Queries, Scores

__all__ = ["attend"]

_NO_WINDOW = 1 << 30
_BIG = tl.constexpr(1 << 30)
_IEEE = {torch.float32: "ieee"}


@triton.jit
def _run(
    q_ptr, rotated_ptr, pos_ptr, k_ptr, v_ptr, cross_ptr, runs_ptr, acc_ptr, top_ptr, total_ptr,
    rows, window, scale, cap,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial attention of one run: unnormalised sums (P, G, M, H), their maxima and totals (P, G, M)."""
    program, group, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    branch = tl.load(runs_ptr + program * 3)
    first = tl.load(runs_ptr + program * 3 + 1)
    stop = tl.load(runs_ptr + program * 3 + 2)
    shared: tl.constexpr = N // G
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m // shared
    inside = row < rows
    h = tl.arange(0, H)
    at = row[:, None] * (N * H) + (group * shared + m % shared)[:, None] * H + h[None, :]
    pos = tl.load(pos_ptr + row, mask=inside, other=0).to(tl.int32)
    keys = k_ptr + group * H
    values = v_ptr + group * H
    stride = tl.where(branch == 0, G * H, 2 * G * H)
    if branch == 0:
        q = tl.load(rotated_ptr + at, mask=inside[:, None], other=0)
        stop = tl.minimum(stop, tl.max(pos, 0) + 1)
        first = tl.maximum(first, (tl.min(tl.where(inside, pos, _BIG), 0) - window) // BLOCK_S * BLOCK_S)
    else:
        q = tl.load(q_ptr + at, mask=inside[:, None], other=0)
        keys = cross_ptr + group * H
        values = cross_ptr + (G + group) * H
    acc = tl.zeros((BLOCK_M, H), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(first, stop, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        exists = s < stop
        offsets = s.to(tl.int64)[:, None] * stride + h[None, :]
        k = tl.load(keys + offsets, mask=exists[:, None], other=0)
        v = tl.load(values + offsets, mask=exists[:, None], other=0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        scores = cap * tanh(scores / cap)
        keep = exists[None, :] & inside[:, None]
        if branch == 0:
            behind = pos[:, None] - s[None, :]
            keep = keep & (behind >= 0) & (behind <= window)
        scores = tl.where(keep, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - shift[:, None])
        fade = tl.exp(top - shift)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    out = (program * G + group) * (rows * shared) + m
    tl.store(acc_ptr + out[:, None] * H + h[None, :], acc, mask=inside[:, None])
    tl.store(top_ptr + out, top, mask=inside)
    tl.store(total_ptr + out, total, mask=inside)


@triton.jit
def _join(
    acc_ptr, top_ptr, total_ptr, out_ptr, rows, branch_stride, end_text, end_visual, end_audio,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One head of one text row and branch: the runs' sums, brought to one maximum. No run, or no key: exactly 0."""
    row, head, branch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared: tl.constexpr = N // G
    begin = tl.where(branch == 0, 0, tl.where(branch == 1, end_text, end_visual))
    end = tl.where(branch == 0, end_text, tl.where(branch == 1, end_visual, end_audio))
    m = row * shared + head % shared
    h = tl.arange(0, H)
    acc = tl.zeros((H,), tl.float32)
    total = 0.0
    top = float("-inf")
    for start in range(begin, end, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = (p * G + head // shared) * (rows * shared) + m
        tops = tl.load(top_ptr + at, mask=p < end, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(tops, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(tops - shift)
        fade = tl.exp(top - shift)
        parts = tl.load(acc_ptr + at[:, None] * H + h[None, :], mask=(p < end)[:, None], other=0)
        acc = acc * fade + tl.sum(parts * weights[:, None], 0)
        total = total * fade + tl.sum(weights * tl.load(total_ptr + at, mask=p < end, other=0), 0)
        top = new_top
    acc = acc / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + branch.to(tl.int64) * branch_stride + row * (N * H) + head * H + h, acc)


def attend(queries: Queries, keys: Keys, scores: Scores, out_3TX: Tensor) -> None:
    """See `twins.attend`. Capped scores alone."""
    assert scores.cap is not None
    q_TX, plan = queries.q_TX, keys.plan
    rows, width = q_TX.shape
    groups, head_dim = keys.k_SGH.shape[1:]
    heads = width // head_dim
    given = (q_TX, queries.rotated_TX, keys.k_SGH, keys.v_SGH, keys.cross_SX, out_3TX[0])
    assert all(x.is_contiguous() for x in given)
    programs, tile_rows = len(plan.runs_P3), rows * (heads // groups)
    acc = torch.empty(programs, groups, tile_rows, head_dim, dtype=torch.float32, device=q_TX.device)
    top, total = acc.new_empty(2, programs, groups, tile_rows)
    block_m = min(64, max(16, triton.next_power_of_2(tile_rows)))
    block_s, warps, stages = _shape(q_TX.dtype)
    _run[(programs, groups, triton.cdiv(tile_rows, block_m))](
        q_TX, queries.rotated_TX, queries.pos_T, keys.k_SGH, keys.v_SGH, keys.cross_SX, plan.runs_P3, acc, top, total,
        rows, _NO_WINDOW if scores.window is None else scores.window, scores.scale, scores.cap,
        N=heads, G=groups, H=head_dim, BLOCK_M=block_m, BLOCK_S=block_s,
        PRECISION=_IEEE.get(q_TX.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    _join[(rows, heads, 3)](
        acc, top, total, out_3TX, rows, out_3TX.stride(0), *plan.ends,
        N=heads, G=groups, H=head_dim, BLOCK_P=16, num_warps=4,
    )  # fmt: skip


def _shape(dtype: torch.dtype) -> tuple[int, int, int]:
    """Keys a tile, warps and pipeline stages: 0.18 ms for one query over 61,800 keys on an H100, floor 0.17."""
    return (16, 4, 1) if dtype == torch.float32 else (32, 4, 2)
