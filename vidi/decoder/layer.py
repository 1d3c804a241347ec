"""One decoder layer (spec §7): three streams, one set of weights, decomposed attention.

    n    = input_norm(x)
    self = o(attend(rope(q(n)), rope(k(n)), v(n)))
    vis  = o(attend(q(n), k(input_norm(s)), v(input_norm(s))))     s as it was before this layer; the audio stream likewise
    x    = x + post_attn_norm((self + vis) + aud)
    x    = x + post_ffn_norm(mlp(pre_ffn_norm(x)))
    s    = s + post_attn_norm(o(v(input_norm(s))))                 each stream token attends to itself alone
    s    = s + post_ffn_norm(mlp(pre_ffn_norm(s)))

Dims: B samples, T text tokens, L stream tokens, S cached text keys, D width, G key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from vidi.attention import rope
from vidi.attention.unpad import Rows
from vidi.cache import CrossKeys, LayerTextCache
from vidi.config import DecoderConfig
from vidi.decoder.attention import DecomposedAttention
from vidi.decoder.mlp import GatedMlp
from vidi.decoder.parts import PARTS
from vidi.tap import Tap, no_tap

__all__ = ["DecoderLayer", "TextRows"]


@dataclass(frozen=True)
class TextRows:
    """What every layer needs to know of the text rows it is given.

    pos_BT: positions 0, 1, 2, … of the tokens of each row. cos_BTH, sin_BTH: their rotary factors; one row may serve all.
    rows: which of them are kept; None = all (decoding).
    """

    pos_BT: Tensor
    cos_BTH: Tensor
    sin_BTH: Tensor
    rows: Rows | None
    backend: str


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.window = config.window(layer_idx)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.attention = DecomposedAttention(config)
        self.parts = PARTS[config.kind]
        self.mlp = GatedMlp(width, config.intermediate_size, self.parts.activation)
        self.input_norm = self.parts.norm(width, eps)
        self.post_attn_norm = self.parts.after(width, eps)
        self.pre_ffn_norm = self.parts.norm(width, eps)
        self.post_ffn_norm = self.parts.after(width, eps)

    # ---- streams ------------------------------------------------------------------------------------------------

    def stream_keys(self, s_BLD: Tensor, rows: Rows, modality: str, tap: Tap = no_tap) -> CrossKeys:
        """What text reads of a stream as it was before this layer; the update reads the same values."""
        names = (f"xattn.{self.layer_idx}.{modality}.{part}" for part in ("k", "v"))
        k_BLGH, v_BLGH = map(tap, names, self.stream_keys_values(s_BLD))
        return CrossKeys(k_BLGH, v_BLGH, rows)

    def stream_keys_values(self, s_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, G, H), of a stream as it was before this layer."""
        return self.attention.keys_values(self.input_norm(s_BLD))

    def update_stream(self, s_BLD: Tensor, v_BLGH: Tensor) -> Tensor:
        """The stream after this layer; its values are those of `stream_keys_values`. Rows of 0 stay 0."""
        return self.merge(s_BLD, [self.attention.attend_own_token(v_BLGH)])

    # ---- text ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        x_BTD: Tensor,
        text: TextRows,
        cross: Mapping[str, CrossKeys],
        cache: LayerTextCache | None = None,
        tap: Tap = no_tap,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D). ``cross``: by modality ("v", "a"), absent ones left out.

        ``cache`` receives this call's keys and values, and self-attention then reads all it holds.
        """
        here = f"layer.{self.layer_idx}"
        x_BTD = tap(f"{here}.input", x_BTD)
        n_BTD = self.input_norm(x_BTD)
        branches = [tap(f"{here}.t2t", self.text_to_text(n_BTD, text, cache))]
        for modality, keys in cross.items():
            branches.append(tap(f"{here}.t2{modality}", self.text_to_stream(n_BTD, text, keys, modality, tap)))
        return tap(f"{here}.output", self.merge(x_BTD, branches))

    def merge(self, x_BTD: Tensor, branches: Sequence[Tensor]) -> Tensor:
        """The text after this layer, from the text before it and its attentions in the order self, visual, audio."""
        return self.feed_forward(self.parts.join(x_BTD, branches, self.post_attn_norm))

    def text_to_text(self, n_BTD: Tensor, text: TextRows, cache: LayerTextCache | None = None) -> Tensor:
        """Causal self-attention of normed text, after the output projection: (B, T, D). Even layers see a window."""
        q, (k, v) = self.attention.queries(n_BTD), self.attention.keys_values(n_BTD)
        q = rope.apply(q, text.cos_BTH, text.sin_BTH)
        k = rope.apply(k, text.cos_BTH, text.sin_BTH)
        keep_k = text.rows
        if cache is not None:
            k, v = cache.extend(k, v, text.pos_BT)
            keep_k = None  # a row's keys end at its own position, which causality already says
        heads = self.attention.attend_self(
            q, k, v, q_pos_BT=text.pos_BT, window=self.window, keep_q=text.rows, keep_k=keep_k, backend=text.backend
        )
        return self.attention.output(heads)

    def text_to_stream(
        self, n_BTD: Tensor, text: TextRows, keys: CrossKeys, modality: str, tap: Tap = no_tap
    ) -> Tensor:
        """Cross-attention of normed text to one modality, after the output projection: (B, T, D)."""
        here = f"xattn.{self.layer_idx}.{modality}"
        q_BTNH = tap(f"{here}.q", self.attention.queries(n_BTD))
        heads_BTNH = self.attention.attend_stream(
            q_BTNH, keys.k_BLGH, keys.v_BLGH, keep_q=text.rows, keep_k=keys.rows, backend=text.backend
        )
        return self.attention.output(tap(f"{here}.out", heads_BTNH))

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.post_ffn_norm(self.mlp(self.pre_ffn_norm(x)))
