"""Tests that need a GPU. Without one each is NOT RUN; VIDI_REHEARSE=1 runs what a CPU can of them, to try the tests."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch

from stageparity import fingerprint
from tests.not_run import not_run
from vidi.attention import limits


@pytest.fixture
def device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("VIDI_REHEARSE"):
        return torch.device("cpu")
    not_run("no CUDA GPU is here; pytest -m gpu on a machine with one")


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """IEEE float32 in products and convolutions; asserted on entry, and again after the test."""
    with fingerprint.ieee():
        yield
        fingerprint.assert_ieee()


@pytest.fixture
def able(device: torch.device):
    """able(backend, ...) ends the test as NOT RUN where the backend's library is absent, or in a rehearsal."""

    def check(backend: str, **asked: object) -> None:
        if device.type == "cpu" and limits.why_not(backend, device=device, **asked):  # type: ignore[arg-type]
            not_run(f"{backend} needs a GPU")
        if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
            not_run("flash-attn is not installed: pip install 'vidi-parity[flash]'")

    return check


@pytest.fixture
def note(request: pytest.FixtureRequest):
    """note(name, value) writes a measured figure beside the test's result (JUnit properties)."""
    return lambda name, value: request.node.user_properties.append((name, value))
