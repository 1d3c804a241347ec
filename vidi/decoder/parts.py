"""The steps in which a Gemma 2 and a Mistral decoder differ (spec §6-§8), chosen once by the configuration.

Dims: B samples, T text tokens, L stream tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.nn.functional as nnf
from torch import Tensor, nn

from vidi import precision
from vidi.decoder.norm import GemmaNorm, PlainNorm
from vidi.tap import Tap

__all__ = ["PARTS", "Parts"]


@dataclass(frozen=True)
class Parts:
    """norm: of the decoder, built from (width, eps). after: the norm of what attention and feed-forward give back; Identity
    where there is none. activation: of the feed-forward. join: (x, outputs, norm) -> x. scaled: text and streams on their
    way in. tied: the head is the embedding. finish: raw logits -> logits, with the final cap.
    """

    norm: Callable[[int, float], Any]
    after: Callable[[int, float], Any]
    activation: Callable[[Tensor], Tensor]
    join: Callable[[Tensor, Sequence[Tensor], nn.Module], Tensor]
    scaled: Callable[[Tensor], Tensor]
    tied: bool
    finish: Callable[[Tensor, Tap], Tensor]


# ---- Gemma 2 --------------------------------------------------------------------------------------------------------


def _sum_then_norm(x_BLD: Tensor, outputs: Sequence[Tensor], norm: nn.Module) -> Tensor:
    """x + norm((self + visual) + audio)."""
    mixed_BLD = outputs[0]
    for output_BLD in outputs[1:]:
        mixed_BLD = mixed_BLD + output_BLD
    return x_BLD + norm(mixed_BLD)


def _scaled(x: Tensor) -> Tensor:
    """x · sqrt(D), the factor rounded to the model's dtype."""
    return x * precision.sqrt_in(x.shape[-1], x.dtype)


# ---- Mistral --------------------------------------------------------------------------------------------------------


def _one_by_one(x_BLD: Tensor, outputs: Sequence[Tensor], norm: nn.Module) -> Tensor:
    """((x + self) + visual) + audio."""
    for output_BLD in outputs:
        x_BLD = x_BLD + output_BLD
    return x_BLD


def _wide(raw_BTV: Tensor, tap: Tap) -> Tensor:
    """In at least float32 whatever the model's dtype."""
    return precision.at_least_float32(tap("lm_head", raw_BTV))


PARTS = {
    "gemma2": Parts(
        norm=GemmaNorm,
        after=GemmaNorm,
        activation=partial(nnf.gelu, approximate="tanh"),
        join=_sum_then_norm,
        scaled=_scaled,
        tied=True,
        finish=lambda raw_BTV, tap: raw_BTV,
    ),
    "mistral": Parts(
        norm=PlainNorm,
        after=lambda width, eps: nn.Identity(),
        activation=nnf.silu,
        join=_one_by_one,
        scaled=lambda x: x,
        tied=False,
        finish=_wide,
    ),
}
