"""What cannot run on this machine is reported by name, never passed over in silence."""

from __future__ import annotations

from typing import NoReturn

import pytest

__all__ = ["not_run"]


def not_run(reason: str) -> NoReturn:
    """End the test as NOT RUN: `reason` names what is missing and where to get it."""
    pytest.skip("NOT RUN: " + reason)
