"""Keys and values kept between decoding steps (spec §7): text grows by a token a step, streams are written once.

Heads are stored un-repeated. Sliding layers keep all text keys too: which of them a query sees is a matter of positions
(`attention.mask`), so cached and uncached decoding follow one rule, and a text is short beside 60,000 visual tokens.

Dims: B samples, S text capacity, T new tokens, L stream tokens, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.config import DecoderConfig

__all__ = ["Cache", "CrossKeys", "LayerTextCache"]


@dataclass(frozen=True)
class CrossKeys:
    """One modality's keys and values for one layer, heads not repeated, and which of them are kept."""

    k_BLGH: Tensor
    v_BLGH: Tensor
    rows: Rows


@dataclass(frozen=True)
class LayerTextCache:
    """One layer's rotated keys and values of the text; key s of a row stands at position s."""

    k_BSGH: Tensor
    v_BSGH: Tensor

    def extend(self, k_BTGH: Tensor, v_BTGH: Tensor, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values at their positions; return all, (B, S, G, H) each.

        What stands beyond a row's own length is never seen: it is zero or a padded token, overwritten when its turn comes.
        """
        for held, new in ((self.k_BSGH, k_BTGH), (self.v_BSGH, v_BTGH)):
            index = pos_BT[:, :, None, None].expand_as(new)
            held.scatter_(1, index, new)
        return self.k_BSGH, self.v_BSGH


@dataclass
class Cache:
    """All layers' text keys and values, and each modality's keys and values per layer.

    lengths_B: tokens that each row holds so far; the next token of row b stands at position lengths_B[b].
    """

    text: list[LayerTextCache]
    lengths_B: Tensor
    cross: list[Mapping[str, CrossKeys]] = field(default_factory=list)

    @classmethod
    def empty(
        cls, config: DecoderConfig, lengths_B: Tensor, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> Cache:
        shape = (len(lengths_B), capacity, config.num_kv_heads, config.head_dim)

        def zeros() -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls([LayerTextCache(zeros(), zeros()) for _ in range(config.num_layers)], lengths_B)

    @property
    def capacity(self) -> int:
        return self.text[0].k_BSGH.shape[1]
