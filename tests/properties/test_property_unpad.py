"""Unpadding and masks: what holds for every mask, whatever its holes (spec §7, §9)."""

from __future__ import annotations

import itertools
import re

import hypothesis.strategies as st
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from vidi.attention import dispatch, mask, unpad
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows
from vidi.inputs import batch as batches

keeps = hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 9))).map(torch.from_numpy)


@given(keeps, st.integers(0, 99))
def test_unpad_then_pad_is_the_identity_on_kept_rows_and_zero_elsewhere(keep_BL, seed):
    x_BLD = torch.randn(*keep_BL.shape, 3, generator=torch.Generator().manual_seed(seed))
    rows = Rows(keep_BL)
    flat = unpad.unpad(x_BLD, rows)
    assert len(flat) == int(keep_BL.sum())
    back = unpad.pad(flat, rows.indices, *keep_BL.shape)
    assert torch.equal(back, torch.where(keep_BL[..., None], x_BLD, 0.0))


@given(keeps)
def test_lengths_are_monotone_and_complete(keep_BL):
    rows = Rows(keep_BL)
    cu = rows.cu_seqlens
    assert cu.dtype == torch.int32
    assert cu[0] == 0
    assert cu[-1] == keep_BL.sum()
    assert cu.diff().tolist() == rows.lengths_B.tolist() == keep_BL.sum(1).tolist()
    assert rows.max_seqlen == max(keep_BL.sum(1).tolist())
    assert rows.indices.tolist() == [i for i, kept in enumerate(keep_BL.flatten().tolist()) if kept]
    assert rows.full == all(keep_BL.flatten().tolist())
    assert rows.prefix == all(row == sorted(row, reverse=True) for row in keep_BL.tolist())


@given(st.integers(1, 12), st.none() | st.integers(1, 13), st.integers(0, 5))
def test_a_causal_mask_equals_its_drawing(length, window, first):
    """Row by row: `1` from the window's edge to the query itself, `.` elsewhere."""
    positions = torch.arange(first, first + length)[None]
    keys = torch.arange(first + length)
    drawn = []
    for query in range(first, first + length):
        start = 0 if window is None else max(0, query - window)
        drawn.append("." * start + "1" * (query - start + 1) + "." * (first + length - query - 1))
    seen = mask.sees(positions, keys, window)[0]
    assert ["".join("1" if s else "." for s in row) for row in seen.tolist()] == drawn


def test_the_drawing_in_the_docstring_is_the_mask():
    drawn = re.findall(r"^ +((?:[1.] ?){6})$", mask.sees.__doc__, re.MULTILINE)
    seen = mask.sees(torch.arange(6)[None], torch.arange(6), 2)[0]
    assert [row.split() for row in drawn] == [["1" if s else "." for s in row] for row in seen.tolist()]
    assert len(drawn) == 6


@given(keeps, st.integers(0, 99), st.integers(1, 4), st.sampled_from(["eager", "sdpa"]))
def test_what_stands_in_padding_never_reaches_a_kept_row(keep_BL, seed, queries, backend):
    """NaN put into keys and values after the mask is built; a sample that keeps no key gives exactly 0."""
    rng = torch.Generator().manual_seed(seed)
    samples, length = keep_BL.shape
    q = torch.randn(samples, queries, 4, 8, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(samples, length, 2, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    keep_k = Rows(keep_BL)
    settings = {"scale": 0.3, "softcap": 5.0 if backend == "eager" else None}
    clean = dispatch.attend(AttentionCall(q, k, v, keep_k=keep_k, **settings), backend)
    dirty = [x.masked_fill(~keep_BL[:, :, None, None], torch.nan) for x in (k, v)]
    assert torch.equal(dispatch.attend(AttentionCall(q, *dirty, keep_k=keep_k, **settings), backend), clean)
    assert clean.isfinite().all()
    for b in range(samples):
        if not keep_BL[b].any():
            assert not clean[b].any()


@given(keeps, st.integers(0, 99))
def test_key_order_changes_nothing_beyond_noise(keep_BL, seed):
    """Cross-attention has no order: the same keys shuffled, with their mask, give the same output."""
    rng = torch.Generator().manual_seed(seed)
    samples, length = keep_BL.shape
    q = torch.randn(samples, 3, 4, 8, generator=rng, dtype=torch.float64)
    k, v = (torch.randn(samples, length, 2, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(length, generator=rng)
    settings = {"scale": 0.3, "softcap": 5.0}
    straight = dispatch.attend(AttentionCall(q, k, v, keep_k=Rows(keep_BL), **settings))
    shuffled = dispatch.attend(AttentionCall(q, k[:, order], v[:, order], keep_k=Rows(keep_BL[:, order]), **settings))
    assert (straight - shuffled).abs().max() <= 1e-13


@given(keeps, st.data())
def test_packing_keeps_every_kept_token_in_order(keep_BT, data):
    samples, length = keep_BT.shape
    ids_BT = torch.arange(1, samples * length + 1).view(samples, length)
    places = [data.draw(st.none() | st.integers(0, length - 1)) for _ in range(samples)]
    for b, place in enumerate(places):
        if place is not None:
            ids_BT[b, place] = -200
    labels_BT = ids_BT + 1000
    packed, keep, labels = batches.pack_text(ids_BT, keep_BT, labels_BT)
    for b in range(samples):
        wanted = [t for t, kept in zip(ids_BT[b].tolist(), keep_BT[b].tolist(), strict=True) if kept and t != -200]
        assert packed[b, : len(wanted)].tolist() == wanted
        assert labels[b, : len(wanted)].tolist() == [t + 1000 for t in wanted]
        assert keep[b].tolist() == [True] * len(wanted) + [False] * (keep.shape[1] - len(wanted))
        assert not packed[b, len(wanted) :].any()
        assert (labels[b, len(wanted) :] == -100).all()
    assert keep.shape[1] == max(keep.sum(1).tolist(), default=0)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 3))
def test_padded_rows_hold_their_content_and_zeros(lengths, extra):
    rows = [torch.full((n, 2), float(b + 1)) for b, n in enumerate(lengths)]
    padded = batches.pad_rows(rows, max(lengths) + extra)
    keep = batches.keep_from_lengths(lengths, max(lengths) + extra)
    assert padded.shape == (len(rows), max(lengths) + extra, 2)
    for b, (row, n) in enumerate(itertools.zip_longest(padded, lengths)):
        assert torch.equal(row[:n], rows[b])
        assert not row[n:].any()
        assert keep[b].tolist() == [i < n for i in range(len(row))]
