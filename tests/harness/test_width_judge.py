"""The judge of the full-width GPU test has power, also in float32, whose unit is a naive run: tried at the tiny sizes."""

from __future__ import annotations

import pytest
import torch

from tests.gpu import test_gpu_width as width
from vidi.parity import faults

CPU, BACKENDS = torch.device("cpu"), ("eager", "sdpa")


@pytest.mark.parametrize(
    "name",
    [
        "towers.siglip_gelu_erf",
        "towers.whisper_gelu_tanh",
        "bridge.projector_gelu_tanh",
        "norms.rms_eps",
        "attention.scale_one_percent",
        "decoder.mlp_gelu_erf",
    ],
)
def test_each_fault_is_red(name: str) -> None:
    with pytest.raises(AssertionError, match="DIFFERENT under float32-cast"):
        width.hold(True, CPU, BACKENDS, "float32", fault=faults.FAULTS[name])


@pytest.mark.parametrize("dtype", width.DTYPES)
def test_an_honest_run_is_green(dtype: str) -> None:
    width.hold(True, CPU, BACKENDS, dtype)
