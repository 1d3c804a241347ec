"""Vidi's part of the tiers (`stageparity.tiers`): what a GPU tier needs, and VIDI_REHEARSE=1, which tries its tests on a CPU."""

from __future__ import annotations

import os

import pytest

__all__: list[str] = []


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.rehearse |= bool(os.environ.get("VIDI_REHEARSE"))


def pytest_stageparity_missing(tier: str) -> str | None:
    import torch

    return "no CUDA device" if tier in ("gpu", "full") and not torch.cuda.is_available() else None
