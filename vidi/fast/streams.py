"""Stream tokens through all decoder layers, in chunks, leaving keys and values behind.

A visual or audio token attends to itself alone, and the text never changes it. So chunks of tokens, of both modalities
and all samples alike, pass through every layer one after the other: the working set is one chunk, whatever the video's
length, and a product writes its keys and values straight to their place in the cross cache.

Dims: L layers, S tokens, R tokens of a chunk, D width, X = 2·G·H keys and values, I inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.fast import ops
from vidi.fast.cache import Span, spans_of
from vidi.fast.operands import Residual
from vidi.fast.weights import LayerWeights
from vidi.stream import Stream

__all__ = ["chunk_rows", "flatten", "run"]

ROW_MULTIPLE = 256


def flatten(streams: Mapping[str, Stream], like_BTD: Tensor) -> tuple[Tensor, dict[str, list[Span]]]:
    """Kept tokens of all streams in one row (S, D), and where each modality and sample stands. One host sync each.

    ``like_BTD`` gives width, dtype and device, also where no stream exists (S = 0).
    """
    lengths = {modality: stream.keep_BL.sum(-1).tolist() for modality, stream in streams.items()}
    spans, total = spans_of(lengths)
    x_SD = like_BTD.new_empty(total, like_BTD.shape[-1])
    for modality, stream in streams.items():
        prefix = Rows(stream.keep_BL).prefix
        for b, (start, stop) in enumerate(spans[modality]):
            rows = stream.x_BLD[b, : stop - start] if prefix else stream.x_BLD[b][stream.keep_BL[b]]
            x_SD[start:stop] = rows
    return x_SD, spans


def chunk_rows(total: int, most: int) -> int:
    """Even chunks of at most ``most`` rows, rounded up to whole tiles of a product."""
    total = max(total, 1)
    rows = -(-total // -(-total // most))
    return min(rows + -rows % ROW_MULTIPLE, most)


def run(
    x_SD: Tensor,
    layers: Sequence[LayerWeights],
    cross_SX: Sequence[Tensor],
    *,
    chunk: int,
    last_stream: bool = False,
    record: Callable[[int, int, Tensor], None] | None = None,
) -> None:
    """Fill ``cross_SX`` with the keys and values of each layer; ``x_SD`` (scaled, §6) is used up.

    ``record(layer, first row, x)``: given each chunk after each layer; the last layer's only with ``last_stream``.
    """
    total, width = x_SD.shape
    op = ops.pick(x_SD.device)
    rows = chunk_rows(total, chunk)
    inner = layers[0].down_DI.shape[1]
    half = cross_SX[0].shape[-1] // 2
    normed, branch = x_SD.new_empty(rows, width), x_SD.new_empty(1, rows, width)
    gate_up, acted = x_SD.new_empty(rows, 2 * inner), x_SD.new_empty(rows, inner)
    for start in range(0, total, rows):
        x_RD = x_SD[start : start + rows]
        count = len(x_RD)
        n_RD, b_1RD, g_R2I, a_RI = normed[:count], branch[:, :count], gate_up[:count], acted[:count]
        op.add_norm(Residual(x_RD, following=layers[0].input_norm), n_RD)
        for i, w in enumerate(layers):
            following = layers[i + 1].input_norm if i + 1 < len(layers) else None
            keys_values = cross_SX[i][start : start + count]
            torch.mm(n_RD, w.kv_XD.T, out=keys_values)
            if following is None and not last_stream:
                break
            torch.mm(keys_values[:, half:], w.own_DX.T, out=b_1RD[0])
            op.add_norm(Residual(x_RD, b_1RD, w.post_attn_norm, w.pre_ffn_norm), n_RD)
            torch.mm(n_RD, w.gate_up_2ID.T, out=g_R2I)
            op.gated_mul(g_R2I, w.activation, a_RI)
            torch.mm(a_RI, w.down_DI.T, out=b_1RD[0])
            op.add_norm(Residual(x_RD, b_1RD, w.post_ffn_norm, following), n_RD)
            if record is not None:
                record(i, start, x_RD)
