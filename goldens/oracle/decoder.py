"""The decoder with decomposed attention (spec §7): text attends to itself, to the visual and to the audio stream.

The streams never see the text, so they are carried through all layers first (`carry_stream`), leaving each layer's keys
and values; the text then passes over them (`run_text`), as often as decoding wants.

Dims: B batch, T text tokens, L stream tokens, N query heads, G key/value heads, H head dim, D width.
"""

from dataclasses import dataclass

import numpy as np

from .case import Sizes, Trace, Weights
from .casts import Arithmetic
from .pointwise import softcap, softmax_average
from .unpad import trace_unpadded

__all__ = ["Layer", "StreamLayer", "attend", "carry_stream", "rope_tables", "run_text", "scaled", "window_mask"]


@dataclass(frozen=True)
class StreamLayer:
    """What one layer's cross-attention needs of a stream: its keys and values before the layer, and the kept tokens."""

    k_BGLH: np.ndarray
    v_BGLH: np.ndarray
    keep_BL: np.ndarray


@dataclass(frozen=True)
class Layer:
    """One layer's weights at work, by their official names."""

    ar: Arithmetic
    sizes: Sizes
    w: Weights
    index: int

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.ar.linear(x, self.w(f"model.layers.{self.index}.{name}.weight"))

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.w(f"model.layers.{self.index}.{name}.weight")
        return self.sizes.parts.norm(self.ar, x, weight, self.sizes.norm_eps)

    def mlp(self, x: np.ndarray) -> np.ndarray:
        gate = self.ar.store(self.sizes.parts.activation(self.linear("mlp.gate_proj", x)))
        return self.linear("mlp.down_proj", self.ar.store(gate * self.linear("mlp.up_proj", x)))

    def heads(self, name: str, x_BLD: np.ndarray, heads: int) -> np.ndarray:
        """A projection as (B, heads, L, H)."""
        y_BLX = self.linear(f"self_attn.{name}", x_BLD)
        return y_BLX.reshape(*y_BLX.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    def output(self, x_BLNH: np.ndarray) -> np.ndarray:
        """Heads joined and projected: (B, L, D)."""
        return self.linear("self_attn.o_proj", x_BLNH.reshape(*x_BLNH.shape[:2], -1))


def scaled(ar: Arithmetic, sizes: Sizes, x: np.ndarray) -> np.ndarray:
    """x times the model's factor, itself rounded to the model's dtype: sqrt(D) is 59.75 at D 3584 in bf16 (§6)."""
    return ar.store(x * ar.store(np.array(sizes.embed_factor, np.float64)))


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
    """cap·tanh(q·k·scale/cap) if there is a cap, softmax over kept keys, times v -> (B, T, N, H). Head n uses kv head n // (N/G).
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
        layer = Layer(ar, sizes, w, i)
        n_BLD = layer.norm("input_layernorm", x_BLD)
        k_BGLH, v_BGLH = (layer.heads(f"{part}_proj", n_BLD, sizes.num_kv_heads) for part in "kv")
        layers.append(StreamLayer(k_BGLH, v_BGLH, keep_BL))
        repeated_BNLH = np.repeat(v_BGLH, sizes.num_heads // sizes.num_kv_heads, axis=1)
        x_BLD = sizes.parts.join(layer, x_BLD, [layer.output(repeated_BNLH.transpose(0, 2, 1, 3))])
        x_BLD = trace.put(f"layer.{i}.{name}_stream", sizes.parts.feed_forward(layer, x_BLD))
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
    """Embeddings (B, T, D) before the model's factor -> (B, T, D) after the final norm. `streams` maps "v" and "a" to
    the layers of `carry_stream`; a modality that the batch lacks is not a key and leaves no t2v or t2a stage."""
    x_BTD = scaled(ar, sizes, x_BTD)
    cos, sin = rope_tables(ar, sizes, x_BTD.shape[1], trace)
    for i in range(sizes.num_layers):
        x_BTD = trace.put(f"layer.{i}.input", x_BTD)
        layer = Layer(ar, sizes, w, i)
        n_BTD = layer.norm("input_layernorm", x_BTD)
        q_BNTH = layer.heads("q_proj", n_BTD, sizes.num_heads)
        k_BGTH, v_BGTH = (layer.heads(f"{part}_proj", n_BTD, sizes.num_kv_heads) for part in "kv")

        causal_TT = window_mask(x_BTD.shape[1], sizes.window if i % sizes.windowed_every == 0 else None)
        keep_BTT = causal_TT[None] & keep_BT[:, None, :] & keep_BT[:, :, None]
        own_BTNH = attend(ar, sizes, _rotated(ar, q_BNTH, cos, sin), _rotated(ar, k_BGTH, cos, sin), v_BGTH, keep_BTT)
        outputs = [trace.put(f"layer.{i}.t2t", layer.output(own_BTNH))]

        for modality, held in streams.items():
            stream, stage = held[i], f"layer.{i}.t2{modality}"
            keep_BTL = keep_BT[:, :, None] & stream.keep_BL[:, None, :]
            out_BTNH = attend(ar, sizes, q_BNTH, stream.k_BGLH, stream.v_BGLH, keep_BTL)
            if i in (0, sizes.num_layers - 1):
                _trace_cross(ar, sizes, f"xattn.{i}.{modality}", q_BNTH, stream, keep_BT, out_BTNH, trace)
            outputs.append(trace.put(stage, layer.output(out_BTNH)))
            trace.put(f"{stage}.gate", np.asarray(stream.keep_BL.any(axis=1)))

        x_BTD = sizes.parts.join(layer, x_BTD, outputs)
        x_BTD = trace.put(f"layer.{i}.output", sizes.parts.feed_forward(layer, x_BTD))
    return trace.put("final.norm", sizes.parts.norm(ar, x_BTD, w("model.norm.weight"), sizes.norm_eps))


def _rotated(ar: Arithmetic, x_BNTH: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x·cos + cat(-x₂, x₁)·sin, x₁ and x₂ the halves of a head."""
    first, second = np.split(x_BNTH, 2, axis=-1)
    turned = np.concatenate([-second, first], axis=-1)
    return ar.store(ar.store(x_BNTH * cos[:, None]) + ar.store(turned * sin[:, None]))


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
