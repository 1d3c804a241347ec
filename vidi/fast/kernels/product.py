"""Products of one row with a matrix, bound by reading the matrix once.

Each program holds the whole (normed) row in registers and walks over rows of the matrix. Residual, norms, rotation,
activation and softcap happen on the way in or out, so a decoder layer needs six launches.

Dims: D width, X = N·H, K rows, S text capacity, G key/value heads, H head dim, I inner width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vidi.fast.kernels.rows import gelu_tanh, rounded, tanh
from vidi.fast.operands import Activation, Head, Keys, Queries, Residual, Rotation

__all__ = ["Shape", "gate_up_step", "head_step", "product_step", "qkv_step"]


@dataclass(frozen=True)
class Shape:
    """Launch shape: matrix rows a program takes at a time, its warps, and the most programs (0 = one for all rows)."""

    rows: int
    warps: int
    programs: int


# Measured on an H100 (bench/probe_fast.py): 2.9 TB/s of a copy's 3.0 for the large matrices, launch included.
SHAPES = {
    "qkv": Shape(1, 4, 792),
    "gate_up": Shape(4, 8, 792),
    "head": Shape(4, 8, 0),
    "product of 1": Shape(1, 4, 0),
    "product of 3": Shape(2, 8, 1584),
}


@triton.jit
def _normed_row(
    x_ptr, branch_ptr, post_ptr, next_ptr, x_out_ptr, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """x + post_norm(b0 + b1 + …), written to x_out by the first program; its next_norm, rounded as it would be stored."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    x = tl.load(x_ptr + d, mask=inside, other=0).to(tl.float32)
    if BRANCHES > 0:
        y = tl.load(branch_ptr + d, mask=inside, other=0).to(tl.float32)
        for k in tl.static_range(1, BRANCHES):
            y = rounded(y + tl.load(branch_ptr + k * D + d, mask=inside, other=0).to(tl.float32), x_ptr)
        post = tl.load(post_ptr + d, mask=inside, other=0).to(tl.float32)
        y = rounded(y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * (1 + post), x_ptr)
        x = rounded(x + y, x_ptr)
    if tl.program_id(0) == 0:
        tl.store(x_out_ptr + d, x, mask=inside)
    weight = tl.load(next_ptr + d, mask=inside, other=0).to(tl.float32)
    return rounded(x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * (1 + weight), x_ptr)


@triton.jit
def _pairs(
    x_ptr, branch_ptr, post_ptr, next_ptr, x_out_ptr, eps, w_ptr, pairs, half, out_ptr, cap,
    pos_ptr, cos_ptr, sin_ptr, rotated_ptr, k_ptr, v_ptr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr, EPILOGUE: tl.constexpr,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """Pairs of matrix rows that lie ``half`` apart within blocks of 2·half, because their results meet: gate and up of
    an inner unit, the two halves of a rotated head."""
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    n = _normed_row(x_ptr, branch_ptr, post_ptr, next_ptr, x_out_ptr, eps, D, BLOCK_D, BRANCHES)[None, :]
    for start in range(tl.program_id(0) * ROWS, pairs, tl.num_programs(0) * ROWS):
        pair = start + tl.arange(0, ROWS)
        real = pair < pairs
        row = pair // half * (2 * half) + pair % half
        at = row.to(tl.int64)[:, None] * D + d[None, :]
        mask = real[:, None] & inside[None, :]
        w_a = tl.load(w_ptr + at, mask=mask, other=0)
        w_b = tl.load(w_ptr + half.to(tl.int64) * D + at, mask=mask, other=0)
        a = rounded(tl.sum(w_a.to(tl.float32) * n, 1), x_ptr)
        b = rounded(tl.sum(w_b.to(tl.float32) * n, 1), x_ptr)
        if EPILOGUE == "gelu_mul":
            tl.store(out_ptr + pair, rounded(gelu_tanh(a), x_ptr) * b, mask=real)
        elif EPILOGUE == "softcap":
            tl.store(out_ptr + row, cap * tanh(a / cap), mask=real)
            tl.store(out_ptr + row + half, cap * tanh(b / cap), mask=real)
        else:
            pos = tl.load(pos_ptr)
            head, i = pair // half, pair % half
            cos = tl.load(cos_ptr + pos * H + i, mask=real, other=0).to(tl.float32)
            sin = tl.load(sin_ptr + pos * H + i, mask=real, other=0).to(tl.float32)
            turned_a, turned_b = a * cos - b * sin, b * cos + a * sin
            is_q, is_k, is_v = head < N, (head >= N) & (head < N + G), head >= N + G
            q_at = head * H + i
            tl.store(out_ptr + q_at, a, mask=real & is_q)
            tl.store(out_ptr + q_at + half, b, mask=real & is_q)
            tl.store(rotated_ptr + q_at, turned_a, mask=real & is_q)
            tl.store(rotated_ptr + q_at + half, turned_b, mask=real & is_q)
            k_at = pos * (G * H) + (head - N) * H + i
            tl.store(k_ptr + k_at, turned_a, mask=real & is_k)
            tl.store(k_ptr + k_at + half, turned_b, mask=real & is_k)
            v_at = pos * (G * H) + (head - N - G) * H + i
            tl.store(v_ptr + v_at, a, mask=real & is_v)
            tl.store(v_ptr + v_at + half, b, mask=real & is_v)


def _launch(
    shape: Shape, epilogue: str, residual: Residual, sum_D: Tensor, weight: Tensor, half: int, out: Tensor,
    cap: float = 1.0, rope: tuple[Tensor | None, ...] = (None,) * 6, heads: tuple[int, int, int] = (1, 1, 2),
) -> None:  # fmt: skip
    x_D, branches_KD, post, following = residual.x, residual.branches, residual.post, residual.following
    assert following is not None
    assert residual.is_gemma
    assert all(x.is_contiguous() for x in (x_D, weight, *([] if branches_KD is None else [branches_KD])))
    width, pairs = x_D.shape[0], len(weight) // 2
    blocks = triton.cdiv(pairs, shape.rows)
    _pairs[(min(shape.programs or blocks, blocks),)](
        x_D, branches_KD, None if post is None else post.weight_D, following.weight_D, sum_D, residual.eps,
        weight, pairs, half, out, cap, *rope,
        D=width, BLOCK_D=triton.next_power_of_2(width), BRANCHES=0 if branches_KD is None else len(branches_KD),
        ROWS=shape.rows, EPILOGUE=epilogue, N=heads[0], G=heads[1], H=heads[2], num_warps=shape.warps,
    )  # fmt: skip


def qkv_step(
    residual: Residual, sum_D: Tensor, qkv_XD: Tensor, rotation: Rotation, queries: Queries, keys: Keys
) -> None:
    """See `twins.qkv_step`."""
    groups, head_dim = keys.k_SGH.shape[1:]
    q_X, rotated_X = queries.q_TX[0], queries.rotated_TX[0]
    rope = (queries.pos_T, rotation.cos_SH, rotation.sin_SH, rotated_X, keys.k_SGH, keys.v_SGH)
    heads = (len(q_X) // head_dim, groups, head_dim)
    _launch(SHAPES["qkv"], "rope", residual, sum_D, qkv_XD, head_dim // 2, q_X, rope=rope, heads=heads)


def gate_up_step(residual: Residual, sum_D: Tensor, gate_up_2ID: Tensor, activation: Activation, out_I: Tensor) -> None:
    """See `twins.gate_up_step`. Gemma's activation alone."""
    assert activation == "gelu_tanh"
    _launch(SHAPES["gate_up"], "gelu_mul", residual, sum_D, gate_up_2ID, len(out_I), out_I)


def head_step(residual: Residual, sum_D: Tensor, head: Head, out_V: Tensor) -> None:
    """See `twins.head_step`. The vocabulary is even: its two halves are the pairs. A capped head alone."""
    assert head.cap is not None
    assert len(out_V) % 2 == 0
    _launch(SHAPES["head"], "softcap", residual, sum_D, head.weight_VD, len(out_V) // 2, out_V, head.cap)


@triton.jit
def _product(
    x_ptr, w_ptr, out_ptr, x_stride, num_rows,
    X: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    for start in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < num_rows
        w_at = w_ptr + row.to(tl.int64)[:, None] * X
        sum0 = tl.zeros((ROWS, BLOCK_X), tl.float32)
        sum1 = tl.zeros((ROWS, BLOCK_X), tl.float32)
        sum2 = tl.zeros((ROWS, BLOCK_X), tl.float32)
        for first in tl.static_range(0, X, BLOCK_X):
            i = first + tl.arange(0, BLOCK_X)
            inside = i < X
            w = tl.load(w_at + i[None, :], mask=real[:, None] & inside[None, :], other=0).to(tl.float32)
            sum0 += w * tl.load(x_ptr + i, mask=inside, other=0).to(tl.float32)[None, :]
            if K == 3:
                sum1 += w * tl.load(x_ptr + x_stride + i, mask=inside, other=0).to(tl.float32)[None, :]
                sum2 += w * tl.load(x_ptr + 2 * x_stride + i, mask=inside, other=0).to(tl.float32)[None, :]
        tl.store(out_ptr + row, tl.sum(sum0, 1), mask=real)
        if K == 3:
            tl.store(out_ptr + num_rows + row, tl.sum(sum1, 1), mask=real)
            tl.store(out_ptr + 2 * num_rows + row, tl.sum(sum2, 1), mask=real)


def product_step(rows_KX: Tensor, weight_DX: Tensor, out_KD: Tensor) -> None:
    """See `twins.product_step`."""
    count, inner = rows_KX.shape
    assert count in (1, 3)
    assert all(x.is_contiguous() for x in (rows_KX[0], weight_DX, out_KD))
    shape, num_rows = SHAPES[f"product of {count}"], len(weight_DX)
    blocks = triton.cdiv(num_rows, shape.rows)
    _product[(min(shape.programs or blocks, blocks),)](
        rows_KX, weight_DX, out_KD, rows_KX.stride(0), num_rows,
        X=inner, BLOCK_X=min(2048, triton.next_power_of_2(inner)), ROWS=shape.rows, K=count, num_warps=shape.warps,
    )  # fmt: skip
