"""The GPU tests' rule has power: each plausible fault of a kernel turns it red, and an honest kernel stays green."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu import test_gpu_attention as gpu
from tests.unit.attention import naive
from vidi.attention import dispatch
from vidi.attention.call import AttentionCall

CPU = torch.device("cpu")
CROSS = dataclasses.replace(gpu.CASES["cross-padded"], head_dim=64, scale=1 / 8)
TEXT = dataclasses.replace(gpu.CASES["self-window"], head_dim=64, scale=1 / 8)


def kernel(case: Any, **changed: Any) -> Any:
    _, options = gpu.cases.make(case)
    return lambda q, k, v: dispatch.attend(AttentionCall(q, k, v, **options | changed))


def in_turns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads shared as n % G in place of n // (N/G)."""
    _, options = gpu.cases.make(CROSS)
    return dispatch.attend(AttentionCall(q[:, :, [0, 2, 1, 3]], k, v, **options))[:, :, [0, 2, 1, 3]]


def leaky(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padded queries are not zeroed."""
    _, options = gpu.cases.make(CROSS)
    return dispatch.attend(AttentionCall(q, k, v, **options | {"keep_q": None}))


FAULTS = {
    "no softcap": (CROSS, kernel(CROSS, softcap=None)),
    "scale off by 2 %": (CROSS, kernel(CROSS, scale=CROSS.scale * 1.02)),
    "every key": (CROSS, kernel(CROSS, keep_k=None)),
    "heads in turns": (CROSS, in_turns),
    "padded queries": (CROSS, leaky),
    "window of w keys": (TEXT, kernel(TEXT, window=63)),
    "window of w + 2 keys": (TEXT, kernel(TEXT, window=65)),
    "not causal": (TEXT, kernel(TEXT, q_pos_BT=None, window=None)),
}


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_red(fault: str, dtype: str) -> None:
    case, faulty = FAULTS[fault]
    with pytest.raises(AssertionError, match=r"DIFFERENT|exactly"):
        gpu.hold(case, "eager", gpu.DTYPES[dtype], CPU, faulty=faulty)


@pytest.mark.parametrize("dtype", gpu.DTYPES)
@pytest.mark.parametrize("case", [CROSS, TEXT], ids=["cross", "text"])
def test_an_honest_kernel_is_green(case: Any, dtype: str) -> None:
    gpu.hold(case, "eager", gpu.DTYPES[dtype], CPU)


@pytest.mark.parametrize("case", [CROSS, TEXT], ids=["cross", "text"])
def test_the_formula_of_fused_kernels_is_the_gradient(case: Any) -> None:
    tensors, options = gpu.cases.make(case)
    d_out = torch.randn_like(tensors[0])
    if "keep_q" in options:
        d_out[~options["keep_q"].keep_BL] = 0
    mine = naive.fused(
        *tensors, d_out, scale=case.scale, softcap=case.softcap, keep_BTS=gpu.keep_of(case, options, CPU)
    )
    for found, wanted in zip(mine, gpu.outcomes(kernel(case), tensors, d_out), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
