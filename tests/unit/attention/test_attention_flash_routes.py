"""Which flash-attn entry serves which case, and with which lengths: against eager, over a stand-in for the library."""

from __future__ import annotations

import sys

import pytest
import torch

from tests.unit.attention import cases, stand_in
from vidi.attention import eager, flash
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows

CLOSE = {"rtol": 0, "atol": 1e-12}
HOLES = ("cross-holes", "cross-one-query-holes")
PADDED_TEXT = ("self-padded", "self-padded-window")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    module, noted = stand_in.library()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return noted


@pytest.mark.parametrize("name", cases.CASES)
def test_forward(name: str, calls: list[str]) -> None:
    tensors, options = cases.make(cases.CASES[name])
    with torch.inference_mode():
        out = flash.attend(AttentionCall(*tensors, **options))
    torch.testing.assert_close(out, eager.attend(AttentionCall(*tensors, **options)), **CLOSE)
    # Only what the kv-cache entry cannot say goes another way: long keys must stay split.
    assert calls == ["varlen" if name in HOLES + PADDED_TEXT else "kv-cache"]


@pytest.mark.parametrize("name", [n for n in cases.CASES if not n.startswith(("self-cached", "decode"))])
def test_gradients(name: str, calls: list[str]) -> None:
    tensors, options = cases.make(cases.CASES[name])
    inputs = [x.requires_grad_() for x in tensors]
    grads = []
    for kernel in (flash, eager):
        out = kernel.attend(AttentionCall(*inputs, **options))
        grads.append(torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True, materialize_grads=True))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    case = cases.CASES[name]
    padded = case.lengths_k is not None or case.lengths_q is not None
    assert calls == ([] if name == "cross-all-silent" else ["varlen" if padded else "dense"])


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["cross-padded", "cross-silent", "cross-holes", "self-padded"])
def test_what_is_not_kept_never_matters(name: str, grad: bool, calls: list[str]) -> None:
    tensors, options = cases.make(cases.CASES[name])
    clean = flash.attend(AttentionCall(*tensors, **options))
    dirty = [x.clone() for x in tensors]
    for x, keep in zip(dirty, ("keep_q", "keep_k", "keep_k"), strict=True):
        x[~options[keep].keep_BL] = torch.nan
    inputs = [x.requires_grad_(grad) for x in dirty]
    out = flash.attend(AttentionCall(*inputs, **options))
    torch.testing.assert_close(out, clean, **CLOSE)
    if grad:
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.square().sum(), inputs))


def test_a_decoding_step_never_asks_the_device(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a forward has asked for `prefix`, a step reads lengths from device memory alone: a CUDA graph can hold it."""
    cross = cases.make(cases.CASES["cross-one-query"])
    own = cases.make(cases.CASES["decode-window"])
    assert cross[1]["keep_k"].prefix
    for name in ("__bool__", "item", "tolist", "nonzero", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, _host_sync)
    monkeypatch.setattr(stand_in, "_one", lambda q, k, v, **options: q)
    lengths = []
    monkeypatch.setattr(
        sys.modules["flash_attn"],
        "flash_attn_with_kvcache",
        lambda q, k, v, cache_seqlens, **options: (lengths.append(cache_seqlens), q)[1],
    )
    for tensors, options in (cross, own):
        flash.attend(AttentionCall(*tensors, **options))
    monkeypatch.undo()
    assert [n.tolist() for n in lengths] == [[11, 0, 6], [1, 6, 12]]


def _host_sync(*_: object) -> None:
    raise AssertionError("the host asked the device")


def test_positions_are_looked_at_once_for_all_layers(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, options = cases.make(cases.CASES["self"])
    flash.attend(AttentionCall(*tensors, **options))
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "diff", _host_sync)
        flash.attend(AttentionCall(*tensors, **options))


def test_what_flash_cannot_say_is_refused(calls: list[str]) -> None:
    tensors, options = cases.make(cases.CASES["self-padded-window"])
    q, k, v = tensors
    holes = Rows(options["keep_k"].keep_BL & (torch.arange(9) != 1))
    bent = options["q_pos_BT"].clone()
    bent[0, 4] = 7
    refused = [
        (dict(options, q_pos_BT=bent), "positions that do not rise by one within a row"),
        (dict(options, keep_q=Rows.all_kept(3, 9)), "different masks"),
        (dict(options, keep_q=holes, keep_k=holes), "a window across holes"),
        (dict(options, q_pos_BT=options["q_pos_BT"] + 1), "the queries are only a part of the keys"),
    ]
    for changed, text in refused:
        with pytest.raises(ValueError, match=f"backend 'flash' cannot .*{text}.*; 'eager' and 'flex' can"):
            flash.attend(AttentionCall(q, k, v, **changed))
    tensors, options = cases.make(cases.CASES["self-cached"])
    with pytest.raises(ValueError, match="return gradients, where the queries are only a part of the keys"):
        flash.attend(AttentionCall(tensors[0].requires_grad_(), *tensors[1:], **options))
    assert not calls


def test_without_the_library_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    tensors, options = cases.make(cases.CASES["cross"])
    with pytest.raises(ImportError, match=r"needs flash-attn 2 .*pip install 'vidi-parity\[flash\]'"):
        flash.attend(AttentionCall(*tensors, **options))
