"""Row-wise kernels between the products of a prefill: norms with their residuals, and activations.

All are bound by memory: each tensor is read once and written once. Values are rounded to the tensors' dtype where the
plain path stores one, so both paths round alike.

Dims: R rows, D or C width, I inner width, K branches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vidi.bridge.norm import EPS
from vidi.fast import twins
from vidi.fast.operands import Activation, Affine, LayerNorm, Residual

__all__ = [
    "add_norm",
    "cut_patches",
    "gated_mul",
    "gelu_product",
    "gelu_tanh",
    "layer_norm",
    "rms_norm",
    "rounded",
    "tanh",
]


@triton.jit
def rounded(x, like):
    """float32 after one rounding to the dtype that the pointer ``like`` points to."""
    return x.to(like.dtype.element_ty).to(tl.float32)


@triton.jit
def tanh(x):
    # The quotient cancels near 0, where the series is exact to float32.
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(square < 0.0625, series, 1 - 2 / (tl.exp(2 * x) + 1))


@triton.jit
def gelu_tanh(x):
    # 0.5 · (1 + tanh(u)) = sigmoid(2u)
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _add_gemma_norm(
    x_ptr, branch_ptr, post_ptr, next_ptr, out_ptr, branch_stride, eps,
    D: tl.constexpr, BLOCK: tl.constexpr, BRANCHES: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(x_ptr + row + d, mask=inside, other=0).to(tl.float32)
    if BRANCHES > 0:
        y = tl.load(branch_ptr + row + d, mask=inside, other=0).to(tl.float32)
        for k in tl.static_range(1, BRANCHES):
            more = tl.load(branch_ptr + k * branch_stride + row + d, mask=inside, other=0).to(tl.float32)
            y = rounded(y + more, x_ptr)
        post = tl.load(post_ptr + d, mask=inside, other=0).to(tl.float32)
        y = rounded(y * tl.rsqrt(tl.sum(y * y, 0) / D + eps) * (1 + post), x_ptr)
        x = rounded(x + y, x_ptr)
        tl.store(x_ptr + row + d, x, mask=inside)
    if NEXT:
        weight = tl.load(next_ptr + d, mask=inside, other=0).to(tl.float32)
        n = x * tl.rsqrt(tl.sum(x * x, 0) / D + eps) * (1 + weight)
        tl.store(out_ptr + row + d, n, mask=inside)


def add_norm(residual: Residual, out_RD: Tensor) -> None:
    """See `twins.add_norm`. Gemma's norms alone."""
    assert residual.is_gemma
    x_RD, branches_KRD = residual.x, residual.branches
    post_D, next_D = (None if norm is None else norm.weight_D for norm in (residual.post, residual.following))
    branches = 0 if branches_KRD is None else len(branches_KRD)
    assert all(x.is_contiguous() for x in (x_RD, out_RD, *(() if branches_KRD is None else branches_KRD)))
    _add_gemma_norm[(len(x_RD),)](
        x_RD, branches_KRD, post_D, next_D, out_RD, 0 if branches_KRD is None else branches_KRD.stride(0), residual.eps,
        D=x_RD.shape[1], BLOCK=triton.next_power_of_2(x_RD.shape[1]), BRANCHES=branches, NEXT=next_D is not None,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _gelu_mul(in_ptr, out_ptr, inner, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < inner
    gate = tl.load(in_ptr + row * 2 * inner + i, mask=inside, other=0).to(tl.float32)
    up = tl.load(in_ptr + row * 2 * inner + inner + i, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * inner + i, rounded(gelu_tanh(gate), in_ptr) * up, mask=inside)


def gated_mul(gate_up_R2I: Tensor, activation: Activation, out_RI: Tensor) -> None:
    """See `twins.gated_mul`. Gemma's activation alone."""
    assert activation == "gelu_tanh"
    assert all(x.is_contiguous() for x in (gate_up_R2I, out_RI))
    rows, inner = out_RI.shape
    block = min(2048, triton.next_power_of_2(inner))
    # The second axis of a grid ends at 65,535.
    for start in range(0, rows, 65535):
        part = slice(start, min(start + 65535, rows))
        grid = (triton.cdiv(inner, block), part.stop - part.start)
        _gelu_mul[grid](gate_up_R2I[part], out_RI[part], inner, BLOCK=block, num_warps=4)


@triton.jit
def _layer_norm(
    x_ptr, pending_ptr, weight_ptr, bias_ptr, out_ptr, rows, eps,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + c[None, :]
    pending = tl.load(pending_ptr + c, mask=c < C, other=0)
    x = tl.load(x_ptr + at, mask=inside, other=0).to(tl.float32) + pending[None, :]
    if NORM:
        mean = tl.sum(x, 1) / C
        centred = tl.where(inside, x - mean[:, None], 0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
        weight = tl.load(weight_ptr + c, mask=c < C, other=0).to(tl.float32)
        bias = tl.load(bias_ptr + c, mask=c < C, other=0).to(tl.float32)
        x = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + at, x, mask=inside)


def layer_norm(x_RC: Tensor, pending_C: Tensor, norm: LayerNorm | None, out_RC: Tensor) -> None:
    """See `twins.layer_norm`."""
    assert all(x.is_contiguous() for x in (x_RC, out_RC, pending_C))
    assert pending_C.dtype == torch.float32
    rows, width = x_RC.shape
    weight, bias, eps = (None, None, 0.0) if norm is None else (norm.weight_C, norm.bias_C, norm.eps)
    _layer_norm[(triton.cdiv(rows, 2),)](
        x_RC, pending_C, weight, bias, out_RC, rows, eps,
        C=width, BLOCK=triton.next_power_of_2(width), ROWS=2, NORM=norm is not None, num_warps=4,
    )  # fmt: skip


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * D
    d = tl.arange(0, BLOCK)
    inside = d < D
    x = tl.load(x_ptr + row + d, mask=inside, other=0).to(tl.float32)
    weight = tl.load(weight_ptr + d, mask=inside, other=0).to(tl.float32)
    x = rounded(x * tl.rsqrt(tl.sum(x * x, 0) / D + eps), x_ptr)
    tl.store(out_ptr + row + d, weight * x, mask=inside)


def rms_norm(x_RD: Tensor, weight_D: Tensor, out_RD: Tensor) -> None:
    """See `twins.rms_norm`."""
    assert all(x.is_contiguous() for x in (x_RD, out_RD))
    rows, width = x_RD.shape
    _rms_norm[(rows,)](
        x_RD, weight_D, out_RD, EPS, D=width, BLOCK=triton.next_power_of_2(width), num_warps=4
    )  # fmt: skip


@triton.jit
def _cut_patches(
    pixels_ptr, table_ptr, out_ptr, size, patch, side, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    frame, place = row // (side * side), row % (side * side)
    k = tl.arange(0, BLOCK)
    inside = k < 3 * patch * patch
    channel, dy, dx = k // (patch * patch), k // patch % patch, k % patch
    y, x = place // side * patch + dy, place % side * patch + dx
    at = (frame * 3 + channel).to(tl.int64) * size * size + y * size + x
    value = tl.load(table_ptr + tl.load(pixels_ptr + at, mask=inside, other=0).to(tl.int32), mask=inside, other=0)
    tl.store(out_ptr + row.to(tl.int64) * columns + k, value, mask=k < columns)


def cut_patches(pixels_F3SS: Tensor, table_256: Tensor, patch: int, side: int, out_RK: Tensor) -> None:
    """See `twins.cut_patches`."""
    assert all(x.is_contiguous() for x in (pixels_F3SS, table_256, out_RK))
    rows, columns = out_RK.shape
    _cut_patches[(rows,)](
        pixels_F3SS, table_256, out_RK, pixels_F3SS.shape[-1], patch, side, columns,
        BLOCK=triton.next_power_of_2(columns), num_warps=4,
    )  # fmt: skip


@triton.jit
def _gelu_erf(x_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0).to(tl.float32)
    tl.store(x_ptr + i, 0.5 * x * (1 + tl.erf(x * 0.7071067811865476)), mask=i < count)


def gelu_product(x_RC: Tensor, linear: Affine, exact: bool, out_RI: Tensor) -> None:
    """See `twins.gelu_product`. The tanh form is the epilogue of the product itself (cuBLASLt); the erf form is not."""
    if exact:
        torch.addmm(linear.bias_I, x_RC, linear.weight_IC.T, out=out_RI)
        _gelu_erf[(triton.cdiv(out_RI.numel(), 4096),)](out_RI, out_RI.numel(), BLOCK=4096, num_warps=4)
    elif x_RC.dtype == torch.float32:
        twins.gelu_product(x_RC, linear, exact, out_RI)
    else:
        torch._addmm_activation(linear.bias_I, x_RC, linear.weight_IC.T, use_gelu=True, out=out_RI)
