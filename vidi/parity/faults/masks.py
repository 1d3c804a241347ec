"""Faults of keep masks (spec §3.8, §6, §7)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stageparity.faults.plant import plant
from vidi.attention.unpad import Rows


@plant("vidi.bridge.mask.keep_tokens")
def all_tokens_kept(original: Any) -> Any:
    """The mask is ignored: padding is attended to."""
    return lambda packed, signal: torch.ones_like(original(packed, signal))


@plant("vidi.bridge.mask.keep_tokens")
def mask_shifted(original: Any) -> Any:
    """The mask is off by one token."""
    return lambda packed, signal: original(packed, signal).roll(1, 1)


@plant("vidi.bridge.mask.keep_tokens")
def mask_of_other_sample(original: Any) -> Any:
    """Samples have each other's mask."""
    return lambda packed, signal: original(packed, signal).flip(0)


@plant("vidi.bridge.mask.keep_tokens")
def mask_inverted(original: Any) -> Any:
    """True means padding."""
    return lambda packed, signal: ~original(packed, signal)


@plant("vidi.bridge.mask.keep_tokens")
def mask_loses_last_token(original: Any) -> Any:
    """Each sample's last token is masked."""
    return lambda packed, signal: original(packed, signal) & original(packed, signal).roll(-1, 1)


@plant("vidi.bridge.mask.keep_tokens")
def mask_by_sum(original: Any) -> Any:
    """Kept where the sum is positive: values of both signs cancel."""
    return lambda packed, signal: (packed.sum(-1) > 0) & signal[:, None]


@plant("vidi.bridge.mask.has_signal[v]", case="absent")
def black_frames_count(original: Any) -> Any:
    """A video of all-zero frames counts as a signal."""
    return lambda raw: torch.ones(len(raw), dtype=torch.bool) if raw[0].ndim == 4 else original(raw)


@plant("vidi.bridge.mask.has_signal[a]", case="absent")
def silence_counts(original: Any) -> Any:
    """All-zero log-mel counts as a signal."""
    return lambda raw: torch.ones(len(raw), dtype=torch.bool) if raw[0].ndim == 3 else original(raw)


@plant("vidi.bridge.mask.has_signal", case="absent")
def one_silent_silences_all(original: Any) -> Any:
    """Raw input is looked at for the whole batch at once."""
    return lambda raw: original(raw).all().expand(len(raw)).clone()


@plant("vidi.bridge.mask.has_signal[a]", case="absent")
def signal_of_other_sample(original: Any) -> Any:
    """Samples have each other's signal."""
    return lambda raw: original(raw).roll(1) if raw[0].ndim == 3 else original(raw)


@plant("vidi.attention.mask.zero_rows")
def padded_queries_answer(original: Any) -> Any:
    """Rows of padded queries are not cleared."""
    return lambda out, keep: out


@plant("vidi.attention.mask.zero_rows")
def wrong_queries_cleared(original: Any) -> Any:
    """The cleared rows are those of the other sample."""
    return lambda out, keep: original(out, keep if keep is None else Rows(keep.keep_BL.flip(0)))


@plant("vidi.decoder.attention.DecomposedAttention.attend_stream")
def stream_mask_ignored(original: Any) -> Any:
    """The key mask is ignored in cross-attention."""

    def attend(self: Any, q: Any, k: Any, v: Any, *, keep_k: Rows, **rest: Any) -> Any:
        return original(self, q, k, v, keep_k=Rows.all_kept(*keep_k.keep_BL.shape), **rest)

    return attend


@plant("vidi.decoder.attention.DecomposedAttention.attend_stream")
def stream_mask_shifted(original: Any) -> Any:
    """The key mask is off by one in cross-attention."""

    def attend(self: Any, q: Any, k: Any, v: Any, *, keep_k: Rows, **rest: Any) -> Any:
        return original(self, q, k, v, keep_k=Rows(keep_k.keep_BL.roll(-1, 1)), **rest)

    return attend


@plant("vidi.decoder.attention.DecomposedAttention.attend_stream")
def stream_mask_of_other_sample(original: Any) -> Any:
    """Samples have each other's key mask in cross-attention."""

    def attend(self: Any, q: Any, k: Any, v: Any, *, keep_k: Rows, **rest: Any) -> Any:
        return original(self, q, k, v, keep_k=Rows(keep_k.keep_BL.flip(0)), **rest)

    return attend


@plant("vidi.decoder.attention.DecomposedAttention.attend_stream")
def text_mask_shifted(original: Any) -> Any:
    """The query mask of cross-attention is off by one."""

    def attend(self: Any, q: Any, k: Any, v: Any, *, keep_q: Any, **rest: Any) -> Any:
        return original(self, q, k, v, keep_q=keep_q and Rows(keep_q.keep_BL.roll(1, 1)), **rest)

    return attend


STREAM = "vidi.decoder.layer.DecoderLayer.text_to_stream"


@plant(f"{STREAM}[text mask]")
def text_mask_of_other_sample(original: Any) -> Any:
    """Cross-attention is handed the text mask of another sample."""

    def text_to_stream(self: Any, n: Any, text: Any, *rest: Any) -> Any:
        wrong = text.rows and Rows(text.rows.keep_BL.flip(0))
        return original(self, n, dataclasses.replace(text, rows=wrong), *rest)

    return text_to_stream


@plant(f"{STREAM}[stream mask]")
def stream_mask_by_length(original: Any) -> Any:
    """Cross-attention is handed a mask one token too long."""

    def text_to_stream(self: Any, n: Any, text: Any, keys: Any, *rest: Any) -> Any:
        keep = keys.rows.keep_BL
        longer = Rows(keep | keep.roll(1, 1))
        return original(self, n, text, dataclasses.replace(keys, rows=longer), *rest)

    return text_to_stream


@plant(f"{STREAM}[stream mask]")
def stream_mask_inverted(original: Any) -> Any:
    """Cross-attention is handed the mask of padding."""

    def text_to_stream(self: Any, n: Any, text: Any, keys: Any, *rest: Any) -> Any:
        return original(self, n, text, dataclasses.replace(keys, rows=Rows(~keys.rows.keep_BL)), *rest)

    return text_to_stream
