"""Tokens of all samples in a row -> one right-padded, masked, normed stream (spec §3.7-3.9, §4.5)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vidi.bridge import mask
from vidi.bridge.norm import RMSNorm
from vidi.inputs import batch
from vidi.stream import Stream
from vidi.tap import Tap, no_tap

__all__ = ["to_stream"]


def to_stream(
    rows_ND: Tensor, tokens_B: Sequence[int], signal_B: Tensor, llm_norm: RMSNorm, modality: str, tap: Tap = no_tap
) -> Stream:
    """(ΣL, D) rows, ``tokens_B`` of them per sample -> Stream (B, max L, D).

    ``signal_B`` (B,) bool: that sample's raw input is not all zero; a silent sample keeps no token.
    """
    packed_BLD = tap(f"{modality}.packed", batch.pad_rows(list(rows_ND.split(list(tokens_B)))))
    keep_BL = tap(f"{modality}.mask", mask.keep_tokens(packed_BLD, signal_B.to(packed_BLD.device)))
    x_BLD = tap(f"{modality}.llm_norm", llm_norm(packed_BLD) * keep_BL[..., None])
    return Stream(x_BLD, keep_BL)
