"""Both towers over large batches: fused q, k, v; activation in the product's epilogue; residual and norm in one pass.

Dims: F frames or pieces, L positions, R = F·L rows, C width, S image side.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi import precision
from vidi.fast import ops, weights
from vidi.fast.weights import TowerWeights
from vidi.inputs import pixels
from vidi.towers.siglip import VisionTower
from vidi.towers.whisper import AudioTower

__all__ = ["FastAudioTower", "FastVisionTower", "run_layers"]


def run_layers(
    x_RC: Tensor,
    length: int,
    layers: Sequence[TowerWeights],
    eps: float,
    *,
    exact_gelu: bool,
    last_norm: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """All layers over rows of sequences of ``length`` (R, C), used up; the sum after them, or its last norm.

    Branches are added to the residual by the product itself. Their biases are not: they wait in one vector, which each
    norm adds as it reads. So a norm reads one tensor and writes one.
    """
    op, width = ops.pick(x_RC.device), x_RC.shape[1]
    n_RC = torch.empty_like(x_RC)
    inner_RI = x_RC.new_empty(len(x_RC), layers[0].fc1[0].shape[0])
    pending_C = precision.at_least_float32(torch.zeros_like(x_RC[0]))
    for w in layers:
        op.layer_norm(x_RC, pending_C, w.norm1, eps, n_RC)
        qkv_RX = torch.addmm(w.qkv[1], n_RC, w.qkv[0].T)
        q, k, v = qkv_RX.view(-1, length, 3, w.num_heads, width // w.num_heads).permute(2, 0, 3, 1, 4)
        heads_FNLH = nnf.scaled_dot_product_attention(q, k, v, scale=w.scale)
        x_RC.addmm_(heads_FNLH.transpose(1, 2).reshape(x_RC.shape), w.out[0].T)
        pending_C = pending_C + w.out[1]
        op.layer_norm(x_RC, pending_C, w.norm2, eps, n_RC)
        op.gelu_product(n_RC, *w.fc1, exact_gelu, inner_RI)
        x_RC.addmm_(inner_RI, w.fc2[0].T)
        pending_C = pending_C + w.fc2[1]
    op.layer_norm(x_RC, pending_C, last_norm, eps, n_RC)
    return n_RC


class FastVisionTower:
    """As `VisionTower`, over one batch of frames; uint8 pixels pass through the table after they are cut to patches."""

    def __init__(self, tower: VisionTower) -> None:
        self.config, self.position_LC = tower.config, tower.position.weight.data
        self.layers = [weights.tower_layer(layer) for layer in tower.layers[:-1]]
        # A row of 588 bf16 values is no multiple of 16 bytes, which products want: padded with zeros.
        kernel_CK = tower.patch_embed.weight.data.flatten(1)
        self.kernel_CK = nnf.pad(kernel_CK, (0, -kernel_CK.shape[1] % 8))
        assert tower.patch_embed.bias is not None
        self.bias_C = tower.patch_embed.bias.data

    def __call__(self, images_F3SS: Tensor) -> Tensor:
        """(F, 3, S, S), uint8 or normalised -> (F, L, C)."""
        frames, length, config = len(images_F3SS), len(self.position_LC), self.config
        side, patch = config.patches_per_side, config.patch_size
        if images_F3SS.shape[1:] != (config.num_channels, config.image_size, config.image_size):
            raise ValueError(
                f"frames of {tuple(images_F3SS.shape[1:])} given; the tower reads "
                f"({config.num_channels}, {config.image_size}, {config.image_size})"
            )
        device, dtype = self.kernel_CK.device, self.kernel_CK.dtype
        cut = images_F3SS.to(device)[:, :, : side * patch, : side * patch]
        patches = cut.unflatten(3, (side, patch)).unflatten(2, (side, patch)).permute(0, 2, 4, 1, 3, 5)
        patches_RK = pixels.normalize(patches.reshape(frames * length, -1), dtype, device)
        patches_RK = nnf.pad(patches_RK, (0, self.kernel_CK.shape[1] - patches_RK.shape[1]))
        x_RC = torch.addmm(self.bias_C, patches_RK, self.kernel_CK.T)
        x_RC.view(frames, length, -1).add_(self.position_LC)
        x_RC = run_layers(x_RC, length, self.layers, config.layer_norm_eps, exact_gelu=False, last_norm=None)
        return x_RC.view(frames, length, -1)


class FastAudioTower:
    """As `AudioTower`, over one batch of pieces."""

    def __init__(self, tower: AudioTower) -> None:
        self.tower, self.config = tower, tower.config
        self.layers = [weights.tower_layer(layer) for layer in tower.layers]

    def __call__(self, mel_PML: Tensor) -> Tensor:
        """(P, M, mel frames) -> (P, L, C), after the last norm."""
        tower, config = self.tower, self.config
        if mel_PML.shape[1:] != (config.num_mel_bins, config.mel_frames):
            raise ValueError(
                f"log-mel of {tuple(mel_PML.shape[1:])} given; the tower reads ({config.num_mel_bins}, {config.mel_frames})"
            )
        x = nnf.gelu(tower.conv2(nnf.gelu(tower.conv1(mel_PML)))).transpose(1, 2) + tower.position.weight
        pieces, length = x.shape[:2]
        last_norm = (tower.norm.weight.data, tower.norm.bias.data)
        x_RC = run_layers(
            x.reshape(pieces * length, -1),
            length,
            self.layers,
            config.layer_norm_eps,
            exact_gelu=True,
            last_norm=last_norm,
        )
        return x_RC.view(pieces, length, -1)


def even_chunks(total: int, most: int) -> Iterator[slice]:
    """[0, total) in as few and as even slices as a length of at most ``most`` allows."""
    pieces = -(-total // most)
    size = -(-total // max(pieces, 1))
    return (slice(at, min(at + size, total)) for at in range(0, total, max(size, 1)))
