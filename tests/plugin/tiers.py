"""Tiers: every run ends by saying of each tier whether it passed, failed or was NOT RUN, and why.

A test belongs to one tier by its markers: `cpu` has none. A run that names no tier (`pytest`) selects cpu. What a test
cannot run is reported through `tests.not_run`, listed by name; every other skip or expected failure fails the run, and
so does a run in which no test ran at all, or a GPU run (`-m gpu`) on a machine without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from _pytest.junitxml import xml_key

from tests.not_run import NotRun, not_run

__all__ = ["DEFAULT", "TIERS", "Tier", "tier_of"]

#: In the order of the summary. The first marker a test has, read from the right, is its tier.
TIERS = ("cpu", "slow", "gpu", "full", "bench")
DEFAULT = "not slow and not gpu and not full and not bench"


@dataclass
class Tier:
    """What became of one tier's tests in this run."""

    name: str
    collected: int = 0
    selected: int = 0
    passed: int = 0
    failed: int = 0
    not_run: dict[str, str] = field(default_factory=dict)  #: test -> reason

    @property
    def verdict(self) -> str:
        if self.failed:
            return "failed"
        return "passed" if self.passed else "NOT RUN"

    @property
    def reason(self) -> str:
        """Why no test of the tier has a verdict."""
        if self.name in ("gpu", "full") and not has_cuda():
            return "no CUDA device"
        if not self.collected:
            return "no such test among those collected"
        if not self.selected:
            return f"not selected; pytest -m {self.name}"
        return next(iter(self.not_run.values()), "interrupted")

    def line(self) -> str:
        """One line for people: `gpu: NOT RUN (no CUDA device)`."""
        if self.verdict == "NOT RUN":
            return f"{self.name}: NOT RUN ({self.reason})"
        counts = [f"{self.passed} passed"] + [f"{self.failed} failed"] * bool(self.failed)
        counts += [f"{len(self.not_run)} NOT RUN"] * bool(self.not_run)
        return f"{self.name}: {self.verdict} ({', '.join(counts)})"


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def tier_of(item: pytest.Item) -> str:
    return next((name for name in reversed(TIERS) if item.get_closest_marker(name)), "cpu")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiers-md", metavar="FILE", help="write what became of each tier as markdown")


def pytest_configure(config: pytest.Config) -> None:
    # A test that is named on the command line (a rerun command) runs whatever its tier.
    if not config.option.markexpr and not any("::" in arg for arg in config.args):
        config.option.markexpr = DEFAULT
    config.pluginmanager.register(_Tiers(config), "vidi-tiers")


class _Tiers:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.tiers = {name: Tier(name) for name in TIERS}
        self.of: dict[str, str] = {}
        self.problems: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.of[item.nodeid] = tier_of(item)
        self.tiers[self.of[item.nodeid]].collected += 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.tiers[tier_of(item)].selected += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.get_closest_marker("gpu") and not has_cuda() and not os.environ.get("VIDI_REHEARSE"):
            not_run("no CUDA device")

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        report = yield  # type: ignore[misc]
        if report.skipped and "NOT RUN: " not in str(report.longrepr):
            report.outcome = "failed"
            report.longrepr = f"{collector.nodeid}: skipped outside tests.not_run ({report.longrepr})"
        elif report.skipped:
            # A module that cannot be collected holds tests nobody could count: it stands for them by its own name.
            self.of[collector.nodeid] = "cpu"
            self.tiers["cpu"].not_run[collector.nodeid] = _reason(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield  # type: ignore[misc]
        if hasattr(report, "wasxfail"):
            report.outcome, report.longrepr = "failed", f"expected failures are not used here: {report.wasxfail}"
            del report.wasxfail
        elif report.skipped and not (call.excinfo and isinstance(call.excinfo.value, NotRun)):
            report.outcome, report.longrepr = "failed", f"skipped outside tests.not_run: {_reason(report)}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tier = self.tiers[self.of.get(report.nodeid, "cpu")]
        if report.failed:
            tier.failed += 1
        elif report.skipped:
            tier.not_run[report.nodeid] = _reason(report)
        elif report.when == "call":
            tier.passed += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not self.config.option.collectonly:
            ran = sum(tier.passed + tier.failed for tier in self.tiers.values())
            asked_gpu = session.items and all(item.get_closest_marker("gpu") for item in session.items)
            if session.items and not ran:
                self.problems.append("no test ran")
            elif asked_gpu and not has_cuda():
                self.problems.append("only a rehearsal: no test ran on a GPU")
            if self.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        xml = self.config.stash.get(xml_key, None)
        for tier in self.tiers.values():
            if xml is not None:
                xml.add_global_property(f"tier.{tier.name}", tier.line())
        if path := self.config.option.tiers_md:
            Path(path).write_text(self.markdown(), encoding="utf-8")

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.config.option.collectonly:
            return
        terminalreporter.section("tiers")
        for reason, tests in self.by_reason().items():
            terminalreporter.line(f"NOT RUN, {reason}:")
            for test in tests:
                terminalreporter.line(f"  {test}")
        for tier in self.tiers.values():
            terminalreporter.line(tier.line())
        for problem in self.problems:
            terminalreporter.line(f"FAILED: {problem}")

    def by_reason(self) -> dict[str, list[str]]:
        """Tests that were NOT RUN, by reason."""
        found: dict[str, list[str]] = {}
        for tier in self.tiers.values():
            for test, reason in tier.not_run.items():
                found.setdefault(reason, []).append(test)
        return found

    def markdown(self) -> str:
        lines = ["| tier | result | passed | failed | NOT RUN |", "|---|---|---|---|---|"]
        for tier in self.tiers.values():
            result = tier.verdict if tier.verdict != "NOT RUN" else f"NOT RUN: {tier.reason}"
            lines.append(f"| {tier.name} | {result} | {tier.passed} | {tier.failed} | {len(tier.not_run)} |")
        for reason, tests in self.by_reason().items():
            lines += ["", f"NOT RUN, {reason}:", "", *(f"- `{test}`" for test in tests)]
        lines += [f"\n**FAILED: {problem}**" for problem in self.problems]
        return "\n".join(lines) + "\n"


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ").rpartition("NOT RUN: ")[2]
