"""What cannot run on this machine is reported by name, never passed over in silence."""

from __future__ import annotations

from typing import NoReturn

import pytest

__all__ = ["NotRun", "not_run"]


class NotRun(pytest.skip.Exception):
    """The only way to end a test without a verdict; any other skip fails the run (`tests.plugin.tiers`)."""


def not_run(reason: str) -> NoReturn:
    """End the test as NOT RUN: `reason` names what is missing and where to get it."""
    raise NotRun("NOT RUN: " + reason, allow_module_level=True)
