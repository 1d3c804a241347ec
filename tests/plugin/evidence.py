"""Every run ends by naming what was measured on other code, goldens or budgets than today's, with the command that measures it
anew (`tools/study.py`). A result whose file is missing fails the run; which stale ones do, say tests and `tox -e evidence`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stageparity.golden import GoldenError

__all__ = ["Evidence"]

GOLDENS = Path(__file__).resolve().parents[2] / "goldens"


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.collectonly:
        config.pluginmanager.register(Evidence(config), "vidi-evidence")


class Evidence:
    def __init__(self, config: pytest.Config) -> None:
        self.config, self.lines, self.missing = config, list[str](), list[str]()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return  # a worker of pytest-xdist
        from tools import study

        try:
            found = study.stale(GOLDENS)
        except (ValueError, OSError, GoldenError) as error:
            found = {"what was measured": [f"missing or unreadable: {error}"]}
        for name, lines in found.items():
            self.lines += [f"STALE {name}: {line}" for line in lines]
            self.missing += [f"{name}: {line}" for line in lines if line.startswith("missing")]
        if self.missing and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self.config.getoption("--tiers-md", None) and self.lines:
            with open(self.config.getoption("--tiers-md"), "a", encoding="utf-8") as page:
                page.write("\n".join(["", *(f"- {line}" for line in self.lines), ""]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.lines:
            terminalreporter.section("evidence")
        for line in [*self.lines, *(f"FAILED: {line}" for line in self.missing)]:
            terminalreporter.line(line)
