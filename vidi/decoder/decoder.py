"""The decoder over three streams, its embedding and its head (spec §6-§8).

Dims: B samples, T text tokens, L stream tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from vidi.attention import rope
from vidi.attention.unpad import Rows
from vidi.cache import Cache, CrossKeys
from vidi.config import DecoderConfig
from vidi.decoder.layer import DecoderLayer, TextRows
from vidi.decoder.parts import PARTS
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["STREAM_CHUNK", "Decoder", "softcap"]

STREAM_CHUNK = 32768
STREAM_NAMES = {"v": "image", "a": "audio"}


def softcap(x: Tensor, cap: float) -> Tensor:
    """cap · tanh(x / cap)."""
    return cap * torch.tanh(x / cap)


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_layers))
        self.parts = PARTS[config.kind]
        self.norm = self.parts.norm(config.hidden_size, config.rms_norm_eps)
        self.head = None if self.parts.tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed_tokens(self, ids_BT: Tensor, keep_BT: Tensor | None = None) -> Tensor:
        """(B, T) ids -> (B, T, D); rows that are not kept are exact zeros, not the embedding of the pad id (§6)."""
        x_BTD = self.embed(ids_BT)
        return x_BTD if keep_BT is None else x_BTD * keep_BT[..., None]

    def scaled(self, x: Tensor) -> Tensor:
        """Text, visual and audio features on their way in: times sqrt(D), or as they are (§6)."""
        return self.parts.scaled(x)

    def text_rows(self, pos_BT: Tensor, rows: Rows | None, backend: str, dtype: torch.dtype) -> TextRows:
        cos_BTH, sin_BTH = rope.angles(pos_BT, self.config.head_dim, self.config.rope_theta, dtype)
        return TextRows(pos_BT, cos_BTH, sin_BTH, rows, backend)

    def forward(
        self,
        embeds_BTD: Tensor,
        rows: Rows,
        streams: Mapping[str, Stream],
        *,
        backend: str = "eager",
        cache: Cache | None = None,
        reuse: Cache | None = None,
        last_stream: bool = False,
        tap: Tap = no_tap,
    ) -> Tensor:
        """Text embeddings (B, T, D) and streams by modality ("v", "a") -> the text after the last layer and final norm.

        ``cache`` is filled for decoding. ``reuse``: the cache of an earlier text over the same streams, whose keys and values
        are read in place of ``streams``. ``last_stream``: also compute the last layer's stream update, which feeds nothing;
        the recordings hold it.
        """
        samples, length = embeds_BTD.shape[:2]
        pos_1T = tap("rope.position_ids", torch.arange(length, device=embeds_BTD.device)[None])
        one = self.text_rows(pos_1T, rows, backend, embeds_BTD.dtype)  # every sample's rows stand at the same positions
        cos_1TH, sin_1TH = tap("rope.cos", one.cos_BTH), tap("rope.sin", one.sin_BTH)
        text = replace(one, pos_BT=one.pos_BT.expand(samples, length), cos_BTH=cos_1TH, sin_BTH=sin_1TH)
        x_BTD = self.scaled(embeds_BTD)
        layers: Iterable[tuple[DecoderLayer, Mapping[str, CrossKeys]]]
        if reuse is None:
            layers = self.carry(streams, last_stream, tap)
        else:
            layers = zip(cast("Sequence[DecoderLayer]", self.layers), reuse.cross, strict=True)
        for layer, cross in layers:
            x_BTD = layer(x_BTD, text, cross, cache.text[layer.layer_idx] if cache else None, tap)
            if cache is not None:
                cache.cross.append(cross)
        return tap("final.norm", self.norm(x_BTD))

    def carry(
        self, streams: Mapping[str, Stream], last_stream: bool = False, tap: Tap = no_tap
    ) -> Iterator[tuple[DecoderLayer, dict[str, CrossKeys]]]:
        """Each layer, and the keys and values that text reads in it. No stream ever reads the text, so all of them could be
        carried first; they are carried a layer at a time, because a video's keys of all 42 layers at once are 43 GB."""
        state = {m: tap(f"layer.0.{STREAM_NAMES[m]}_input", self.scaled(s.x_BLD)) for m, s in streams.items()}
        rows = {m: Rows(stream.keep_BL) for m, stream in streams.items()}
        for layer in cast("Sequence[DecoderLayer]", self.layers):
            cross = {m: layer.stream_keys(s_BLD, rows[m], m, tap) for m, s_BLD in state.items()}
            for m in cross:  # recorded, and read by nothing: attention over no key is exactly 0 already
                tap(f"layer.{layer.layer_idx}.t2{m}.gate", rows[m].keep_BL.any(-1))
            yield layer, cross
            if layer is self.layers[-1] and not last_stream:
                break
            for m, s_BLD in state.items():
                s_BLD = update_in_chunks(layer, s_BLD, cross[m].v_BLGH)
                state[m] = tap(f"layer.{layer.layer_idx}.{STREAM_NAMES[m]}_stream", s_BLD)

    def step(self, ids_B: Tensor, cache: Cache, *, backend: str = "eager", tap: Tap = no_tap) -> Tensor:
        """One new token a row, read from and written to ``cache``: (B,) ids -> (B, V) logits of the next token."""
        text = self.text_rows(cache.lengths_B[:, None], None, backend, self.embed.weight.dtype)
        x_B1D = self.scaled(self.embed(ids_B[:, None]))
        for layer, held, cross in zip(self.layers, cache.text, cache.cross, strict=True):
            x_B1D = layer(x_B1D, text, cross, held, tap)
        cache.lengths_B = cache.lengths_B + 1
        return tap("logits", self.logits(tap("final.norm", self.norm(x_B1D)), tap))[:, 0]

    def logits(self, normed_BTD: Tensor, tap: Tap = no_tap) -> Tensor:
        """The embedding as head, or one of its own, then the final softcap where there is one: (B, T, V) (§8)."""
        weight = self.embed.weight if self.head is None else self.head.weight
        return self.finished(nn.functional.linear(normed_BTD, weight), tap)

    def finished(self, raw_BTV: Tensor, tap: Tap = no_tap) -> Tensor:
        """What the head gives -> logits."""
        raw_BTV = self.parts.finish(raw_BTV, tap)
        cap = self.config.final_softcap
        return raw_BTV if cap is None else softcap(raw_BTV, cap)


def update_in_chunks(layer: DecoderLayer, s_BLD: Tensor, v_BLGH: Tensor) -> Tensor:
    """`DecoderLayer.update_stream` over at most `STREAM_CHUNK` tokens at a time: a bound on memory, never a result."""
    if s_BLD.shape[0] * s_BLD.shape[1] <= STREAM_CHUNK:
        return layer.update_stream(s_BLD, v_BLGH)
    rows_1ND, values = s_BLD.flatten(0, 1)[None], v_BLGH.flatten(0, 1)[None]
    parts = zip(rows_1ND.split(STREAM_CHUNK, 1), values.split(STREAM_CHUNK, 1), strict=True)
    return torch.cat([layer.update_stream(s, v) for s, v in parts], dim=1).view_as(s_BLD)
