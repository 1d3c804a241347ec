"""Where decoder and bridge round inside one step, bit for bit in half precision: budgets admit one rounding too few."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi.attention import rope
from vidi.bridge import norm, position
from vidi.decoder.mlp import GatedMlp
from vidi.decoder.parts import PARTS

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def noise(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@HALF
def test_the_gates_activation_is_rounded_before_its_product(dtype: torch.dtype) -> None:
    mlp, x = (
        GatedMlp(64, 64, PARTS["gemma2"].activation).to(dtype).requires_grad_(False),
        noise(50, 64, seed=1, dtype=dtype),
    )
    for linear in (mlp.gate, mlp.up, mlp.down):
        linear.weight.copy_(torch.eye(64))
    wide = nnf.gelu(x.float(), approximate="tanh")
    assert torch.equal(mlp(x), (wide.to(dtype).float() * x.float()).to(dtype))
    assert not torch.equal(mlp(x), (wide * x.float()).to(dtype))


@HALF
def test_both_products_of_a_rotation_are_rounded_before_their_sum(dtype: torch.dtype) -> None:
    x = noise(1, 50, 2, 16, seed=2, dtype=dtype)
    cos, sin = rope.angles(torch.arange(50)[None], 16, 10000.0, dtype)
    first, second = x.chunk(2, dim=-1)
    products = x.float() * cos[:, :, None].float(), torch.cat((-second, first), -1).float() * sin[:, :, None].float()
    rounded = sum(p.to(dtype).float() for p in products)
    assert torch.equal(rope.apply(x, cos, sin), rounded.to(dtype))
    assert not torch.equal(rope.apply(x, cos, sin), sum(products).to(dtype))


@HALF
def test_a_positions_rms_is_rounded_before_it_is_added(dtype: torch.dtype) -> None:
    x, embed = noise(50, 40, seed=3, dtype=dtype), noise(50, 40, seed=4, dtype=dtype)
    wide = norm.rms(embed.float())
    assert torch.equal(position.add(x, embed), (x.float() + wide.to(dtype).float()).to(dtype))
    assert not torch.equal(position.add(x, embed), (x.float() + wide).to(dtype))
