"""What the fast path keeps between steps: flat keys and values of all stream tokens, and a text cache of fixed size.

The cross cache has no padding: tokens of all samples and both modalities stand in one row, visual before audio within a
sample, and spans say whose they are. Keys and values of a token lie side by side, as one product writes them.

Dims: L layers, B samples, S tokens or text capacity, X = 2·G·H, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vidi.attention import rope
from vidi.config import DecoderConfig
from vidi.fast import plan
from vidi.fast.operands import Rotation
from vidi.fast.plan import Plan

__all__ = ["FastCache", "Span", "spans_of"]

Span = tuple[int, int]


def spans_of(lengths: Mapping[str, Sequence[int]]) -> tuple[dict[str, list[Span]], int]:
    """Kept tokens per modality and sample -> their (first, stop) in the flat row, and the row's length."""
    spans: dict[str, list[Span]] = {modality: [] for modality in lengths}
    at = 0
    for b in range(max((len(x) for x in lengths.values()), default=0)):
        for modality, counts in lengths.items():
            spans[modality].append((at, at + counts[b]))
            at += counts[b]
    return spans, at


@dataclass
class FastCache:
    """cross_SX: per layer, keys, then values of stream tokens (one tensor a layer: 43 GB in one piece would find no room
    between what came before). text_L2BSGH: rotated keys and values of the text.

    lengths_B: tokens of each row so far (device). rotation: of every position of the capacity. plans: how the keys of each
    sample are split. step: the captured decoding step, made by the first one (`vidi.fast.step.Step`).
    """

    cross_SX: Sequence[Tensor]
    spans: dict[str, list[Span]]
    text_L2BSGH: Tensor
    lengths_B: Tensor
    rotation: Rotation
    plans: list[Plan]
    held: int = 0  # tokens of the longest row so far, as the host counts them
    step: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    @classmethod
    def empty(
        cls,
        config: DecoderConfig,
        lengths_B: Tensor,
        capacity: int,
        cross_SX: Sequence[Tensor],
        spans: dict[str, list[Span]],
    ) -> FastCache:
        """Room for ``capacity`` text tokens a row beside the stream's keys and values, which may still be unwritten."""
        dtype, device, samples = cross_SX[0].dtype, cross_SX[0].device, len(lengths_B)
        shape = (config.num_layers, 2, samples, capacity, config.num_kv_heads, config.head_dim)
        pos_1S = torch.arange(capacity, device=device)[None]
        cos_1SH, sin_1SH = rope.angles(pos_1S, config.head_dim, config.rope_theta, dtype)
        nothing = [(0, 0)] * samples
        visual, audio = spans.get("v", nothing), spans.get("a", nothing)
        return cls(
            cross_SX=cross_SX,
            spans=spans,
            text_L2BSGH=torch.zeros(shape, dtype=dtype, device=device),
            lengths_B=lengths_B,
            rotation=Rotation(cos_1SH[0], sin_1SH[0]),
            plans=[plan.make(capacity, visual[b], audio[b], device) for b in range(samples)],
        )

    @property
    def capacity(self) -> int:
        return self.text_L2BSGH.shape[3]
