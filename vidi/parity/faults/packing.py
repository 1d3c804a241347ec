"""Faults of packing: frames flattened, samples cut apart and padded (spec §3.7, §4.5)."""

from __future__ import annotations

from typing import Any

import torch

from stageparity.faults.plant import plant


@plant("vidi.bridge.pack.to_stream[norm]", case="absent")
def llm_norm_not_masked(original: Any) -> Any:
    """Tokens that are not kept are normed and passed on, not multiplied by the mask."""
    from vidi.inputs import batch
    from vidi.stream import Stream

    def to_stream(rows: Any, tokens: Any, signal: Any, llm_norm: Any, modality: str, tap: Any) -> Any:
        kept = original(
            rows, tokens, signal, llm_norm, modality, lambda i, x: x if i.endswith("llm_norm") else tap(i, x)
        )
        x = llm_norm(batch.pad_rows(list(rows.split(list(tokens)))))
        return Stream(tap(f"{modality}.llm_norm", x), kept.keep_BL)

    return to_stream


@plant("vidi.bridge.pack.to_stream[split]")
def samples_exchanged(original: Any) -> Any:
    """The token counts of the samples stand in the wrong order."""
    return lambda rows, tokens, *rest: original(rows, list(tokens)[::-1], *rest)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_columns_first(original: Any) -> Any:
    """Flattened in the order (t, w, h)."""
    return lambda *given: original(*given).transpose(1, 2)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_backwards(original: Any) -> Any:
    """Rows of a frame from the bottom up."""
    return lambda *given: original(*given).flip(1)


@plant("vidi.bridge.visual._frame_tokens[flatten]")
def flattened_time_last(original: Any) -> Any:
    """Flattened in the order (h, w, t): the frames of all videos interleave."""

    def frame_tokens(*given: Any) -> Any:
        x = original(*given)
        return x.permute(1, 2, 0, 3).reshape(x.shape)

    return frame_tokens


@plant("vidi.inputs.batch.pad_rows")
def padded_at_the_left(original: Any) -> Any:
    """Streams padded at the left."""

    def pad_rows(rows: Any, length: int | None = None) -> Any:
        padded = original(rows, length)
        return torch.stack([x.roll(len(x) - len(row), 0) for x, row in zip(padded, rows, strict=True)])

    return pad_rows


@plant("vidi.inputs.batch.pad_rows")
def padded_with_last_row(original: Any) -> Any:
    """Padding holds the last token: features are padded before the mask is computed from them."""

    def pad_rows(rows: Any, length: int | None = None) -> Any:
        padded = original(rows, length).clone()
        for x, row in zip(padded, rows, strict=True):
            if len(row):
                x[len(row) :] = row[-1]
        return padded

    return pad_rows


@plant("vidi.bridge.pack.to_stream[split]", case="novideo")
def samples_start_late(original: Any) -> Any:
    """Samples start one row late: the last token of each is the first of the next."""
    return lambda rows, *rest: original(rows.roll(-1, 0), *rest)
