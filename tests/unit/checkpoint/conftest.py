"""A tiny synthetic checkpoint, written once, and copies of it to break."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from vidi.checkpoint import synthetic
from vidi.config import VidiConfig


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    synthetic.synth(folder, VidiConfig.tiny(), seed=7)
    return folder


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
