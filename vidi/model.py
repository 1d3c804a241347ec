"""Vidi: frames, sound and a prompt in, logits out (spec §3-§8).

Dims: B samples, F frames, P audio pieces, L tower positions, T text tokens, D decoder width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vidi import loss
from vidi.attention import dispatch
from vidi.attention.unpad import Rows
from vidi.bridge import audio as audio_bridge
from vidi.bridge import mask, position
from vidi.bridge import visual as visual_bridge
from vidi.bridge.bridge import Bridge
from vidi.cache import Cache
from vidi.config import VidiConfig
from vidi.decoder.decoder import Decoder
from vidi.inputs import batch as batches
from vidi.inputs import pixels
from vidi.inputs.batch import Batch
from vidi.stream import Stream
from vidi.tap import Tap, no_tap
from vidi.towers.siglip import VisionTower
from vidi.towers.whisper import AudioTower

__all__ = ["Pipeline", "VidiModel", "frame_chunks"]


class Pipeline(ABC):
    """The way from raw inputs to logits, over parts that a model has its own of: here the plain ones, faster ones in
    `vidi.fast.model`. A cache is its model's own."""

    config: VidiConfig
    bridge: Bridge
    decoder: Decoder

    # ---- a model's own ------------------------------------------------------------------------------------------

    @abstractmethod
    def image_features(self, images: Sequence[Tensor]) -> Iterator[Tensor]:
        """One (F, 3, S, S) tensor a video, uint8 or already normalised floats -> (f, L, C) of consecutive frames (§3.1)."""

    @abstractmethod
    def audio_features(self, pieces_PML: Tensor) -> Tensor:
        """Log-mel pieces -> (P, L, C) (§4.1)."""

    @abstractmethod
    def decode(
        self,
        embeds_BTD: Tensor,
        rows: Rows,
        streams: dict[str, Stream],
        *,
        last_stream: bool = False,
        tap: Tap = no_tap,
    ) -> Tensor:
        """Text embeddings and streams -> the text after the last layer and the final norm, (B, T, D)."""

    @abstractmethod
    def fill(self, embeds_BTD: Tensor, rows: Rows, streams: dict[str, Stream], capacity: int) -> tuple[Tensor, Any]:
        """As `decode`, of each row's last kept token alone, (B, D); and the cache that holds all of them."""

    @abstractmethod
    def step(self, ids_B: Tensor, cache: Any) -> Tensor:
        """One new token a row: (B,) ids -> (B, V) logits of the next one; ``cache`` grows by it."""

    @property
    def noise(self) -> position.Noise | None:
        """Noise on positions, in training alone (§5)."""
        return None

    # ---- what all models share ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.decoder.embed.weight.device

    def streams(self, batch: Batch, tap: Tap = no_tap) -> dict[str, Stream]:
        """Streams by modality, "v" and "a"; what the batch does not hold, or too little of for one token, is absent."""
        found = {}
        images, audios, sizes_B = batch.images or (), batch.audios or (), batch.audio_sizes or ()
        if any(map(len, images)):
            num_frames_B = [len(x) for x in images]
            found["v"] = self.fold_features(self.image_features(images), num_frames_B, mask.has_signal(images), tap)
        if audios and any(audio_bridge.num_tokens(size, self.config) for size in sizes_B):
            tower_PLC = self.audio_features(torch.cat(list(audios)).to(self.device, self.dtype))
            num_pieces_B, signal_B = [len(x) for x in audios], mask.has_signal(audios)
            found["a"] = audio_bridge.encode(
                self.bridge, tower_PLC, num_pieces_B, sizes_B, signal_B, self.config, noise=self.noise, tap=tap
            )
        return found

    def fold_features(
        self, features: Iterator[Tensor], num_frames_B: Sequence[int], signal_B: Tensor, tap: Tap = no_tap
    ) -> Stream:
        """Tower features (f, L, C) of consecutive frames -> visual stream (§3.2-3.9)."""
        return visual_bridge.encode(
            self.bridge, features, num_frames_B, signal_B, self.config, noise=self.noise, tap=tap
        )

    def embed_text(self, batch: Batch, tap: Tap = no_tap) -> tuple[Tensor, Rows, Tensor | None]:
        """Packed embeddings (B, T, D) without the placeholder, their kept rows, and the labels packed alike (§6)."""
        ids_BT, keep_BT, labels_BT = batches.pack_text(
            batch.input_ids_BT, batch.keep_BT, batch.labels_BT, placeholder=self.config.image_placeholder
        )
        keep_BT = tap("text.mask", keep_BT.to(self.device))
        embeds_BTD = tap("text.embeds", self.decoder.embed_tokens(ids_BT.to(self.device), keep_BT))
        if labels_BT is not None:
            labels_BT = tap("text.labels", labels_BT.to(self.device))
        return embeds_BTD, Rows(keep_BT), labels_BT

    def forward(self, batch: Batch, *, last_stream: bool = False, tap: Tap = no_tap) -> Tensor:
        """Logits of every text position, (B, T, V); rows that are not kept hold no meaning."""
        return self.decode_text(batch, self.streams(batch, tap), last_stream=last_stream, tap=tap)

    def decode_text(
        self, batch: Batch, streams: dict[str, Stream], *, last_stream: bool = False, tap: Tap = no_tap
    ) -> Tensor:
        """As `forward`, over streams that are already there."""
        embeds_BTD, rows, _ = self.embed_text(batch, tap)
        x_BTD = self.decode(embeds_BTD, rows, streams, last_stream=last_stream, tap=tap)
        return tap("logits", self.decoder.logits(x_BTD, tap))

    def prefill(self, batch: Batch, capacity: int, streams: dict[str, Stream] | None = None) -> tuple[Tensor, Any]:
        """Logits (B, V) after each row's own last kept token, and the cache to decode from.

        ``capacity``: text tokens that the cache can hold, the prompt included. Raises ValueError naming rows without text.
        """
        embeds_BTD, rows, _ = self.embed_text(batch)
        if empty := (rows.lengths_B == 0).nonzero().flatten().tolist():
            raise ValueError(f"rows {empty} keep no text token; decoding has nothing to continue from")
        streams = self.streams(batch) if streams is None else streams
        last_BD, cache = self.fill(embeds_BTD, rows, streams, max(capacity, embeds_BTD.shape[1]))
        return self.decoder.logits(last_BD), cache


class VidiModel(Pipeline, nn.Module):
    """The whole model. Built in evaluation mode; in training mode positions are noisy (§5).

    backend: attention of the decoder (`attention.dispatch.BACKENDS`).
    tower_backend: attention of the towers, which know no softcap, so that torch's sdpa can serve them.
    frame_chunk: frames that pass through tower and bridge together; bounds memory, changes no result.
    """

    def __init__(
        self, config: VidiConfig, *, backend: str = "eager", tower_backend: str = "sdpa", frame_chunk: int = 64
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = dispatch.check(backend)
        self.tower_backend = dispatch.check(tower_backend)
        self.frame_chunk = frame_chunk
        self.position_noise: position.Noise = position.draw_noise
        self.vision_tower = VisionTower(config.vision)
        self.audio_tower = AudioTower(config.audio)
        self.bridge = Bridge(config)
        self.decoder = Decoder(config.decoder)
        self.eval()

    @property
    def noise(self) -> position.Noise | None:
        return self.position_noise if self.training else None

    def image_features(self, images: Sequence[Tensor]) -> Iterator[Tensor]:
        for chunk in frame_chunks(images, self.frame_chunk):
            yield self.vision_tower(pixels.normalize(chunk, self.dtype, self.device), self.tower_backend)

    def audio_features(self, pieces_PML: Tensor) -> Tensor:
        return self.audio_tower(pieces_PML, self.tower_backend)

    def decode(
        self,
        embeds_BTD: Tensor,
        rows: Rows,
        streams: dict[str, Stream],
        *,
        last_stream: bool = False,
        tap: Tap = no_tap,
    ) -> Tensor:
        return self.decoder(embeds_BTD, rows, streams, backend=self.backend, last_stream=last_stream, tap=tap)

    def fill(self, embeds_BTD: Tensor, rows: Rows, streams: dict[str, Stream], capacity: int) -> tuple[Tensor, Cache]:
        lengths_B = rows.lengths_B.long()
        cache = Cache.empty(self.config.decoder, lengths_B, capacity, self.dtype, self.device)
        x_BTD = self.decoder(embeds_BTD, rows, streams, backend=self.backend, cache=cache)
        return x_BTD[torch.arange(len(x_BTD), device=self.device), lengths_B - 1], cache

    def step(self, ids_B: Tensor, cache: Cache) -> Tensor:
        return self.decoder.step(ids_B, cache, backend=self.backend)

    def losses(self, batch: Batch, *, last_stream: bool = False, tap: Tap = no_tap) -> Tensor:
        """Cross-entropy of each labelled token of a batch, (N,), row by row (§8). No other place reaches the head."""
        if batch.labels_BT is None:
            raise ValueError("the batch holds no labels_BT; a loss needs them")
        streams = self.streams(batch, tap)
        embeds_BTD, rows, labels_BT = self.embed_text(batch, tap)
        assert labels_BT is not None
        x_BTD = self.decode(embeds_BTD, rows, streams, last_stream=last_stream, tap=tap)
        places_N2, targets_N = loss.labelled(labels_BT)
        places_N2, targets_N = tap("loss.kept", places_N2), tap("loss.labels", targets_N)
        logits_NV = tap("loss.logits", self.decoder.logits(x_BTD[places_N2[:, 0], places_N2[:, 1]]))
        return tap("loss.per_token", loss.cross_entropy(logits_NV, targets_N))

    def loss(self, batch: Batch, *, threshold: float | None = None) -> Tensor:
        """Scalar training loss of a batch with labels (§8); ``threshold`` None = the configuration's. ValueError without."""
        threshold = self.config.loss_threshold if threshold is None else threshold
        return loss.mean_of(self.losses(batch), threshold)


def frame_chunks(images: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """Consecutive frames of all videos joined, at most ``size`` at a time; chunks may straddle videos."""
    pending: list[Tensor] = []
    count = 0
    for video in images:
        for part in video.split(size):
            while count + len(part) >= size:
                take = size - count
                yield torch.cat([*pending, part[:take]])
                pending, count, part = [], 0, part[take:]
            if len(part):
                pending, count = [*pending, part], count + len(part)
    if pending:
        yield torch.cat(pending)
