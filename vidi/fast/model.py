"""`FastModel`: what `vidi.generate` asks of a model, over the fast loops. Inference only; no gradients.

Dims: B samples, T text tokens, R text rows in one line, L layers, S tokens of all streams, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from vidi import precision
from vidi.attention.unpad import Rows
from vidi.bridge import audio as audio_bridge
from vidi.bridge import mask
from vidi.bridge import visual as visual_bridge
from vidi.fast import bridge, plan, taps, text, weights
from vidi.fast import streams as stream_pass
from vidi.fast.cache import FastCache
from vidi.fast.step import Step
from vidi.fast.text import TextLine
from vidi.fast.towers import FastAudioTower, FastVisionTower, even_chunks
from vidi.inputs.batch import Batch
from vidi.model import VidiModel, frame_chunks
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["FastModel"]


class FastModel:
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
        self.plain, self.config = model, model.config
        self.train(model.training)
        self.stream_chunk, self.frame_batch, self.piece_batch = stream_chunk, frame_batch, piece_batch
        self.graph = graph
        self.layers = [weights.decoder_layer(layer) for layer in model.decoder.layers]
        self.final_norm_D = model.decoder.norm.weight.data
        self.embed_VD = model.decoder.embed.weight.data
        self.vision_tower = FastVisionTower(model.vision_tower)
        self.audio_tower = FastAudioTower(model.audio_tower)
        self.bridge = bridge.accelerated(model.bridge)

    @property
    def dtype(self) -> torch.dtype:
        return self.plain.dtype

    @property
    def device(self) -> torch.device:
        return self.plain.device

    def train(self, mode: bool = True) -> FastModel:
        """Only ``mode`` False is possible: there are no gradients here, and no noise on positions."""
        if mode:
            raise ValueError("the fast path is for inference: call model.eval() first, or train the plain model")
        return self

    def eval(self) -> FastModel:
        return self.train(False)

    # ---- towers and bridge --------------------------------------------------------------------------------------

    @torch.no_grad()
    def streams(self, batch: Batch, tap: Tap = no_tap) -> dict[str, Stream]:
        """As `VidiModel.streams`."""
        found = {}
        if batch.images is not None and any(map(len, batch.images)):
            size = next(even_chunks(sum(map(len, batch.images)), self.frame_batch)).stop
            features = map(self.vision_tower, frame_chunks(batch.images, size))
            found["v"] = self.fold_features(
                features, [len(x) for x in batch.images], mask.has_signal(batch.images), tap
            )
        sizes_B = batch.audio_sizes or ()
        if batch.audios is not None and any(audio_bridge.num_tokens(size, self.config) for size in sizes_B):
            found["a"] = self._audio(batch.audios, sizes_B, tap)
        return found

    @torch.no_grad()
    def encode_frames(self, pieces: Iterable[Tensor], num_frames: int, tap: Tap = no_tap) -> Stream:
        """As `VidiModel.encode_frames`."""
        size = next(even_chunks(num_frames, self.frame_batch)).stop
        features = map(self.vision_tower, frame_chunks(pieces, size))
        return self.fold_features(features, [num_frames], torch.ones(1, dtype=torch.bool), tap)

    def fold_features(
        self, features: Iterator[Tensor], num_frames_B: Sequence[int], signal_B: Tensor, tap: Tap = no_tap
    ) -> Stream:
        """As `VidiModel.fold_features`."""
        return visual_bridge.encode(self.bridge, features, num_frames_B, signal_B, self.config, tap=tap)

    def _audio(self, audios: Sequence[Tensor], sizes_B: Sequence[int], tap: Tap) -> Stream:
        pieces = torch.cat(list(audios)).to(self.device, self.dtype)
        parts = [self.audio_tower(pieces[part]) for part in even_chunks(len(pieces), self.piece_batch)]
        num_pieces_B, signal_B = [len(x) for x in audios], mask.has_signal(audios)
        return audio_bridge.encode(self.bridge, torch.cat(parts), num_pieces_B, sizes_B, signal_B, self.config, tap=tap)

    # ---- decoder ------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch, *, last_stream: bool = False, tap: Tap = no_tap) -> Tensor:
        """As `VidiModel.forward`, with the same stages tapped."""
        return self.decode_text(batch, self.streams(batch, tap), last_stream=last_stream, tap=tap)

    __call__ = forward

    @torch.no_grad()
    def decode_text(
        self, batch: Batch, streams: dict[str, Stream], *, last_stream: bool = False, tap: Tap = no_tap
    ) -> Tensor:
        """As `VidiModel.decode_text`."""
        embeds_BTD, rows, _ = self.plain.embed_text(batch, tap)
        padded = taps.Padded(rows, streams, tap)
        normed_RD, _ = self._prefill(embeds_BTD, rows, streams, 0, padded, last_stream)
        normed_BTD = padded.text(normed_RD)
        tap("final.norm", normed_BTD)
        logits_BTV = self.plain.decoder.logits(normed_BTD)
        tap("logits", logits_BTV)
        return logits_BTV

    @torch.no_grad()
    def prefill(
        self,
        batch: Batch,
        capacity: int,
        streams: dict[str, Stream] | None = None,
        *,
        reuse: FastCache | None = None,
    ) -> tuple[Tensor, FastCache]:
        """As `VidiModel.prefill`: logits (B, V) after each row's last kept token, and the cache to decode from."""
        embeds_BTD, rows, _ = self.plain.embed_text(batch)
        if reuse is not None:
            streams = {}
        elif streams is None:
            streams = self.streams(batch)
        padded = taps.Padded(rows, streams, no_tap)
        normed_RD, cache = self._prefill(embeds_BTD, rows, streams, capacity, padded, False, reuse)
        return self.plain.decoder.logits(normed_RD[rows.cu_seqlens[1:].long() - 1]), cache

    @torch.no_grad()
    def step(self, ids_B: Tensor, cache: FastCache) -> Tensor:
        """As `VidiModel.step`. One sample: six fused kernels a layer, in a CUDA graph; more: the rows of `text.run`.

        Raises ValueError where the cache is full.
        """
        if cache.held == cache.capacity:
            raise ValueError(f"the text cache holds its {cache.capacity} tokens; prefill with a larger capacity")
        cache.held += 1
        config = self.config.decoder
        if len(ids_B) == 1:
            if cache.step is None:
                cache.step = Step(self.layers, self.embed_VD, self.final_norm_D, config, cache, graph=self.graph)
            return cache.step(ids_B)
        x_BD = self.plain.decoder.scaled(self.plain.decoder.embed_tokens(ids_B))
        rows = [slice(b, b + 1) for b in range(len(ids_B))]
        line = TextLine(torch.arange(len(ids_B), device=self.device), cache.lengths_B, rows, cache.plans)
        n_BD = text.run(x_BD, self.layers, self.final_norm_D, config, cache, line)
        cache.lengths_B = cache.lengths_B + 1
        return self.plain.decoder.logits(n_BD)

    def _prefill(
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

        ``reuse``: a cache whose stream keys are shared; there is no stream pass then.
        """
        config, length = self.config.decoder, embeds_BTD.shape[1]
        x_SD, spans = stream_pass.flatten(streams, embeds_BTD)
        cross_SX: Sequence[Tensor]
        if reuse is None:
            shape = (len(x_SD), 2 * config.num_kv_heads * config.head_dim)
            cross_SX = [x_SD.new_empty(shape) for _ in range(config.num_layers)]
        else:
            cross_SX, spans = reuse.cross_SX, reuse.spans
        # All that the host must ask or tell the device comes before the long pass: the text's launches then wait behind it,
        # not the device for them.
        lengths = rows.lengths_B.tolist()
        cache = FastCache.empty(config, rows.lengths_B.long(), max(capacity, length), cross_SX, spans)
        cache.held = length
        ends = [sum(lengths[: b + 1]) for b in range(len(lengths))]
        line = TextLine(
            sample_R=rows.indices // length,
            pos_R=rows.indices % length,
            rows=[slice(end - n, end) for end, n in zip(ends, lengths, strict=True)],
            plans=[plan.make(n, p.visual, p.audio, self.device) for n, p in zip(lengths, cache.plans, strict=True)],
        )
        x_RD = self.plain.decoder.scaled(embeds_BTD.flatten(0, 1)[rows.indices])
        if reuse is None:
            x_SD *= precision.sqrt_in(config.hidden_size, self.dtype)
            padded.stream_inputs(x_SD, spans)
            record = padded.recorder(len(x_SD))
            stream_pass.run(
                *(x_SD, self.layers, config.rms_norm_eps, cross_SX),
                chunk=self.stream_chunk,
                last_stream=last_stream,
                record=record,
            )
        tap = padded.text_taps(cache)
        return text.run(x_RD, self.layers, self.final_norm_D, config, cache, line, tap), cache
