"""Gemma 2 with decomposed attention (specification §7): text reads itself and two streams with the same weights.

Letters: B batch, T text tokens, L any length, D width, N query and G key/value heads, H head width.
"""

import mlx.core as mx
import mlx.nn as nn


class GemmaNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = mx.zeros(width), eps

    def __call__(self, x):
        return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + self.eps) * (1 + self.weight)


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x):
        return self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))


def rotate(x, cos, sin):
    """(B, L, heads, H) turned by the angles of its positions."""
    first, second = mx.split(x, 2, axis=-1)
    return x * cos[:, :, None] + mx.concatenate([-second, first], axis=-1) * sin[:, :, None]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width, self.head = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.scale, self.cap = config["query_pre_attn_scalar"] ** -0.5, config["attn_logit_softcapping"]
        self.window = config["sliding_window"] if layer % 2 == 0 else None
        self.q_proj = nn.Linear(width, self.heads * self.head, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head, width, bias=False)

    def queries(self, n):
        return self.q_proj(n).reshape(*n.shape[:2], self.heads, self.head)

    def keys_values(self, n):
        return tuple(p(n).reshape(*n.shape[:2], self.kv_heads, self.head) for p in (self.k_proj, self.v_proj))

    def attend(self, q, k, v, keep):
        """q (B, T, N, H) over k, v (B, L, G, H) -> (B, T, N, H). keep (B or 1, T or 1, L): True = attend."""
        q = q.reshape(*q.shape[:2], k.shape[2], -1, self.head)  # query head n reads key head n // (N / G)
        scores = mx.einsum("btgrh,blgh->bgrtl", q, k) * self.scale
        scores = self.cap * mx.tanh(scores / self.cap)
        weights = mx.softmax(mx.where(keep[:, None, None], scores, -1e30), axis=-1)
        return mx.einsum("bgrtl,blgh->btgrh", weights, v).flatten(2, 3)

    def output(self, heads):
        return self.o_proj(heads.flatten(2))

    def text_to_text(self, q, n, cos, sin, keep_text):
        k, v = self.keys_values(n)
        place = mx.arange(n.shape[1])
        keep = place[:, None] >= place
        if self.window is not None:
            keep = keep & (place[:, None] - place <= self.window)
        heads = self.attend(rotate(q, cos, sin), rotate(k, cos, sin), v, keep[None] & keep_text[:, None])
        return self.output(heads * keep_text[..., None, None])

    def to_stream(self, q, k, v, keep_text, keep):
        """Text reads a stream: neither side is rotated, every kept token is seen."""
        return self.attend(q, k, v, keep[:, None]) * keep_text[..., None, None]

    def text_to_stream(self, q, k, v, keep_text, keep):
        return self.output(self.to_stream(q, k, v, keep_text, keep)) * self.gate(keep)[:, None, None]

    def gate(self, keep):
        """(B,): a sample that keeps no token of a stream reads nothing of it."""
        return keep.any(axis=1)

    def own_token(self, v):
        """What each stream token gets that attends to itself alone."""
        return self.output(mx.repeat(v, self.heads // self.kv_heads, axis=2))


class DecoderLayer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = Attention(config, layer)
        self.mlp = Mlp(width, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = GemmaNorm(width, eps), GemmaNorm(width, eps)
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = GemmaNorm(width, eps), GemmaNorm(width, eps)

    def __call__(self, x, image, audio, text, keep_image, keep_audio):
        """Text (B, T, D) and the two streams through the layer; text is (cos, sin, keep mask)."""
        attn, n, (cos, sin, keep_text) = self.self_attn, self.input_layernorm(x), text
        q = attn.queries(n)
        branch = attn.text_to_text(q, n, cos, sin, keep_text)
        after = []
        for stream, keep in ((image, keep_image), (audio, keep_audio)):
            k, v = attn.keys_values(self.input_layernorm(stream))
            branch = branch + attn.text_to_stream(q, k, v, keep_text, keep)
            after.append(self.feed_forward(stream + self.post_attention_layernorm(attn.own_token(v))))
        return self.feed_forward(x + self.post_attention_layernorm(branch)), *after

    def feed_forward(self, x):
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))
