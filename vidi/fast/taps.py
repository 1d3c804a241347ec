"""Stages of the fast path under the plain path's ids and shapes, so that one set of goldens judges both.

Dims: B samples, T text tokens, R text rows in one line, L padded stream tokens, S of all modalities, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vidi.attention import unpad
from vidi.attention.unpad import Rows
from vidi.decoder.decoder import STREAM_NAMES
from vidi.fast.cache import FastCache, Span
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["Padded"]


class Padded:
    """Brings rows in one line back to padded batches, exact zeros where nothing is kept. Costs memory: for parity only.

    The padded copies are made to be recorded: what the tap returns is not gone on with, so the decoder's fast loops cannot be
    forced, only traced from raw inputs.
    """

    def __init__(self, rows: Rows, streams: Mapping[str, Stream], tap: Tap) -> None:
        self.rows, self.tap = rows, tap
        self.stream_rows = {modality: Rows(stream.keep_BL) for modality, stream in streams.items()}
        self.spans: Mapping[str, Sequence[Span]] = {}
        self.recorded: list[Tensor] = []

    @property
    def wanted(self) -> bool:
        return self.tap is not no_tap

    def text(self, x_R: Tensor) -> Tensor:
        """(R, …) -> (B, T, …)."""
        return unpad.pad(x_R, self.rows.indices, *self.rows.keep_BL.shape)

    def stream(self, x_S: Tensor, modality: str) -> Tensor:
        """Rows of all streams (S, …) -> one modality's (B, L, …)."""
        rows = self.stream_rows[modality]
        own = torch.cat([x_S[first:stop] for first, stop in self.spans[modality]])
        return unpad.pad(own, rows.indices, *rows.keep_BL.shape)

    def stream_inputs(self, x_SD: Tensor, spans: Mapping[str, Sequence[Span]]) -> None:
        """Tap the scaled streams before the first layer."""
        self.spans = spans
        if self.wanted:
            for modality in spans:
                self.tap(f"layer.0.{STREAM_NAMES[modality]}_input", self.stream(x_SD, modality))

    def recorder(self, total: int) -> Callable[[int, int, Tensor], None] | None:
        """Keeps streams after every layer: chunks finish all layers before the next begins, stages need all chunks."""
        if not self.wanted:
            return None

        def record(layer: int, start: int, x_RD: Tensor) -> None:
            if layer == len(self.recorded):
                self.recorded.append(x_RD.new_empty(total, x_RD.shape[1]))
            self.recorded[layer][start : start + len(x_RD)] = x_RD

        return record

    def text_taps(self, cache: FastCache) -> Tap:
        """A tap for `text.run`: pads its rows, and adds the streams' stages of the same layer."""
        if not self.wanted:
            return no_tap
        groups = cache.text_L2BSGH.shape[-2]
        length = self.rows.keep_BL.shape[1]
        pos_1T = torch.arange(length, device=self.rows.keep_BL.device)[None]
        self.tap("rope.position_ids", pos_1T)
        self.tap("rope.cos", cache.rotation.cos_SH[None, :length])
        self.tap("rope.sin", cache.rotation.sin_SH[None, :length])

        def tap(stage: str, x_R: Tensor) -> Tensor:
            self.tap(stage, self.text(x_R))
            kind, layer, *rest = stage.split(".")
            if kind == "layer" and rest == ["input"]:
                for modality, rows in self.stream_rows.items():
                    self.tap(f"layer.{layer}.t2{modality}.gate", rows.keep_BL.any(-1))
            elif kind == "layer" and rest == ["output"]:
                for modality in self.stream_rows:
                    if int(layer) < len(self.recorded):
                        name = f"layer.{layer}.{STREAM_NAMES[modality]}_stream"
                        self.tap(name, self.stream(self.recorded[int(layer)], modality))
            elif kind == "xattn" and rest[1] == "q" and rest[0] in self.spans:
                keys_values = self.stream(cache.cross_SX[int(layer)], rest[0]).unflatten(-1, (2 * groups, -1))
                self.tap(f"xattn.{layer}.{rest[0]}.k", keys_values[:, :, :groups])
                self.tap(f"xattn.{layer}.{rest[0]}.v", keys_values[:, :, groups:])
            return x_R

        return tap
