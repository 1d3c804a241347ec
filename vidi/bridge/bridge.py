"""The weights between towers and decoder (spec §1: bridge). What is done with them: `visual.py`, `audio.py`."""

from __future__ import annotations

from torch import nn

from vidi.bridge.conv_pool import ConvPool
from vidi.bridge.fold import Fold
from vidi.bridge.norm import RMSNorm
from vidi.bridge.position import PositionEmbedding
from vidi.bridge.projector import Projector
from vidi.config import VidiConfig

__all__ = ["Bridge"]

GRIDS: dict[str, type[Fold] | type[ConvPool]] = {"fold": Fold, "conv": ConvPool}


class Bridge(nn.Module):
    """Both modalities share the time embedding and the last norm."""

    image_grid: Fold | ConvPool

    def __init__(self, config: VidiConfig) -> None:
        super().__init__()
        width, pool = config.decoder.hidden_size, config.image_pool_size
        self.image_grid = GRIDS[config.image_grid](config)
        self.image_projector = Projector(self.image_grid.channels, width)
        self.image_norm = RMSNorm(width)
        rounded = config.positions_rounded
        self.pos_h = PositionEmbedding(width, pool, rounded)
        self.pos_w = PositionEmbedding(width, pool, rounded)
        self.pos_t = PositionEmbedding(width, config.time_interval, rounded)
        heard = config.audio.hidden_size
        pooled = config.audio_pool_width
        self.audio_pool = nn.Conv1d(heard, pooled, config.audio_pool_size, stride=config.audio_pool_size, bias=False)
        self.audio_projector = Projector(pooled, width)
        self.audio_norm = RMSNorm(width)
        self.llm_norm = RMSNorm(width, init=config.norm_std)
