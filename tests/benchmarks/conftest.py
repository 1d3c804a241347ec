"""Benchmarks of kernels on a GPU. Ceilings are measured in the same run, and every figure is a share of them.

VIDI_REHEARSE=1 runs them on a CPU at small sizes, to try the code; such figures mean nothing.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.not_run import not_run
from vidi.fast import measure
from vidi.fast.floors import Ceilings


@pytest.fixture(scope="session")
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("VIDI_REHEARSE"):
        return torch.device("cpu")
    not_run("no CUDA GPU is here; pytest -m bench on a machine with one")


@pytest.fixture(scope="session")
def ceilings(device: torch.device) -> Ceilings:
    """What a bf16 product of 8192³ and a device copy (bytes read plus written) reach on this device in this run."""
    return measure.ceilings(device)
