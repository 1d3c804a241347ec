"""The bridge with its wide steps fused: the plain bridge's own walk (`vidi.bridge.visual`, `.audio`), other modules.

Dims: R rows, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vidi.bridge.bridge import Bridge
from vidi.bridge.norm import RMSNorm
from vidi.bridge.projector import Projector
from vidi.fast import ops, weights
from vidi.fast.towers import unfolded

__all__ = ["FastNorm", "FastProjector", "accelerated"]


class FastNorm(nn.Module):
    """As `RMSNorm`, read and written once."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        rows_RD = x.contiguous().flatten(0, -2)
        out_RD = torch.empty_like(rows_RD)
        ops.pick(x.device).rms_norm(rows_RD, self.weight.data, out_RD)
        return out_RD.view(x.shape)


class FastProjector(nn.Module):
    """As `Projector`; the activation works in place."""

    def __init__(self, projector: Projector) -> None:
        super().__init__()
        self.fc1, self.fc2 = weights.affine(projector.fc1), weights.affine(projector.fc2)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        inner = rows.new_empty(len(rows), len(self.fc1.bias_I))
        ops.pick(x.device).gelu_product(rows, self.fc1, True, inner)
        return torch.addmm(self.fc2.bias_I, inner, self.fc2.weight_IC.T).view(*x.shape[:-1], -1)


class FastPool(nn.Module):
    """As the pooling convolution, whose windows do not overlap: rows of a product."""

    def __init__(self, conv: nn.Conv1d) -> None:
        super().__init__()
        self.size = conv.stride[0]
        self.kernel_DK = unfolded(conv.weight.data)

    def forward(self, x_BCL: Tensor) -> Tensor:
        rows_BLC = x_BCL.transpose(1, 2)[:, : x_BCL.shape[2] // self.size * self.size]
        return (rows_BLC.unflatten(1, (-1, self.size)).flatten(2) @ self.kernel_DK.T).transpose(1, 2)


def accelerated(bridge: Bridge) -> Bridge:
    """A bridge over the same parameters whose norms, projectors and pooling are the fused ones."""
    fast = Bridge.__new__(Bridge)
    nn.Module.__init__(fast)
    for name, module in bridge.named_children():
        if isinstance(module, RMSNorm):
            module = FastNorm(module)
        elif isinstance(module, Projector):
            module = FastProjector(module)
        elif isinstance(module, nn.Conv1d):
            module = FastPool(module)
        setattr(fast, name, module)
    return fast.eval()
