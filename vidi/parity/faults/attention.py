"""Faults of attention: scores, window, heads (spec §7)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stageparity.faults.plant import plant

SELF = "vidi.decoder.attention.DecomposedAttention.attend_self"
CROSS = "vidi.decoder.attention.DecomposedAttention.attend_stream"
EAGER = "vidi.attention.eager.attend"


def _with(change: Any, use: str) -> Any:
    """Eager attention with other options, for self or cross-attention only, as ``use`` says."""

    def make(original: Any) -> Any:
        def attend(call: Any) -> Any:
            own = "self" if call.q_pos_BT is not None else "cross"
            return original(dataclasses.replace(call, **change(call)) if use == own else call)

        return attend

    return make


def _eager(name: str, what: str, use: str, change: Any, **options: Any) -> Any:
    make = _with(change, use)
    make.__module__, make.__name__, make.__doc__ = __name__, name, what
    return plant(f"{EAGER}[{use}]", **options)(make)


no_softcap_cross = _eager("no_softcap_cross", "No softcap in cross-attention.", "cross", lambda call: {"softcap": None})
no_softcap_self = _eager("no_softcap_self", "No softcap in self-attention.", "self", lambda call: {"softcap": None})
final_softcap_in_attention = _eager(
    "final_softcap_in_attention",
    "The head's softcap (30) in cross-attention (50).",
    "cross",
    lambda call: {"softcap": 30.0},
)
softcap_30_self = _eager(
    "softcap_30_self", "The head's softcap (30) in self-attention (50).", "self", lambda call: {"softcap": 30.0}
)
scale_one_percent = _eager(
    "scale_one_percent", "Cross-attention's scale off by 1 %.", "cross", lambda call: {"scale": call.scale * 1.01}
)
scale_of_head_dim = _eager(
    "scale_of_head_dim",
    "Self-attention scaled by the head's width, not by query_pre_attn_scalar.",
    "self",
    lambda call: {"scale": call.q_BTNH.shape[-1] ** -0.5},
)
scale_of_head_dim_cross = _eager(
    "scale_of_head_dim_cross",
    "Cross-attention scaled by the head's width, not by query_pre_attn_scalar.",
    "cross",
    lambda call: {"scale": call.q_BTNH.shape[-1] ** -0.5},
)
scale_twice = _eager(
    "scale_twice", "Queries of self-attention scaled twice.", "self", lambda call: {"scale": call.scale**2}
)
scale_missing_cross = _eager(
    "scale_missing_cross", "Cross-attention without a scale.", "cross", lambda call: {"scale": 1.0}
)
not_causal = _eager(
    "not_causal",
    "Self-attention sees the future.",
    "self",
    lambda call: {"q_pos_BT": None, "window": None},
)
cross_causal = _eager(
    "cross_causal",
    "Cross-attention causal: query i sees stream tokens up to i.",
    "cross",
    lambda call: {"q_pos_BT": torch.arange(call.q_BTNH.shape[1]).expand(len(call.q_BTNH), -1)},
)
window_missing = _eager("window_missing", "No sliding window.", "self", lambda call: {"window": None})
query_positions_late = _eager(
    "query_positions_late",
    "Queries stand one position late: each sees its successor.",
    "self",
    lambda call: {"q_pos_BT": call.q_pos_BT + 1},
)


@plant("vidi.attention.mask.sees")
def window_one_short(original: Any) -> Any:
    """w keys in place of w + 1."""
    return lambda q, k, window=None: original(q, k, window if window is None else window - 1)


@plant("vidi.attention.mask.sees")
def window_one_long(original: Any) -> Any:
    """w + 2 keys in place of w + 1."""
    return lambda q, k, window=None: original(q, k, window if window is None else window + 1)


@plant("vidi.attention.mask.sees")
def causal_strict(original: Any) -> Any:
    """A query does not see itself."""
    return lambda q, k, window=None: original(q - 1, k, window)


@plant("vidi.attention.mask.sees")
def window_of_chunks(original: Any) -> Any:
    """The window is a block: a query sees the keys of its own block of w + 1."""

    def sees(q: Any, k: Any, window: int | None = None) -> Any:
        keep = original(q, k)
        return keep if window is None else keep & (q[:, :, None] // (window + 1) == k // (window + 1))

    return sees


@plant("model.decoder.layers.1.window")
def window_on_odd_layer(original: Any) -> Any:
    """The window on an odd layer too."""
    return 3


@plant("model.decoder.layers.2.window")
def window_missing_later(original: Any) -> Any:
    """The first layer alone has a window."""
    return None


@plant("vidi.attention.eager.softcapped")
def softcap_before_scale(original: Any) -> Any:
    """The cap acts on scores before their scale."""
    return lambda scores, cap: original(scores * 6**0.5, cap) * 6**-0.5


@plant("vidi.attention.eager.softcapped")
def softcap_sigmoid(original: Any) -> Any:
    """A cap that bends twice as early: cap · tanh(2·scores/cap) / 2."""
    return lambda scores, cap: scores if cap is None else cap / 2 * torch.tanh(2 * scores / cap)


@plant(f"{EAGER}[cross]", case="absent")
def no_key_averages_all(original: Any) -> Any:
    """A sample without any kept token averages its padding in place of adding exactly 0."""

    def attend(call: Any) -> Any:
        out, q, v = original(call), call.q_BTNH, call.v_BSGH
        if call.keep_k is None or call.q_pos_BT is not None:
            return out
        lost = ~call.keep_k.keep_BL.any(1)
        mean = (v.abs().mean(1, keepdim=True) + 1).repeat_interleave(q.shape[2] // v.shape[2], 2)
        return torch.where(lost[:, None, None, None], mean, out)

    return attend


def _tiled(self: Any, x: Any) -> Any:
    """Key/value heads so that query head n reads n % G."""
    heads = self.config.num_heads
    return x[:, :, torch.arange(heads) % x.shape[2]]


@plant(CROSS)
def heads_tiled_cross(original: Any) -> Any:
    """Key/value heads tiled (n % G) in cross-attention, not repeated block-wise."""
    return lambda self, q, k, v, **rest: original(self, q, _tiled(self, k), _tiled(self, v), **rest)


@plant(SELF)
def heads_tiled_self(original: Any) -> Any:
    """Key/value heads tiled (n % G) in self-attention."""
    return lambda self, q, k, v, **rest: original(self, q, _tiled(self, k), _tiled(self, v), **rest)


@plant("vidi.decoder.attention.repeat_heads")
def heads_tiled_stream(original: Any) -> Any:
    """A stream token's own value tiled over heads in place of repeated block-wise."""
    return lambda x, heads: x[:, :, torch.arange(heads) % x.shape[2]]


@plant(CROSS)
def values_of_other_head(original: Any) -> Any:
    """Values of cross-attention in the reverse order of their heads."""
    return lambda self, q, k, v, **rest: original(self, q, k, v.flip(2), **rest)


@plant(CROSS)
def keys_are_values(original: Any) -> Any:
    """Values stand in the place of keys."""
    return lambda self, q, k, v, **rest: original(self, q, v, v, **rest)


@plant("vidi.decoder.attention.DecomposedAttention.output")
def heads_joined_transposed(original: Any) -> Any:
    """Heads joined as (width, heads) before the output projection."""
    return lambda self, heads: original(self, heads.transpose(-1, -2))


@plant("vidi.decoder.attention.DecomposedAttention.output")
def heads_joined_backwards(original: Any) -> Any:
    """Heads joined in reverse order."""
    return lambda self, heads: original(self, heads.flip(-2))


@plant("vidi.decoder.attention.DecomposedAttention.queries")
def query_heads_transposed(original: Any) -> Any:
    """Query heads cut as (width, heads)."""

    def queries(self: Any, n: Any) -> Any:
        return self.q(n).unflatten(-1, (self.config.head_dim, -1)).transpose(-1, -2).contiguous()

    return queries


@plant("vidi.decoder.attention.DecomposedAttention.keys_values")
def keys_and_values_exchanged(original: Any) -> Any:
    """Keys and values exchanged everywhere."""
    return lambda self, n: original(self, n)[::-1]


STREAM = "vidi.decoder.layer.DecoderLayer.text_to_stream"


@plant(f"{STREAM}[queries]")
def stream_queries_backwards(original: Any) -> Any:
    """Query heads read the streams in reverse order."""

    def text_to_stream(self: Any, *given: Any) -> Any:
        queries = type(self.attention).queries
        self.attention.queries = lambda n: queries(self.attention, n).flip(2)
        try:
            return original(self, *given)
        finally:
            del self.attention.queries

    return text_to_stream


@plant("vidi.decoder.layer.DecoderLayer.stream_keys_values[values]")
def stream_values_not_normed(original: Any) -> Any:
    """Stream values read the stream without input norm, its keys with it."""

    def stream_keys_values(self: Any, s: Any) -> Any:
        return original(self, s)[0], self.attention.keys_values(s)[1]

    return stream_keys_values


@plant("vidi.decoder.attention.DecomposedAttention.attend_own_token", case="novideo")
def own_value_heads_backwards(original: Any) -> Any:
    """A sound's tokens read their own values in the reverse order of heads."""
    return lambda self, v: original(self, v.flip(2))
