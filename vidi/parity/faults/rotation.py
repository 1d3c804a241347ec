"""Faults of rotary positions (spec §7)."""

from __future__ import annotations

from typing import Any

import torch

from stageparity.faults.plant import plant
from vidi.attention import rope

SELF = "vidi.decoder.attention.DecomposedAttention.attend_self"
CROSS = "vidi.decoder.attention.DecomposedAttention.attend_stream"


@plant("vidi.attention.rope.inverse_frequencies")
def rope_theta(original: Any) -> Any:
    """Theta 1e6 in place of 1e4."""
    return lambda head_dim, theta, dtype: original(head_dim, 1e6, dtype)


@plant("vidi.attention.rope.inverse_frequencies")
def rope_exponent(original: Any) -> Any:
    """Exponents k/H in place of 2k/H."""
    return lambda head_dim, theta, dtype: original(head_dim, theta, dtype).sqrt()


@plant("vidi.attention.rope.angles")
def rope_angles_interleaved(original: Any) -> Any:
    """Angles written pairwise (a a b b) while heads are turned by halves."""

    def angles(*given: Any) -> Any:
        cos, sin = original(*given)
        half = cos.shape[-1] // 2
        return cos[..., :half].repeat_interleave(2, -1), sin[..., :half].repeat_interleave(2, -1)

    return angles


@plant("vidi.attention.rope.angles")
def rope_cos_and_sin_exchanged(original: Any) -> Any:
    """Cosine and sine exchanged."""
    return lambda *given: original(*given)[::-1]


@plant("vidi.decoder.decoder.Decoder.text_rows[angles]")
def rope_from_one(original: Any) -> Any:
    """Rotation starts at position 1: self-attention is blind to it, the stage is not."""

    def text_rows(self: Any, pos: Any, rows: Any, backend: str, dtype: Any) -> Any:
        import dataclasses

        late = original(self, pos + 1, rows, backend, dtype)
        return dataclasses.replace(late, pos_BT=pos)

    return text_rows


@plant("vidi.attention.rope.apply")
def rope_pairs(original: Any) -> Any:
    """Neighbours turned against each other (GPT-J) in place of halves."""

    def apply(x: Any, cos: Any, sin: Any) -> Any:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    return apply


@plant("vidi.attention.rope.apply")
def rope_backwards(original: Any) -> Any:
    """Queries turn one way, keys the other."""
    return lambda x, cos, sin: original(x, cos, -sin if x.shape[2] == 2 else sin)


@plant("vidi.attention.rope.apply")
def rope_queries_only(original: Any) -> Any:
    """Keys are not rotated."""
    return lambda x, cos, sin: x if x.shape[2] == 2 else original(x, cos, sin)


@plant("vidi.attention.rope.apply")
def rope_absent(original: Any) -> Any:
    """Nothing is rotated."""
    return lambda x, cos, sin: x


def _rotated(self: Any, x: Any) -> Any:
    places = torch.arange(x.shape[1]).expand(len(x), -1)
    return rope.apply(x, *rope.angles(places, self.config.head_dim, self.config.rope_theta, x.dtype))


@plant(CROSS)
def rope_on_stream(original: Any) -> Any:
    """Queries and stream keys rotated in cross-attention."""
    return lambda self, q, k, v, **rest: original(self, _rotated(self, q), _rotated(self, k), v, **rest)


@plant(CROSS)
def rope_on_stream_keys(original: Any) -> Any:
    """Stream keys alone rotated."""
    return lambda self, q, k, v, **rest: original(self, q, _rotated(self, k), v, **rest)


@plant(CROSS)
def rope_on_stream_queries(original: Any) -> Any:
    """The rotated queries of self-attention read the streams."""
    return lambda self, q, k, v, **rest: original(self, _rotated(self, q), k, v, **rest)


@plant(SELF)
def values_rotated(original: Any) -> Any:
    """Values of the text rotated as well."""
    return lambda self, q, k, v, **rest: original(self, q, k, _rotated(self, v), **rest)


@plant("vidi.decoder.decoder.Decoder.text_rows")
def two_tokens_a_position(original: Any) -> Any:
    """Two tokens share a position."""
    return lambda self, pos, *rest: original(self, pos // 2, *rest)
