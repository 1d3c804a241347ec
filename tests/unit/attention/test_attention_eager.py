"""eager against attention written one query at a time in NumPy float64: the root of trust of all other backends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.attention import cases, naive
from vidi.attention import dispatch, eager, mask
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows

EXACT = {"rtol": 0, "atol": 1e-13}  # double rounding of sums over 12 keys


@pytest.mark.parametrize("name", cases.CASES)
def test_eager_is_the_formula(name: str) -> None:
    tensors, options = cases.make(cases.CASES[name])
    out = dispatch.attend(AttentionCall(*tensors, **options))
    np.testing.assert_allclose(out.numpy(), cases.reference(tensors, options), **EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 4])
@pytest.mark.parametrize("name", cases.CASES)
def test_key_chunks_change_nothing(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = cases.make(cases.CASES[name])
    whole = dispatch.attend(AttentionCall(*tensors, **options))
    monkeypatch.setattr(eager, "KEY_CHUNK", chunk)
    torch.testing.assert_close(dispatch.attend(AttentionCall(*tensors, **options)), whole, **EXACT)


def test_the_softcap_of_the_cases_bites() -> None:
    tensors, options = cases.make(cases.CASES["cross"])
    capped = dispatch.attend(AttentionCall(*tensors, **options))
    free = dispatch.attend(AttentionCall(*tensors, **options | {"softcap": None}))
    assert (capped - free).abs().max() > 0.1


def test_heads_are_shared_in_blocks() -> None:
    """Heads 0, 1 read kv head 0 and heads 2, 3 read kv head 1; taken in turns, heads 1 and 2 would be swapped."""
    q_BTNH = torch.zeros(1, 1, 4, 8)
    k_BSGH = torch.zeros(1, 1, 2, 8)
    v_BSGH = torch.tensor([1.0, 2.0])[None, None, :, None].expand(1, 1, 2, 8)
    out = dispatch.attend(AttentionCall(q_BTNH, k_BSGH, v_BSGH, scale=1.0))
    assert out[0, 0, :, 0].tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex"])
@pytest.mark.parametrize("name", ["cross-padded", "cross-silent", "cross-holes", "cross-one-query", "self-padded"])
def test_what_is_not_kept_never_matters(name: str, backend: str) -> None:
    tensors, options = cases.make(cases.CASES[name])
    if backend == "sdpa":
        options["softcap"] = None
    clean = dispatch.attend(AttentionCall(*tensors, **options), backend)
    q, k, v = (x.clone() for x in tensors)
    k[~options["keep_k"].keep_BL] = torch.nan
    v[~options["keep_k"].keep_BL] = torch.nan
    if "keep_q" in options:
        q[~options["keep_q"].keep_BL] = torch.nan
    dirty = dispatch.attend(AttentionCall(q, k, v, **options), backend)
    assert torch.equal(clean, dirty)
    for b, kept in enumerate(options["keep_k"].keep_BL.any(-1).tolist()):
        assert kept or not dirty[b].any(), "a sample without keys must give exactly 0"
    if "keep_q" in options:
        assert not dirty[~options["keep_q"].keep_BL].any()


@pytest.mark.parametrize(
    ("window", "drawing"),
    [
        (2, ["1 . . . . .", "1 1 . . . .", "1 1 1 . . .", ". 1 1 1 . .", ". . 1 1 1 .", ". . . 1 1 1"]),
        (0, ["1 . . .", ". 1 . .", ". . 1 .", ". . . 1"]),
        (None, ["1 . . .", "1 1 . .", "1 1 1 .", "1 1 1 1"]),
    ],
)
def test_masks_are_as_drawn(window: int | None, drawing: list[str]) -> None:
    pos = torch.arange(len(drawing))
    keep = mask.sees(pos[None], pos, window)[0]
    assert [" ".join("1" if x else "." for x in row) for row in keep.tolist()] == drawing


def test_a_window_w_keeps_w_plus_1_keys() -> None:
    for window in (0, 1, 4):
        assert mask.sees(torch.tensor([[9]]), torch.arange(12), window).sum() == window + 1


@pytest.mark.parametrize("window", [None, 4096])
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("cross", [True, False])
def test_long_keys_are_the_formula_too(cross: bool, queries: int, window: int | None) -> None:
    """9,000 keys, a cap that bites, a step's one query as well: what is right for twelve keys must not depend on how many."""
    keys = 9000
    draw = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(1, n, 2, 4, generator=draw, dtype=torch.float64) for n in (queries, keys, keys))
    options: dict[str, Any] = {"scale": 2.0, "softcap": 3.0}
    own = options if cross else options | {"q_pos": np.arange(keys - queries, keys)[None], "window": window}
    wanted = naive.attention(*(x.numpy() for x in (q, k, v)), **own)
    if not cross:
        options |= {"q_pos_BT": torch.arange(keys - queries, keys)[None], "window": window}
    np.testing.assert_allclose(dispatch.attend(AttentionCall(q, k, v, **options)).numpy(), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [300, 5000, 20000])
def test_half_precision_rounds_at_its_end_alone(keys: int, dtype: torch.dtype) -> None:
    """However many keys: one rounding of the output. 20,000 keys pass in three chunks."""
    draw = torch.Generator().manual_seed(keys)
    q, k, v = (torch.randn(1, length, 2, 8, generator=draw).to(dtype) for length in (3, keys, keys))
    out, truth = (
        dispatch.attend(AttentionCall(*(x.to(kind) for x in (q, k, v)), 0.5, 50.0)).double()
        for kind in (dtype, torch.float64)
    )
    half_a_unit = torch.finfo(dtype).eps / 2 * truth.abs()
    assert ((out - truth).abs() <= half_a_unit + 1e-6).all()


def test_gradients_against_finite_differences() -> None:
    tensors, options = cases.make(cases.Case(3, 5, samples=2, head_dim=4, heads=2, groups=1, lengths_k=(5, 2)))
    inputs = tuple(x.requires_grad_() for x in tensors)
    assert torch.autograd.gradcheck(lambda q, k, v: dispatch.attend(AttentionCall(q, k, v, **options)), inputs)


def test_rows_known_full_ask_no_device() -> None:
    rows = Rows.all_kept(2, 3)
    assert rows.__dict__["full"]
    assert rows.__dict__["prefix"]
