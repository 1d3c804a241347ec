"""Synthetic weights and loading on a GPU: the bits of the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vidi.checkpoint import load as loading
from vidi.checkpoint import names, save, synthetic
from vidi.checkpoint.load import load
from vidi.config import VidiConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_same_bits_on_both(dtype: torch.dtype, device: torch.device) -> None:
    here = synthetic.create(VidiConfig.tiny(), 7, dtype=dtype)
    there = synthetic.create(VidiConfig.tiny(), 7, dtype=dtype, device=device)
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert b.device.type == device.type
        assert torch.equal(a, b.cpu()), name


def test_the_ends_of_the_largest_tensor(device: torch.device) -> None:
    """The counter near 917 million, on both."""
    key = synthetic.keys(0, names.HEAD_TIED_TO)
    first = 256_000 * 3584 - 1000
    assert torch.equal(synthetic.sums(key, first, 1000), synthetic.sums(key, first, 1000, device).cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_loading_there_and_saving_from_there(
    dtype: torch.dtype, device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a ring smaller than the tensors, so that its buffers are used again while copies are under way."""
    synthetic.synth(tmp_path / "x", VidiConfig.tiny(), 7)
    here = load(tmp_path / "x", dtype=dtype)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 4096)
    there = load(tmp_path / "x", dtype=dtype, device=device)
    for (name, a), (_, b) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert b.device.type == device.type
        assert torch.equal(a, b.cpu()), name
    save.save(there, tmp_path / "y")
    again = load(tmp_path / "y", dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(here.parameters(), again.parameters(), strict=True))
