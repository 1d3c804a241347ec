"""The fused operations: what each computes is written in `twins`, the plain torch that a CPU runs; `kernels` are Triton.

Outputs are written in place or into tensors that the caller holds.

Dims: as in `operands`; I inner width, V vocabulary, F frames, K patch columns in `cut_patches`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vidi.fast import twins
from vidi.fast.operands import Activation, Affine, Head, Keys, LayerNorm, Queries, Residual, Rotation, Scores

__all__ = ["Ops", "pick"]


class Ops(Protocol):
    """`twins` and `kernels` alike; documented in `twins`."""

    # rows of streams, text and towers
    def add_norm(self, residual: Residual, out_RD: Tensor) -> None: ...
    def gated_mul(self, gate_up_R2I: Tensor, activation: Activation, out_RI: Tensor) -> None: ...
    def layer_norm(self, x_RC: Tensor, pending_C: Tensor, norm: LayerNorm | None, out_RC: Tensor) -> None: ...
    def rms_norm(self, x_RD: Tensor, weight_D: Tensor, out_RD: Tensor) -> None: ...
    def gelu_product(self, x_RC: Tensor, linear: Affine, exact: bool, out_RI: Tensor) -> None: ...
    def cut_patches(self, pixels_F3SS: Tensor, table_256: Tensor, patch: int, side: int, out_RK: Tensor) -> None: ...

    # attention of text rows
    def attend(self, queries: Queries, keys: Keys, scores: Scores, out_3TX: Tensor) -> None: ...

    # one decoding row
    def qkv_step(
        self, residual: Residual, sum_D: Tensor, qkv_XD: Tensor, rotation: Rotation, queries: Queries, keys: Keys
    ) -> None: ...
    def gate_up_step(
        self, residual: Residual, sum_D: Tensor, gate_up_2ID: Tensor, activation: Activation, out_I: Tensor
    ) -> None: ...
    def head_step(self, residual: Residual, sum_D: Tensor, head: Head, out_V: Tensor) -> None: ...
    def product_step(self, rows_KX: Tensor, weight_DX: Tensor, out_KD: Tensor) -> None: ...


def pick(device: torch.device) -> Ops:
    """The operations of ``device``: kernels on CUDA (Triton is imported on use), their twins elsewhere."""
    if device.type != "cuda":
        return twins
    from vidi.fast import kernels

    return kernels
