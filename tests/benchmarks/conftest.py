"""Benchmarks of kernels on a GPU. Ceilings are measured in the same run, and every figure is a share of them.

VIDI_REHEARSE=1 runs them on a CPU at small sizes, to try the code; such figures mean nothing.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.not_run import not_run
from tools.studies import gpu
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


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """The file says in the project's words what it was measured on."""
    output_json["measured_on"] = gpu.measured_on(
        "kernels.json", torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    )
