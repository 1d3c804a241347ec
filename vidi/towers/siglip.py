"""SigLIP2 vision tower, read at hidden state -2 (spec §1, §3.1).

Dims: F frames, S image side in pixels, L patches (row by row), C width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi.config import VisionConfig
from vidi.towers.layer import TowerLayer

__all__ = ["UnusedHead", "VisionTower", "check_frames", "gelu_tanh"]


def gelu_tanh(x: Tensor) -> Tensor:
    return nnf.gelu(x, approximate="tanh")


def check_frames(images_F3SS: Tensor, config: VisionConfig) -> None:
    """Raises ValueError for frames of another size than the tower's."""
    size, channels = config.image_size, config.num_channels
    if images_F3SS.shape[1:] != (channels, size, size):
        raise ValueError(
            f"frames of {tuple(images_F3SS.shape[1:])} given; the tower reads ({channels}, {size}, {size})"
        )


class UnusedHead(nn.Module):
    """The tower's last norm and pooling head: weights of the checkpoint that feed nothing, carried so that a saved
    checkpoint is complete."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.post_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.probe = nn.Parameter(torch.zeros(1, 1, width))
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, width)


class VisionTower(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embed = nn.Conv2d(config.num_channels, width, config.patch_size, stride=config.patch_size)
        self.position = nn.Embedding(config.patches_per_side**2, width)
        self.layers = nn.ModuleList(
            TowerLayer(
                width, config.num_heads, config.intermediate_size, config.layer_norm_eps, gelu_tanh, key_bias=True
            )
            for _ in range(config.num_layers)
        )
        self.unused = UnusedHead(config)

    def forward(self, images_F3SS: Tensor, backend: str = "eager") -> Tensor:
        """(F, 3, S, S) in [-1, 1] -> (F, L, C): the output of the last layer but one, without a norm.

        The last layer is part of the checkpoint and never computed (§10). Raises ValueError for another image size.
        """
        check_frames(images_F3SS, self.config)
        x_FLC = self.patch_embed(images_F3SS).flatten(2).transpose(1, 2) + self.position.weight
        for layer in self.layers[:-1]:
            x_FLC = layer(x_FLC, backend)
        return x_FLC
