"""Both towers over large batches: fused q, k, v; activation in the product's epilogue; residual and norm in one pass.

Dims: F frames or pieces, L positions, R = F·L rows, C width, S image side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi import precision
from vidi.fast import ops, weights
from vidi.fast.operands import Affine, LayerNorm
from vidi.fast.weights import TowerWeights
from vidi.inputs import pixels
from vidi.towers.siglip import VisionTower, check_frames
from vidi.towers.whisper import AudioTower, check_pieces

__all__ = ["FastAudioTower", "FastVisionTower", "run_layers"]


def run_layers(
    x_RC: Tensor,
    length: int,
    layers: Sequence[TowerWeights],
    *,
    exact_gelu: bool,
    last_norm: LayerNorm | None,
) -> Tensor:
    """All layers over rows of sequences of ``length`` (R, C), used up; the sum after them, or its last norm.

    Branches are added to the residual by the product itself. Their biases are not: they wait in one vector, which each
    norm adds as it reads. So a norm reads one tensor and writes one.
    """
    op, width = ops.pick(x_RC.device), x_RC.shape[1]
    n_RC = torch.empty_like(x_RC)
    inner_RI = x_RC.new_empty(len(x_RC), len(layers[0].fc1.bias_I))
    pending_C = precision.at_least_float32(torch.zeros_like(x_RC[0]))
    for w in layers:
        op.layer_norm(x_RC, pending_C, w.norm1, n_RC)
        qkv_RX = torch.addmm(w.qkv.bias_I, n_RC, w.qkv.weight_IC.T)
        q, k, v = qkv_RX.view(-1, length, 3, w.num_heads, width // w.num_heads).permute(2, 0, 3, 1, 4)
        heads_FNLH = nnf.scaled_dot_product_attention(q, k, v, scale=w.scale)
        x_RC.addmm_(heads_FNLH.transpose(1, 2).reshape(x_RC.shape), w.out.weight_IC.T)
        pending_C = pending_C + w.out.bias_I
        op.layer_norm(x_RC, pending_C, w.norm2, n_RC)
        op.gelu_product(n_RC, w.fc1, exact_gelu, inner_RI)
        x_RC.addmm_(inner_RI, w.fc2.weight_IC.T)
        pending_C = pending_C + w.fc2.bias_I
    op.layer_norm(x_RC, pending_C, last_norm, n_RC)
    return n_RC


class FastVisionTower:
    """As `VisionTower`, over one batch of frames; uint8 pixels pass through the table as they are cut to patches."""

    def __init__(self, tower: VisionTower) -> None:
        self.config, self.position_LC = tower.config, tower.position.weight.data
        self.layers = [weights.tower_layer(layer) for layer in tower.layers[:-1]]
        # A row of 588 bf16 values is no multiple of 16 bytes, which products want: padded with zeros.
        kernel_CK = tower.patch_embed.weight.data.flatten(1)
        self.kernel_CK = nnf.pad(kernel_CK, (0, -kernel_CK.shape[1] % 8))
        assert tower.patch_embed.bias is not None
        self.bias_C = tower.patch_embed.bias.data
        self.table_256 = pixels.table().to(kernel_CK)

    def __call__(self, images_F3SS: Tensor) -> Tensor:
        """(F, 3, S, S), uint8 or normalised -> (F, L, C)."""
        check_frames(images_F3SS, self.config)
        frames, length = len(images_F3SS), len(self.position_LC)
        patches_RK = self._patches(images_F3SS.to(self.kernel_CK.device))
        x_RC = torch.addmm(self.bias_C, patches_RK, self.kernel_CK.T)
        x_RC.view(frames, length, -1).add_(self.position_LC)
        x_RC = run_layers(x_RC, length, self.layers, exact_gelu=False, last_norm=None)
        return x_RC.view(frames, length, -1)

    def _patches(self, images_F3SS: Tensor) -> Tensor:
        side, patch = self.config.patches_per_side, self.config.patch_size
        if images_F3SS.dtype == torch.uint8:
            out_RK = self.kernel_CK.new_empty(len(images_F3SS) * side**2, self.kernel_CK.shape[1])
            op = ops.pick(out_RK.device)
            op.cut_patches(images_F3SS.contiguous(), self.table_256, patch, side, out_RK)
            return out_RK
        rows = nnf.unfold(images_F3SS.to(self.kernel_CK.dtype), patch, stride=patch).transpose(1, 2).flatten(0, 1)
        return nnf.pad(rows, (0, self.kernel_CK.shape[1] - rows.shape[1]))


class FastAudioTower:
    """As `AudioTower`, over one batch of pieces; its convolutions are products over unfolded windows."""

    def __init__(self, tower: AudioTower) -> None:
        self.config, self.position_LC = tower.config, tower.position.weight.data
        self.layers = [weights.tower_layer(layer) for layer in tower.layers]
        self.convolutions = [_convolution(tower.conv1), _convolution(tower.conv2)]
        self.last_norm = weights.layer_norm(tower.norm)

    def __call__(self, mel_PML: Tensor) -> Tensor:
        """(P, M, mel frames) -> (P, L, C), after the last norm."""
        check_pieces(mel_PML, self.config)
        op, pieces, x_PLC = ops.pick(mel_PML.device), len(mel_PML), mel_PML.transpose(1, 2)
        for kernel, stride in self.convolutions:
            windows = nnf.pad(x_PLC, (0, 0, 1, 1)).unfold(1, 3, stride).transpose(2, 3)
            rows_RK = windows.reshape(-1, kernel.weight_IC.shape[1])
            x_RC = rows_RK.new_empty(len(rows_RK), len(kernel.bias_I))
            op.gelu_product(rows_RK, kernel, True, x_RC)
            x_PLC = x_RC.view(pieces, -1, x_RC.shape[1])
        x_PLC += self.position_LC
        length = x_PLC.shape[1]
        x_RC = run_layers(x_PLC.flatten(0, 1), length, self.layers, exact_gelu=True, last_norm=self.last_norm)
        return x_RC.view(pieces, length, -1)


def _convolution(conv: nn.Conv1d) -> tuple[Affine, int]:
    """Matrix over windows with its bias, and the stride."""
    assert conv.bias is not None
    return Affine(unfolded(conv.weight.data), conv.bias.data), conv.stride[0]


def unfolded(weight_CIK: Tensor) -> Tensor:
    """Weights of a convolution along time (C, I, K) as a matrix over windows (K, I): (C, K·I)."""
    return weight_CIK.transpose(1, 2).flatten(1).contiguous()


def even_chunks(total: int, most: int) -> Iterator[slice]:
    """[0, total) in as few and as even slices as a length of at most ``most`` allows."""
    pieces = -(-total // most)
    size = -(-total // max(pieces, 1))
    return (slice(at, min(at + size, total)) for at in range(0, total, max(size, 1)))
