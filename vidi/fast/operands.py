"""What the fused operations (`ops.Ops`) read, in named parts.

Dims: R rows, D or C width, K branches, T text rows, S keys or text capacity, X = N·H, G key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vidi.fast.plan import Plan

__all__ = [
    "Activation",
    "Affine",
    "GemmaWeight",
    "Head",
    "Keys",
    "LayerNorm",
    "NormWeight",
    "PlainWeight",
    "Queries",
    "Residual",
    "Rotation",
    "Scores",
]

Activation = Literal["gelu_tanh", "silu"]  #: of the decoder's feed-forward


@dataclass(frozen=True)
class Affine:
    """A linear layer with its bias."""

    weight_IC: Tensor
    bias_I: Tensor


@dataclass(frozen=True)
class LayerNorm:
    """A tower's norm."""

    weight_C: Tensor
    bias_C: Tensor
    eps: float


@dataclass(frozen=True)
class GemmaWeight:
    """Gemma's norm: its weight, stored minus one and applied before the cast back, and its epsilon."""

    weight_D: Tensor
    eps: float


@dataclass(frozen=True)
class PlainWeight:
    """Mistral's norm: its weight, applied after the cast back, and its epsilon."""

    weight_D: Tensor
    eps: float


NormWeight = GemmaWeight | PlainWeight


@dataclass(frozen=True)
class Residual:
    """x + post(b0 + b1 + …), or without ``post`` (x + b0) + b1 + …, and how the next product reads the sum: through
    ``following``.

    x, branches: (R, D) and (K, R, D), or (D,) and (K, D) in a decoding step. Without branches x is the sum.
    """

    x: Tensor
    branches: Tensor | None = None
    post: NormWeight | None = None
    following: NormWeight | None = None

    @property
    def eps(self) -> float:
        """One for both norms, as a kernel takes it."""
        (eps,) = {norm.eps for norm in (self.post, self.following) if norm is not None}
        return eps

    @property
    def is_gemma(self) -> bool:
        """Gemma's norms, after the branches too: what the kernels of `kernels/` add and norm."""
        normed = self.branches is None or self.post is not None
        return normed and not any(isinstance(norm, PlainWeight) for norm in (self.post, self.following))


@dataclass(frozen=True)
class Queries:
    """Text rows of one sample before and after rotation, and their positions (int64)."""

    q_TX: Tensor
    rotated_TX: Tensor
    pos_T: Tensor


@dataclass(frozen=True)
class Keys:
    """What these rows attend to: the text cache, key s at position s; and keys, then values, of stream tokens (S, 2·G·H)."""

    k_SGH: Tensor
    v_SGH: Tensor
    cross_SX: Tensor
    plan: Plan


@dataclass(frozen=True)
class Scores:
    """score = cap · tanh(q·k·scale / cap), or q·k·scale without a cap; text sees ``window`` keys behind itself, None = all."""

    scale: float
    cap: float | None
    window: int | None


@dataclass(frozen=True)
class Rotation:
    """Rotary factors of every position of the text's capacity."""

    cos_SH: Tensor
    sin_SH: Tensor


@dataclass(frozen=True)
class Head:
    """logit = cap · tanh(weight · n / cap), or weight · n without a cap; ``dtype`` is that of the logits."""

    weight_VD: Tensor
    cap: float | None
    dtype: torch.dtype
