"""Unpadding (spec §9): what goes in comes back, and each known way to break the query mask has its own message."""

from __future__ import annotations

import pytest
import torch

from tests.unit.attention.cases import keep_first
from vidi.attention import dispatch
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows, _unpad_xattn_input, check_query_mask, pad, unpad

KEEP = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)


def test_rows_of_a_mask() -> None:
    rows = Rows(KEEP)
    assert rows.lengths_B.tolist() == [3, 0, 1]
    assert rows.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert rows.lengths_B.dtype == rows.cu_seqlens.dtype == torch.int32
    assert rows.indices.tolist() == [0, 1, 3, 9]
    assert rows.max_seqlen == 3
    assert not rows.full
    assert not rows.prefix


@pytest.mark.parametrize(
    ("keep", "full", "prefix"),
    [
        ([[1, 1], [1, 1]], True, True),
        ([[1, 0], [1, 1]], False, True),
        ([[0, 0], [1, 0]], False, True),
        ([[0, 1], [1, 1]], False, False),
        ([[1, 1], [0, 1]], False, False),  # a hole in any sample
        ([[1], [0]], False, True),
    ],
)
def test_full_and_prefix(keep: list, full: bool, prefix: bool) -> None:
    rows = Rows(torch.tensor(keep, dtype=torch.bool))
    assert (rows.full, rows.prefix) == (full, prefix)


def test_unpad_then_pad_is_the_identity_on_kept_rows() -> None:
    rows, x = Rows(KEEP), torch.randn(3, 4, 5)
    packed = unpad(x, rows)
    assert torch.equal(packed, torch.stack([x[0, 0], x[0, 1], x[0, 3], x[2, 1]]))
    assert torch.equal(pad(packed, rows.indices, 3, 4), x * KEEP[..., None])
    assert torch.equal(unpad(pad(packed, rows.indices, 3, 4), rows), packed)


def test_nan_in_padding_leaves_no_trace_in_gradients() -> None:
    x = torch.randn(3, 4, 5).masked_fill(~KEEP[..., None], torch.nan).requires_grad_()
    unpad(x, Rows(KEEP)).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not x.grad[~KEEP].any()


def test_unpadded_queries_and_keys() -> None:
    q, k, v = torch.randn(3, 5, 4, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    q_rows, k_rows = Rows(keep_first((5, 0, 2), 5)), Rows(KEEP)
    got = _unpad_xattn_input(q, k, v, q_rows, k_rows)
    assert got.q.shape == (7, 4, 8)
    assert got.k.shape == got.v.shape == (4, 2, 8)
    assert got.cu_seqlens_q.tolist() == [0, 5, 5, 7]
    assert got.cu_seqlens_k.tolist() == [0, 3, 3, 4]
    assert got.indices_q.tolist() == [0, 1, 2, 3, 4, 10, 11]
    assert got.max_seqlen == (5, 3)
    assert torch.equal(got.q[5:], q[2, :2])
    assert torch.equal(got.k[2], k[0, 3])
    assert torch.equal(got.v[3], v[2, 1])


def test_a_single_query_row_is_kept_whatever_the_text_mask_says() -> None:
    q, k = torch.randn(3, 1, 4, 8), torch.randn(3, 4, 2, 8)
    got = _unpad_xattn_input(q, k, k, Rows(torch.zeros(3, 7, dtype=torch.bool)), Rows(KEEP))
    assert torch.equal(got.q, q[:, 0])
    assert got.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert got.max_seqlen == (1, 3)


def test_keys_must_fit_their_mask() -> None:
    q, k = torch.randn(3, 1, 4, 8), torch.randn(3, 5, 2, 8)
    with pytest.raises(ValueError, match=r"the key mask is \(3, 4\), the keys are \(3, 5\)"):
        _unpad_xattn_input(q, k, k, None, Rows(KEEP))


# The four known causes of a mask that does not fit, each with a sentence that no other has.
CAUSES = {
    "a: still counts the placeholder": ((2, 7), 6, {}, "still counts the image placeholder"),
    "b: a causal 4-D mask": ((2, 1, 6, 6), 6, {}, "this is a causal attention mask, whose axis 1 is a head axis"),
    "c: counts cached keys": ((2, 10), 2, {"cached_keys": 8}, "covers the 8 cached keys too"),
    "d: cut to the sliding window": ((2, 4), 6, {"window": 4}, "a sliding layer cut it to its window of 4"),
    "unknown": ((2, 3), 6, {}, "the text mask counts 3 tokens, the queries are 6"),
    "not a mask": ((2,), 6, {}, r"the text mask has shape \(2,\)"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_each_cause_has_its_own_message(cause: str) -> None:
    shape, queries, known, text = CAUSES[cause]
    with pytest.raises(ValueError, match=text) as caught:
        check_query_mask(torch.ones(shape, dtype=torch.bool), queries, **known)
    others = [CAUSES[other][3] for other in CAUSES if other != cause]
    assert not any(other in str(caught.value) for other in others)


def test_attention_refuses_a_mask_that_does_not_fit() -> None:
    q, k = torch.zeros(2, 6, 2, 8), torch.zeros(2, 9, 2, 8)
    keep_k = Rows.all_kept(2, 9)
    for length, text in ((7, "image placeholder"), (4, "they must be equal")):
        with pytest.raises(ValueError, match=text):
            dispatch.attend(AttentionCall(q, k, k, scale=1.0, keep_q=Rows.all_kept(2, length), keep_k=keep_k))
    pos = torch.arange(6).expand(2, 6)
    with pytest.raises(ValueError, match="sliding layer"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0, keep_q=Rows.all_kept(2, 4), q_pos_BT=pos, window=4))
