"""Faults of unpadding, on the route that varlen kernels take (spec §9)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stageparity.faults.plant import plant

ROWS, CALL = "vidi.attention.unpad.Rows.", "vidi.attention.unpad._unpad_xattn_input"


@plant(ROWS + "indices", setting="unpadded")
def indices_off_by_one(original: Any) -> Any:
    """Indices off by one."""
    return lambda rows: (original(rows) + 1).clamp(max=rows.keep_BL.numel() - 1)


@plant(ROWS + "indices", setting="unpadded")
def indices_of_padding_order(original: Any) -> Any:
    """Rows gathered in the order of a batch-last layout."""

    def indices(rows: Any) -> Any:
        samples, length = rows.keep_BL.shape
        flat = rows.keep_BL.T.flatten().nonzero().flatten()
        return flat % samples * length + flat // samples

    return indices


@plant(ROWS + "indices", setting="unpadded", case="absent")
def indices_first_rows(original: Any) -> Any:
    """The first rows of the padded batch, as many as are kept."""
    return lambda rows: torch.arange(len(original(rows)))


@plant(ROWS + "cu_seqlens", setting="unpadded")
def lengths_shifted(original: Any) -> Any:
    """Cumulative lengths one too early: each sample ends before its last row."""
    return lambda rows: (original(rows) - 1).clamp(min=0)


@plant(ROWS + "cu_seqlens", setting="unpadded", case="absent")
def lengths_padded(original: Any) -> Any:
    """Cumulative lengths of the padded batch, cut at its kept rows."""

    def cu_seqlens(rows: Any) -> Any:
        samples, length = rows.keep_BL.shape
        ends = torch.arange(samples + 1, dtype=torch.int32) * length
        return ends.clamp(max=int(rows.keep_BL.sum()))

    return cu_seqlens


@plant(ROWS + "cu_seqlens", setting="unpadded")
def lengths_of_other_sample(original: Any) -> Any:
    """Lengths in the reverse order of the samples."""

    def cu_seqlens(rows: Any) -> Any:
        ends = original(rows)
        return (ends[-1] - ends.flip(0)).to(torch.int32)

    return cu_seqlens


@plant(ROWS + "max_seqlen", setting="unpadded")
def longest_too_small(original: Any) -> Any:
    """The longest length one too small: a kernel leaves its last row out."""
    return lambda rows: original(rows) - 1


@plant(ROWS + "max_seqlen", setting="unpadded")
def longest_is_shortest(original: Any) -> Any:
    """The shortest length in place of the longest."""
    return lambda rows: int(rows.lengths_B.min())


@plant("vidi.attention.unpad.unpad", setting="unpadded")
def gathered_neighbours(original: Any) -> Any:
    """The rows gathered are the neighbours of the kept ones, under right indices."""
    return lambda x, rows: original(x.roll(-1, 1), rows)


@plant("vidi.attention.unpad.unpad", setting="unpadded")
def gathered_backwards(original: Any) -> Any:
    """Rows gathered from the end, under right indices."""
    return lambda x, rows: original(x, rows).flip(0)


def _flat(change: Any) -> Any:
    def make(original: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            flat = original(*given, **named)
            return dataclasses.replace(flat, **change(flat))

        return call

    return make


def _call(name: str, use: str, what: str, change: Any) -> Any:
    make = _flat(change)
    make.__module__, make.__name__, make.__doc__ = __name__, name, what
    return plant(f"{CALL}[{use}]", setting="unpadded")(make)


key_lengths_are_query_lengths = _call(
    "key_lengths_are_query_lengths",
    "cu_seqlens_k",
    "Keys cut at the queries' lengths.",
    lambda flat: {"cu_seqlens_k": flat.cu_seqlens_q},
)
longest_exchanged = _call(
    "longest_exchanged",
    "max_seqlen",
    "Longest query and key length exchanged.",
    lambda flat: {"max_seqlen": flat.max_seqlen[::-1]},
)
values_are_keys = _call("values_are_keys", "v", "Keys are handed over as values.", lambda flat: {"v": flat.k})
keys_rolled = _call(
    "keys_rolled", "k", "Keys gathered one row late, values right.", lambda flat: {"k": flat.k.roll(1, 0)}
)


@plant("vidi.attention.unpad.pad", setting="unpadded")
def scattered_backwards(original: Any) -> Any:
    """Outputs scattered back in the wrong order."""
    return lambda x, indices, samples, length: original(x, indices.flip(0), samples, length)


@plant("vidi.attention.unpad.pad", setting="unpadded", case="absent")
def scattered_to_the_front(original: Any) -> Any:
    """Outputs laid down one after another, padding at the end of the batch."""
    return lambda x, indices, samples, length: original(x, torch.arange(len(indices)), samples, length)


@plant("vidi.attention.unpad.pad", setting="unpadded")
def padding_not_cleared(original: Any) -> Any:
    """Rows that nothing was scattered to hold what memory held (here ones)."""

    def pad(x: Any, indices: Any, samples: int, length: int) -> Any:
        out = original(x, indices, samples, length)
        empty = torch.ones(samples * length, dtype=torch.bool).index_fill(0, indices, False).view(samples, length)
        return out + empty[..., None, None].to(out.dtype)

    return pad
