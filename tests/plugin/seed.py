"""`--hypothesis-profile random` looks at other examples in every run, and prints the seed that shows them again."""

from __future__ import annotations

import random

import pytest
from hypothesis import core

__all__: list[str] = []


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--hypothesis-profile", None) == "random" and core.global_force_seed is None:
        vars(core)["global_force_seed"] = random.SystemRandom().randrange(2**32)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if core.global_force_seed is not None:
        terminalreporter.line(f"random examples, again with --hypothesis-seed={core.global_force_seed}")
