"""The weights between towers and decoder (spec §1: bridge). What is done with them: `visual.py`, `audio.py`."""

from __future__ import annotations

from torch import nn

from vidi.bridge.norm import RMSNorm
from vidi.bridge.position import PositionEmbedding
from vidi.bridge.projector import Projector
from vidi.config import VidiConfig

__all__ = ["Bridge"]


class Bridge(nn.Module):
    """Both modalities share the time embedding and the last norm."""

    def __init__(self, config: VidiConfig) -> None:
        super().__init__()
        width, pool = config.decoder.hidden_size, config.image_pool_size
        self.image_projector = Projector(config.vision.hidden_size * pool**2, width)
        self.image_norm = RMSNorm(width)
        self.pos_h = PositionEmbedding(width, pool)
        self.pos_w = PositionEmbedding(width, pool)
        self.pos_t = PositionEmbedding(width, config.time_interval)
        self.audio_pool = nn.Conv1d(
            config.audio.hidden_size, width, config.audio_pool_size, stride=config.audio_pool_size, bias=False
        )
        self.audio_projector = Projector(width, width)
        self.audio_norm = RMSNorm(width)
        self.llm_norm = RMSNorm(width, init=config.norm_std)
