"""sdpa and flex against eager on a CPU, and what each backend refuses, in words."""

from __future__ import annotations

import re

import pytest
import torch

from tests.unit.attention import cases
from vidi.attention import dispatch, limits
from vidi.attention.call import AttentionCall

CLOSE = {"rtol": 0, "atol": 1e-12}
CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", cases.CASES)
def test_sdpa_is_eager(name: str) -> None:
    tensors, options = cases.make(cases.CASES[name])
    options["softcap"] = None
    expected = dispatch.attend(AttentionCall(*tensors, **options))
    torch.testing.assert_close(dispatch.attend(AttentionCall(*tensors, **options), "sdpa"), expected, **CLOSE)


@pytest.mark.parametrize("name", cases.CASES)
def test_flex_is_eager(name: str) -> None:
    torch.compiler.reset()
    tensors, options = cases.make(cases.CASES[name])
    expected = dispatch.attend(AttentionCall(*tensors, **options))
    torch.testing.assert_close(dispatch.attend(AttentionCall(*tensors, **options), "flex"), expected, **CLOSE)


def test_sdpa_gradients_are_eager_s() -> None:
    tensors, options = cases.make(cases.CASES["cross-padded"])
    options["softcap"] = None
    inputs = [x.requires_grad_() for x in tensors]
    grads = [
        torch.autograd.grad(dispatch.attend(AttentionCall(*inputs, **options), b).square().sum(), inputs)
        for b in ("eager", "sdpa")
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("backend", "asked", "text"),
    [
        ("sdpa", {"softcap": 50.0}, "backend 'sdpa' cannot cap attention scores (softcap 50); 'eager' and 'flex' can"),
        (
            "sdpa",
            {"softcap": 50.0, "device": CUDA, "dtype": torch.bfloat16},
            "backend 'sdpa' cannot cap attention scores (softcap 50); 'eager' and 'flash' and 'flex' can",
        ),
        (
            "flash",
            {"device": CUDA},
            "backend 'flash' cannot compute in float32 on cuda (only in bfloat16, float16); "
            "'eager' and 'sdpa' and 'flex' can",
        ),
        (
            "flash",
            {"dtype": torch.bfloat16},
            "backend 'flash' cannot run on cpu tensors (only on cuda); 'eager' and 'sdpa' and 'flex' can",
        ),
        (
            "flash",
            {"dtype": torch.float16, "device": CUDA, "head_dim": 160},
            "backend 'flash' cannot take heads of 160 (up to 128, and from 193 to 256); "
            "'eager' and 'sdpa' and 'flex' can",
        ),
        (
            "flex",
            {"dtype": torch.float64, "device": CUDA, "softcap": 5.0},
            "backend 'flex' cannot compute in float64 on cuda (only in bfloat16, float16, float32); 'eager' can",
        ),
    ],
)
def test_refusals_name_who_can(backend: str, asked: dict, text: str) -> None:
    asked = {"dtype": torch.float32, "device": CPU, "head_dim": 64} | asked
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        limits.check(backend, **asked)


def test_the_table_covers_the_backends_and_eager_has_no_limit() -> None:
    assert tuple(limits.LIMITS) == dispatch.BACKENDS
    assert limits.LIMITS["eager"] == limits.Limits()


def test_attend_refuses_before_it_imports() -> None:
    """On a machine without flash-attn, float32 is what is wrong, not the missing library."""
    q = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match="'flash' cannot run on cpu"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0), "flash")
    with pytest.raises(ValueError, match="'sdpa' cannot cap attention scores"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0, softcap=50.0), "sdpa")


def test_unknown_backends_and_a_window_without_positions() -> None:
    q = torch.zeros(1, 1, 1, 64)
    with pytest.raises(ValueError, match="unknown attention backend 'flush'; choose from eager, sdpa, flash, flex"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0), "flush")
    with pytest.raises(ValueError, match="a window needs query positions"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0, window=3))


def test_flex_refuses_gradients_on_a_cpu() -> None:
    q = torch.zeros(1, 2, 1, 8, requires_grad=True)
    with pytest.raises(ValueError, match="'flex' cannot return gradients on a CPU; 'eager' can"):
        dispatch.attend(AttentionCall(q, q, q, scale=1.0), "flex")


def test_a_gradient_is_needed_where_one_is_asked_for_and_recorded() -> None:
    tensors, options = cases.make(cases.CASES["cross"])
    call = AttentionCall(*tensors, **options)
    assert not call.needs_grad
    tensors[1].requires_grad_()
    assert call.needs_grad
    with torch.no_grad():
        assert not call.needs_grad
