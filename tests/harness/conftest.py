"""What several of the harness's own tests need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.harness.toy_project import Project

collect_ignore = ["toy"]  # a project of its own: its tests run in a copy


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Figures that are compared with stored ones come from one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def toy(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Project:
    return Project(pytester, monkeypatch)
