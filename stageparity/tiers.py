"""Tiers of a test suite: every run ends by saying of each tier whether it passed, failed or was NOT RUN, and why.

A project declares its tiers in pytest's ini file, the one of tests without a marker first; the others are markers:

    stageparity_tiers =
        cpu
        slow: takes minutes
        gpu: needs a GPU

A run that names no marker (`pytest`) selects the first tier, and a test that is named by its id runs whatever its tier. What a
test cannot run it reports through `not_run`, and it is listed by name; every other skip or expected failure fails the run, and
so does a run in which no test ran at all. What this machine lacks for a tier says the hook `pytest_stageparity_missing`;
`--rehearse` runs such tests all the same, and the run fails at its end. Without that ini entry nothing here acts.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NoReturn

import pytest
from _pytest.junitxml import xml_key
from _pytest.outcomes import Skipped

from stageparity import atomic

__all__ = ["NotRun", "Tier", "Tiers", "not_run"]


class NotRun(Skipped):
    """The only way to end a test without a verdict where a project has tiers; any other skip fails the run."""


def not_run(reason: str) -> NoReturn:
    """End the test, or the collection of its module, as NOT RUN: `reason` names what is missing and where to get it."""
    raise NotRun("NOT RUN: " + reason, allow_module_level=True)


@dataclass
class Tier:
    """What became of one tier's tests in this run. missing: what this machine lacks for it."""

    name: str
    missing: str | None = None
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
        if self.missing:
            return self.missing
        if not self.collected:
            return "no such test among those collected"
        if not self.selected:
            return f"not selected; pytest -m {self.name}"
        return next(iter(self.not_run.values()), "interrupted")

    def line(self) -> str:
        """One line for people: `gpu: NOT RUN (no GPU)`."""
        if self.verdict == "NOT RUN":
            return f"{self.name}: NOT RUN ({self.reason})"
        counts = [f"{self.passed} passed"] + [f"{self.failed} failed"] * bool(self.failed)
        counts += [f"{len(self.not_run)} NOT RUN"] * bool(self.not_run)
        return f"{self.name}: {self.verdict} ({', '.join(counts)})"


class Tiers:
    """The plugin of one run; `stageparity.plugin` registers it where a project declares tiers."""

    def __init__(self, config: pytest.Config, declared: list[str]) -> None:
        texts = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in declared)}
        self.config = config
        self.default, *self.marked = texts
        self.tiers = {name: Tier(name, self._missing(name)) for name in texts}
        self.rehearsed: set[str] = set()
        self.problems: list[str] = []
        for name in self.marked:
            config.addinivalue_line("markers", f"{name}: {texts[name]}")
        if self.marked and not config.option.markexpr and not any("::" in arg for arg in config.args):
            config.option.markexpr = " and ".join(f"not {name}" for name in self.marked)

    def _missing(self, tier: str) -> str | None:
        return self.config.hook.pytest_stageparity_missing(config=self.config, tier=tier)

    def tier_of(self, item: pytest.Item) -> Tier:
        """The last declared of an item's tiers."""
        return self.tiers[next((n for n in reversed(self.marked) if item.get_closest_marker(n)), self.default)]

    # ---- what pytest asks --------------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_itemcollected(self, item: pytest.Item) -> None:
        self.tier_of(item).collected += 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            self.tier_of(item).selected += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if (lacking := self._lacking(item)) and not self.config.option.rehearse:
            not_run(lacking)

    def _lacking(self, item: pytest.Item) -> str | None:
        """What this machine lacks for any of an item's tiers."""
        tiers = [
            tier for name, tier in self.tiers.items() if tier is self.tier_of(item) or item.get_closest_marker(name)
        ]
        return next((tier.missing for tier in tiers if tier.missing), None)

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        if report.skipped and "NOT RUN: " not in str(report.longrepr):
            report.outcome = "failed"
            report.longrepr = f"{collector.nodeid}: skipped outside not_run ({report.longrepr})"
        elif report.skipped:
            # A module that cannot be collected holds tests nobody could count: it stands for them by its own name.
            self.tiers[self.default].not_run[collector.nodeid] = _reason(report)
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if hasattr(report, "wasxfail"):
            report.outcome, report.longrepr = "failed", f"expected failures are not used here: {report.wasxfail}"
            del report.wasxfail
        elif report.skipped and not (call.excinfo and isinstance(call.excinfo.value, NotRun)):
            report.outcome, report.longrepr = "failed", f"skipped outside not_run: {_reason(report)}"
        # On the report itself, so that it also arrives from another process (pytest-xdist).
        vars(report).update(tier=self.tier_of(item).name, lacking=self._lacking(item))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A report that xdist makes for a worker that died has neither.
        tier, lacking = self.tiers[getattr(report, "tier", self.default)], getattr(report, "lacking", None)
        if report.skipped:
            tier.not_run[report.nodeid] = _reason(report)
            return
        if lacking:
            self.rehearsed.add(lacking)
        if report.failed:
            tier.failed += 1
        elif report.when == "call":
            tier.passed += 1

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workerinput"):
            return  # a worker of pytest-xdist: the process that reads its reports sums up
        if not self.config.option.collectonly:
            ran = sum(tier.passed + tier.failed for tier in self.tiers.values())
            if not ran and (session.items or self.by_reason()):
                self.problems.append("no test ran")
            for reason in sorted(self.rehearsed):
                self.problems.append(f"only a rehearsal: {reason}")
            if self.problems and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        xml = self.config.stash.get(xml_key, None)
        for tier in self.tiers.values():
            if xml is not None:
                xml.add_global_property(f"tier.{tier.name}", tier.line())
        if path := self.config.option.tiers_md:
            atomic.write_text(path, self.markdown())

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

    # ---- what is told ------------------------------------------------------------------------------------------------------

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
