"""The decoder with decomposed attention (spec §7): text attends to itself, to the visual and to the audio stream.

The streams never see the text, so they are carried through all layers first (`carry_stream`), leaving each layer's keys
and values; the text then passes over them (`run_text`), as often as decoding wants.

Dims: B batch, T text tokens, L stream tokens, N query heads, G key/value heads, H head dim, D width.
"""

from dataclasses import dataclass

import numpy as np

from .case import Sizes, Trace, Weights
from .casts import Arithmetic
from .pointwise import gelu_tanh, rsqrt, softcap, softmax_average
from .unpad import trace_unpadded

__all__ = ["StreamLayer", "attend", "carry_stream", "gemma_norm", "rope_tables", "run_text", "scaled", "window_mask"]


@dataclass(frozen=True)
class StreamLayer:
    """What one layer's cross-attention needs of a stream: its keys and values before the layer, and the kept tokens."""

    k_BGLH: np.ndarray
    v_BGLH: np.ndarray
    keep_BL: np.ndarray


def scaled(ar: Arithmetic, sizes: Sizes, x: np.ndarray) -> np.ndarray:
    """x times sqrt(D), the factor itself rounded to the model's dtype: 59.75 at D 3584 in bf16 (§6)."""
    return ar.store(x * ar.store(np.array(sizes.width, np.float64) ** 0.5))


def gemma_norm(ar: Arithmetic, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x32·rsqrt(mean(x32²)+eps)·(1+weight32), all in float32, stored."""
    wide = ar.widen(x)
    normed = wide * rsqrt(ar.mean(wide * wide) + ar.wide(eps)) * (ar.wide(1) + ar.widen(weight))
    return ar.store(normed.astype(ar.work))


def rope_tables(ar: Arithmetic, sizes: Sizes, length: int, trace: Trace) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin (1, T, H) for positions 0 … T-1; the H/2 angles stand twice. Frequencies and angles in float32."""
    powers = np.arange(0, sizes.head_dim, 2, dtype=np.float64) / sizes.head_dim
    freq = ar.wide(1) / ar.widen(float(sizes.rope_theta) ** powers)  # a quotient: float32 rounds twice
    positions = np.arange(length, dtype=np.int64)[None]
    trace.put("rope.position_ids", positions)
    angles = np.concatenate([positions[..., None].astype(ar.wide) * freq] * 2, axis=-1).astype(np.float64)
    cos, sin = (ar.store(turn(angles).astype(ar.wide).astype(ar.work)) for turn in (np.cos, np.sin))
    return trace.put("rope.cos", cos), trace.put("rope.sin", sin)


def window_mask(length: int, window: int | None) -> np.ndarray:
    """(T, T), True = attend: query i sees keys i-w … i, w+1 of them, or 0 … i without a window. For w = 2:

    1 . . . .
    1 1 . . .
    1 1 1 . .
    . 1 1 1 .
    . . 1 1 1
    """
    behind = np.arange(length)[:, None] - np.arange(length)[None, :]
    return (behind >= 0) & (behind <= (length if window is None else window))


def attend(
    ar: Arithmetic, sizes: Sizes, q_BNTH: np.ndarray, k_BGLH: np.ndarray, v_BGLH: np.ndarray, keep: np.ndarray
) -> np.ndarray:
    """cap·tanh(q·k·scale/cap), softmax over kept keys, times v -> (B, T, N, H). Head n uses kv head n // (N/G).
    keep broadcasts to (B, T, L); a query that keeps no key gives 0. Scores and softmax are not rounded."""
    k_BNLH, v_BNLH = (np.repeat(x, sizes.num_heads // sizes.num_kv_heads, axis=1) for x in (k_BGLH, v_BGLH))
    scores_BNTL = ar.contract(q_BNTH, np.swapaxes(k_BNLH, 2, 3)) * ar.work(sizes.score_scale)
    out_BNTH = softmax_average(ar, softcap(scores_BNTL, sizes.attn_softcap), keep[:, None], v_BNLH)
    return out_BNTH.transpose(0, 2, 1, 3)


def carry_stream(
    ar: Arithmetic, sizes: Sizes, w: Weights, name: str, x_BLD: np.ndarray, keep_BL: np.ndarray, trace: Trace
) -> list[StreamLayer]:
    """The "image" or "audio" stream through every layer; traces it as it enters and as each layer leaves it.

    A stream token attends to itself alone: its attention output is its own value. The last update feeds nothing and is
    computed because the recordings hold it.
    """
    x_BLD = trace.put(f"layer.0.{name}_input", scaled(ar, sizes, x_BLD))
    layers: list[StreamLayer] = []
    for i in range(sizes.num_layers):
        attention = f"model.layers.{i}.self_attn."
        n_BLD = _norm(ar, sizes, w, i, "input_layernorm", x_BLD)
        k_BGLH = _heads(ar.linear(n_BLD, w(attention + "k_proj.weight")), sizes.num_kv_heads)
        v_BGLH = _heads(ar.linear(n_BLD, w(attention + "v_proj.weight")), sizes.num_kv_heads)
        layers.append(StreamLayer(k_BGLH, v_BGLH, keep_BL))
        repeated_BNLH = np.repeat(v_BGLH, sizes.num_heads // sizes.num_kv_heads, axis=1)
        out_BLD = ar.linear(_joined(repeated_BNLH.transpose(0, 2, 1, 3)), w(attention + "o_proj.weight"))
        x_BLD = ar.store(x_BLD + _norm(ar, sizes, w, i, "post_attention_layernorm", out_BLD))
        x_BLD = trace.put(f"layer.{i}.{name}_stream", _feed_forward(ar, sizes, w, i, x_BLD))
    return layers


def run_text(
    ar: Arithmetic,
    sizes: Sizes,
    w: Weights,
    x_BTD: np.ndarray,
    keep_BT: np.ndarray,
    streams: dict[str, list[StreamLayer]],
    trace: Trace,
) -> np.ndarray:
    """Embeddings (B, T, D) before the sqrt(D) factor -> (B, T, D) after the last layer. `streams` maps "v" and "a" to
    the layers of `carry_stream`; a modality that the batch lacks is not a key and leaves no t2v or t2a stage."""
    x_BTD = scaled(ar, sizes, x_BTD)
    cos, sin = rope_tables(ar, sizes, x_BTD.shape[1], trace)
    for i in range(sizes.num_layers):
        x_BTD = trace.put(f"layer.{i}.input", x_BTD)
        attention = f"model.layers.{i}.self_attn."
        n_BTD = _norm(ar, sizes, w, i, "input_layernorm", x_BTD)
        q_BNTH = _heads(ar.linear(n_BTD, w(attention + "q_proj.weight")), sizes.num_heads)
        k_BGTH = _heads(ar.linear(n_BTD, w(attention + "k_proj.weight")), sizes.num_kv_heads)
        v_BGTH = _heads(ar.linear(n_BTD, w(attention + "v_proj.weight")), sizes.num_kv_heads)

        causal_TT = window_mask(x_BTD.shape[1], sizes.window if i % 2 == 0 else None)
        keep_BTT = causal_TT[None] & keep_BT[:, None, :] & keep_BT[:, :, None]
        own_BTNH = attend(ar, sizes, _rotated(ar, q_BNTH, cos, sin), _rotated(ar, k_BGTH, cos, sin), v_BGTH, keep_BTT)
        added_BTD = trace.put(f"layer.{i}.t2t", ar.linear(_joined(own_BTNH), w(attention + "o_proj.weight")))

        for modality, layers in streams.items():
            stream, stage = layers[i], f"layer.{i}.t2{modality}"
            keep_BTL = keep_BT[:, :, None] & stream.keep_BL[:, None, :]
            out_BTNH = attend(ar, sizes, q_BNTH, stream.k_BGLH, stream.v_BGLH, keep_BTL)
            if i in (0, sizes.num_layers - 1):
                _trace_cross(ar, sizes, f"xattn.{i}.{modality}", q_BNTH, stream, keep_BT, out_BTNH, trace)
            cross_BTD = trace.put(stage, ar.linear(_joined(out_BTNH), w(attention + "o_proj.weight")))
            trace.put(f"{stage}.gate", np.asarray(stream.keep_BL.any(axis=1)))
            added_BTD = ar.store(added_BTD + cross_BTD)  # (self + vis) + aud, in this order

        x_BTD = ar.store(x_BTD + _norm(ar, sizes, w, i, "post_attention_layernorm", added_BTD))
        x_BTD = trace.put(f"layer.{i}.output", _feed_forward(ar, sizes, w, i, x_BTD))
    return x_BTD


def _feed_forward(ar: Arithmetic, sizes: Sizes, w: Weights, i: int, x: np.ndarray) -> np.ndarray:
    mlp = f"model.layers.{i}.mlp."
    n = _norm(ar, sizes, w, i, "pre_feedforward_layernorm", x)
    gate = ar.store(gelu_tanh(ar.linear(n, w(mlp + "gate_proj.weight"))))
    hidden = ar.store(gate * ar.linear(n, w(mlp + "up_proj.weight")))
    down = ar.linear(hidden, w(mlp + "down_proj.weight"))
    return ar.store(x + _norm(ar, sizes, w, i, "post_feedforward_layernorm", down))


def _norm(ar: Arithmetic, sizes: Sizes, w: Weights, i: int, name: str, x: np.ndarray) -> np.ndarray:
    return gemma_norm(ar, x, w(f"model.layers.{i}.{name}.weight"), sizes.norm_eps)


def _rotated(ar: Arithmetic, x_BNTH: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x·cos + cat(-x₂, x₁)·sin, x₁ and x₂ the halves of a head."""
    first, second = np.split(x_BNTH, 2, axis=-1)
    turned = np.concatenate([-second, first], axis=-1)
    return ar.store(ar.store(x_BNTH * cos[:, None]) + ar.store(turned * sin[:, None]))


def _heads(x_BLX: np.ndarray, heads: int) -> np.ndarray:
    """(B, L, heads·H) -> (B, heads, L, H)"""
    return x_BLX.reshape(*x_BLX.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def _joined(x_BLNH: np.ndarray) -> np.ndarray:
    """(B, L, N, H) -> (B, L, N·H)"""
    return x_BLNH.reshape(*x_BLNH.shape[:2], -1)


def _trace_cross(
    ar: Arithmetic,
    sizes: Sizes,
    stage: str,
    q_BNTH: np.ndarray,
    stream: StreamLayer,
    keep_BT: np.ndarray,
    out_BTNH: np.ndarray,
    trace: Trace,
) -> None:
    repeats = sizes.num_heads // sizes.num_kv_heads
    k_BNLH, v_BNLH = np.repeat(stream.k_BGLH, repeats, axis=1), np.repeat(stream.v_BGLH, repeats, axis=1)
    q_BNTH, k_BNLH, v_BNLH = (
        trace.put(f"{stage}.{part}", x) for part, x in (("q", q_BNTH), ("k", k_BNLH), ("v", v_BNLH))
    )
    trace.put(f"{stage}.q_mask", keep_BT)
    trace.put(f"{stage}.kv_mask", stream.keep_BL)
    if trace.anchored:  # t2v and t2a are fed the layer's input and stream, this stage alone q, k and v
        keep_BTL = keep_BT[:, :, None] & stream.keep_BL[:, None, :]
        out_BTNH = attend(ar, sizes, q_BNTH, k_BNLH[:, ::repeats], v_BNLH[:, ::repeats], keep_BTL)
    trace.put(f"{stage}.out", out_BTNH)
    if not (keep_BT.all() and stream.keep_BL.all()):
        trace_unpadded(f"{stage}.unpad", q_BNTH, k_BNLH, v_BNLH, keep_BT, stream.keep_BL, trace)
