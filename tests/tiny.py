"""A tiny model with synthetic weights, and random inputs for it, in float64: differences beyond 1e-9 are no noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from vidi import sizes_7b
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.inputs.batch import Batch, Sample, make_batch
from vidi.model import VidiModel

__all__ = ["NOISE", "Seen", "assert_close", "config", "make", "model", "sample", "whole_pass_logits"]

NOISE = 1e-9  #: of rms, in float64


def config(name: str = "9b", *, window: int | None = None, **changes: Any) -> VidiConfig:
    """The tiny configuration of a model with some fields, or the sliding window, replaced."""
    found = dataclasses.replace(VidiConfig.tiny() if name == "9b" else sizes_7b.config("tiny"), **changes)
    if window is None:
        return found
    return dataclasses.replace(found, decoder=dataclasses.replace(found.decoder, sliding_window=window))


@cache
def model(
    name: str = "9b", *, dtype: torch.dtype = torch.float64, seed: int = 3, window: int | None = None
) -> VidiModel:
    """One model per argument; tests that change it must put it back."""
    return synthetic.create(config(name, window=window), seed, dtype=dtype).requires_grad_(False)


def sample(
    text: int = 9, frames: int = 2, audio: int = 23, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Sample:
    """A sample of ``text`` ids around a placeholder, ``frames`` pictures and ``audio`` mel frames (0: none). It fits both
    models."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 500, (text,), generator=rng).tolist()
    images = torch.rand(frames, 3, 26, 26, generator=rng, dtype=torch.float64) * 2 - 1
    mel = torch.randn(
        -(-audio // 100), 16, 100, generator=rng, dtype=torch.float64
    )  # pieces of 100 mel frames, 16 bins
    return Sample(
        ids=[*ids[:2], -200, *ids[2:]],
        images=images.to(dtype) if frames else None,
        audio=mel.to(dtype) if audio else None,
        audio_size=audio if audio else None,
    )


def make(samples: Sequence[Sample]) -> Batch:
    return make_batch(samples, VidiConfig.tiny())


class Seen(dict[str, Tensor]):
    """A tap that keeps every stage whole, parts of one id joined along axis 0."""

    def __call__(self, stage: str, x: Tensor) -> Tensor:
        self[stage] = torch.cat([self[stage], x]) if stage in self else x
        return x


def assert_close(found: Tensor, wanted: Tensor, noise: float = NOISE) -> None:
    """Equal shapes, and no value further off than ``noise`` times the rms of what is wanted."""
    assert found.shape == wanted.shape
    scale = wanted.square().mean().sqrt().item() or 1.0
    worst = (found - wanted).abs().max().item() if found.numel() else 0.0
    assert worst <= noise * scale, f"off by {worst / scale:.3g} of rms, allowed {noise:.3g}"


@torch.inference_mode()
def whole_pass_logits(model: VidiModel, batch: Batch, tokens_BS: Tensor) -> Tensor:
    """(B, S, V) without a cache: entry s from a pass over the whole text, the prompt and tokens[:s], from each row's own
    last kept token."""
    out, streams = [], model.streams(batch)
    keep_BT = torch.ones_like(batch.input_ids_BT, dtype=torch.bool) if batch.keep_BT is None else batch.keep_BT
    for step in range(tokens_BS.shape[1]):
        ids_BT = torch.cat([batch.input_ids_BT, tokens_BS[:, :step]], dim=1)
        longer_BT = torch.cat([keep_BT, torch.ones(len(batch), step, dtype=torch.bool)], dim=1)
        longer = dataclasses.replace(batch, input_ids_BT=ids_BT, keep_BT=longer_BT)
        kept = longer_BT & (ids_BT != model.config.image_placeholder)
        out.append(model.decode_text(longer, streams)[torch.arange(len(batch)), kept.sum(1) - 1])
    return torch.stack(out, dim=1)
