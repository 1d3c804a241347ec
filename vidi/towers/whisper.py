"""Whisper encoder (spec §1, §4.1).

Dims: P pieces, M mel bins, L positions of the tower (half the mel frames), C width.
"""

from __future__ import annotations

import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi.config import AudioConfig
from vidi.towers.layer import TowerLayer

__all__ = ["AudioTower", "check_pieces"]


def check_pieces(mel_PML: Tensor, config: AudioConfig) -> None:
    """Raises ValueError for pieces of another length than the tower's."""
    bins, frames = config.num_mel_bins, config.mel_frames
    if mel_PML.shape[1:] != (bins, frames):
        raise ValueError(f"log-mel of {tuple(mel_PML.shape[1:])} given; the tower reads pieces of ({bins}, {frames})")


class AudioTower(nn.Module):
    def __init__(self, config: AudioConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.position = nn.Embedding(config.max_source_positions, width)
        self.layers = nn.ModuleList(
            TowerLayer(
                width, config.num_heads, config.intermediate_size, config.layer_norm_eps, nnf.gelu, key_bias=False
            )
            for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def forward(self, mel_PML: Tensor, backend: str = "eager") -> Tensor:
        """Log-mel pieces (P, M, 2L) -> (P, L, C), after the last LayerNorm. Raises ValueError for another piece length."""
        check_pieces(mel_PML, self.config)
        x = nnf.gelu(self.conv1(mel_PML))
        x = nnf.gelu(self.conv2(x)).transpose(1, 2) + self.position.weight
        for layer in self.layers:
            x = layer(x, backend)
        return self.norm(x)
