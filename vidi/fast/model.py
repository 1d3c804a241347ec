"""`FastModel`: the pipeline over the fast loops. Inference only; no gradients.

Dims: B samples, T text tokens, R text rows in one line, L layers, S tokens of all streams, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.fast import bridge, plan, taps, text, weights
from vidi.fast import streams as stream_pass
from vidi.fast.cache import FastCache
from vidi.fast.step import Step
from vidi.fast.text import TextLine
from vidi.fast.towers import FastAudioTower, FastVisionTower, even_chunks
from vidi.model import Pipeline, VidiModel, frame_chunks
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["FastModel"]


class FastModel(Pipeline):
    """A view of ``model`` that shares its parameters (fused in place, `fast.weights`).

    stream_chunk: stream tokens that pass through all layers together. frame_batch, piece_batch: frames and 30 s pieces
    that pass through a tower together. graph: capture the decoding step (CUDA, one sample). None of them changes a
    result beyond rounding. Raises ValueError for a model in training mode.
    """

    def __init__(
        self,
        model: VidiModel,
        *,
        stream_chunk: int = 32768,
        frame_batch: int = 100,
        piece_batch: int = 16,
        graph: bool = True,
    ) -> None:
        self.plain, self.config, self.decoder = model, model.config, model.decoder
        self.train(model.training)
        self.stream_chunk, self.frame_batch, self.piece_batch = stream_chunk, frame_batch, piece_batch
        self.graph = graph
        self.layers = [weights.decoder_layer(layer) for layer in model.decoder.layers]
        self.final_norm, self.head = weights.norm_weight(model.decoder.norm), weights.head(model.decoder)
        self.factor = weights.entry_factor(model.decoder, model.dtype)
        self.vision_tower = FastVisionTower(model.vision_tower)
        self.audio_tower = FastAudioTower(model.audio_tower)
        self.bridge = bridge.accelerated(model.bridge)

    streams = torch.no_grad()(Pipeline.streams)
    encode_frames = torch.no_grad()(Pipeline.encode_frames)
    forward = torch.no_grad()(Pipeline.forward)
    decode_text = torch.no_grad()(Pipeline.decode_text)
    prefill = torch.no_grad()(Pipeline.prefill)
    __call__ = forward

    def train(self, mode: bool = True) -> FastModel:
        """Only ``mode`` False is possible: there are no gradients here, and no noise on positions."""
        if mode:
            raise ValueError("the fast path is for inference: call model.eval() first, or train the plain model")
        return self

    def eval(self) -> FastModel:
        return self.train(False)

    def image_features(self, images: Iterable[Tensor], num_frames: int) -> Iterator[Tensor]:
        size = next(even_chunks(num_frames, self.frame_batch)).stop
        return map(self.vision_tower, frame_chunks(images, size))

    def audio_features(self, pieces_PML: Tensor) -> Tensor:
        chunks = even_chunks(len(pieces_PML), self.piece_batch)
        return torch.cat([self.audio_tower(pieces_PML[chunk]) for chunk in chunks])

    def decode(
        self,
        embeds_BTD: Tensor,
        rows: Rows,
        streams: dict[str, Stream],
        *,
        last_stream: bool = False,
        tap: Tap = no_tap,
    ) -> Tensor:
        """With the plain path's stages tapped: recorded, not gone on with (`taps.Padded`)."""
        padded = taps.Padded(rows, streams, tap)
        normed_RD, _ = self._pass(embeds_BTD, rows, streams, embeds_BTD.shape[1], padded, last_stream)
        return tap("final.norm", padded.text(normed_RD))

    def fill(
        self, embeds_BTD: Tensor, rows: Rows, streams: dict[str, Stream], capacity: int, reuse: FastCache | None = None
    ) -> tuple[Tensor, FastCache]:
        padded = taps.Padded(rows, streams, no_tap)
        normed_RD, cache = self._pass(embeds_BTD, rows, streams, capacity, padded, False, reuse)
        return normed_RD[rows.cu_seqlens[1:].long() - 1], cache

    @torch.no_grad()
    def step(self, ids_B: Tensor, cache: FastCache) -> Tensor:
        """One sample: six fused kernels a layer, in a CUDA graph; more: the rows of `text.run`.

        Raises ValueError where the cache is full.
        """
        if cache.held == cache.capacity:
            raise ValueError(f"the text cache holds its {cache.capacity} tokens; prefill with a larger capacity")
        cache.held += 1
        config = self.config.decoder
        if len(ids_B) == 1:
            if cache.step is None:
                embed_VD = self.decoder.embed.weight.data
                ends = (self.final_norm, self.head)
                cache.step = Step(self.layers, embed_VD, self.factor, *ends, config, cache, graph=self.graph)
            return cache.step(ids_B)
        x_BD = self.decoder.scaled(self.decoder.embed_tokens(ids_B))
        rows = [slice(b, b + 1) for b in range(len(ids_B))]
        line = TextLine(torch.arange(len(ids_B), device=self.device), cache.lengths_B, rows, cache.plans)
        n_BD = text.run(x_BD, self.layers, self.final_norm, config, cache, line)
        cache.lengths_B = cache.lengths_B + 1
        return self.decoder.logits(n_BD)

    def _pass(
        self,
        embeds_BTD: Tensor,
        rows: Rows,
        streams: dict[str, Stream],
        capacity: int,
        padded: taps.Padded,
        last_stream: bool,
        reuse: FastCache | None = None,
    ) -> tuple[Tensor, FastCache]:
        """Streams first, then the text against their keys: normed text rows (R, D), and the cache.

        ``reuse``: a cache whose stream keys are shared; no stream token is left to pass through the layers then.
        """
        config, length = self.config.decoder, embeds_BTD.shape[1]
        x_SD, spans = stream_pass.flatten(streams, embeds_BTD)
        if reuse is None:
            shape = (len(x_SD), 2 * config.num_kv_heads * config.head_dim)
            cross_SX: Sequence[Tensor] = [x_SD.new_empty(shape) for _ in range(config.num_layers)]
        else:
            cross_SX, spans = reuse.cross_SX, reuse.spans
        # All that the host must ask or tell the device comes before the long pass: the text's launches then wait behind it,
        # not the device for them.
        lengths = rows.lengths_B.tolist()
        cache = FastCache.empty(config, rows.lengths_B.long(), capacity, cross_SX, spans)
        cache.held = length
        ends = [sum(lengths[: b + 1]) for b in range(len(lengths))]
        line = TextLine(
            sample_R=rows.indices // length,
            pos_R=rows.indices % length,
            rows=[slice(end - n, end) for end, n in zip(ends, lengths, strict=True)],
            plans=[plan.make(n, p.visual, p.audio, self.device) for n, p in zip(lengths, cache.plans, strict=True)],
        )
        x_RD = self.decoder.scaled(embeds_BTD.flatten(0, 1)[rows.indices])
        x_SD *= self.factor
        padded.stream_inputs(x_SD, spans)
        record = padded.recorder(len(x_SD))
        stream_pass.run(x_SD, self.layers, cross_SX, chunk=self.stream_chunk, last_stream=last_stream, record=record)
        return text.run(x_RD, self.layers, self.final_norm, config, cache, line, padded.text_taps(cache)), cache
