"""Gradients in float16 come from a scaled loss: small ones would underflow inside kernels, and none may be lost."""

from __future__ import annotations

import pytest
import torch

from vidi.parity import trace


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gradient_below_half_precision_comes_back(dtype: torch.dtype) -> None:
    """1e-8 rounds to 0 in float16, whose smallest number is 6e-8."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=dtype))
    factors = torch.tensor([1e-8, 1.0, 60.0])
    (slope,) = trace._slopes((weight.float() * factors).sum(), [weight], dtype)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope.float(), factors, rtol=5e-3 if dtype != torch.float16 else 0.02, atol=0)
    plain = torch.autograd.grad((weight.float() * factors).sum(), [weight])[0]
    assert (plain[0] == 0) == (dtype == torch.float16)
