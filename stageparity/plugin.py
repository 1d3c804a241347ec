"""The pytest plugin: a test for every stage of every golden case, whose failure says whose error it is; and tiers (`tiers`).

A project says in a conftest.py what is held against what, and has its tests by a module that names them:

    def pytest_stageparity_subjects():                  # conftest.py
        return [Held("numpy", MySubject, ["float64"], store.list_cases(GOLDENS), tolerance.load(GOLDENS, STAGES))]

    from stageparity.plugin import test_every_stage_is_judged_once, test_stage  # a test module, this line alone

Their ids read CASE-STAGE-NAME-DTYPE. A case runs once in a dtype, however many tests read it. Tests of one's own may ask for
the same fixtures: `parity_task` and `parity_run` for each case and dtype, `parity_stage` too for each stage of them.

pytest loads this module wherever the package is installed: so nothing that costs time is imported until a test is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from stageparity.tiers import NotRun, Tiers, not_run

if TYPE_CHECKING:
    from stageparity.faults.plant import Fault
    from stageparity.report.verdict import Context
    from stageparity.run import CaseRun, Run
    from stageparity.store import CaseRef
    from stageparity.subject import Subject
    from stageparity.tolerance import Tolerances

__all__ = ["Held", "NotRun", "Task", "not_run", "test_every_stage_is_judged_once", "test_stage"]


@dataclass(frozen=True)
class Held:
    """Golden cases that a model is held against in some dtypes.

    name: the model's word in test ids. subject: makes it in a dtype, when a case first runs.
    prefix: of a case's word in test ids, where two sets have cases of one name. marks: of a case's tests, by its name.
    not_alone: a regular expression of stages that nothing feeds alone; all others must be judged alone (None: no such promise).
    faults: known ones, by name, for what a failure looks like. command, options: how a rerun without pytest begins and ends.
    """

    name: str
    subject: Callable[[str], Subject]
    dtypes: Sequence[str]
    cases: Sequence[CaseRef]
    tolerances: Tolerances
    prefix: str = ""
    marks: Mapping[str, Sequence[pytest.MarkDecorator]] = field(default_factory=dict)
    not_alone: str | None = None
    faults: Mapping[str, Fault] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Task:
    """One case in one dtype: its stages in pipeline order, and the judged run, made when it is first asked for."""

    held: Held
    ref: CaseRef
    dtype: str
    stages: tuple[str, ...]
    _made: list[Run | Exception] = field(default_factory=list)

    def id(self, word: str) -> str:
        """The test id of a stage, or of another word: `base-layer.1.output-numpy-float64`."""
        return f"{self.held.prefix}{self.ref.name}-{word}-{self.held.name}-{self.dtype}"

    @property
    def run(self) -> Run:
        """Raises RuntimeError, to every test that asks, where the run broke."""
        if not self._made:
            from stageparity import run as runs

            try:
                self._made.append(runs.run(self.held.subject(self.dtype), [self.ref], self.held.tolerances))
            except Exception as error:  # whatever it is, the next test would meet it again
                self._made.append(error)
        (made,) = self._made
        if isinstance(made, Exception):
            raise RuntimeError(
                f"{self.ref.set}/{self.ref.name} in {self.dtype}: {type(made).__name__}: {made}"
            ) from made
        return made

    def failure(self, stage: str, test: str) -> str:
        """What a failing test says: whose error it is, how much of it is local, forced and inherited, errors against budgets,
        faults that look like it, and how to run just this again. Empty where the stage is equal."""
        from stageparity.report import verdict

        (case,) = self.run.cases
        row = next((row for row in case.rows if row.stage == stage), None)
        if row is None:
            return (
                f"{stage} of {case.name} was not judged: {dict(case.not_run).get(stage, 'the run has no such stage')}"
            )
        if row.ok:
            return "" if any(r.count for r in row.results) else f"{stage} of {case.name}: nothing was compared"
        context = self._context()
        texts: dict[str, list[str]] = {}
        for name, result in (("alone", row.alone), ("forced", row.forced), ("chained", row.chained)):
            if result is not None and not result.ok:
                texts.setdefault(result.text(), []).append(name)
        lines = [
            verdict.whose(row),
            verdict.split(row),
            *(f"{', '.join(names)}: {text}" for text, names in texts.items()),
        ]
        if near := verdict.lookalikes(case, stage, context):
            lines.append(f"looks like: {verdict.some(near)}")
        lines.append(f"rerun: python -m pytest '{test}'")
        if self.held.command:
            lines.append(f"   or: {verdict.rerun(case, row, self.run, context)}")
        return "\n".join(lines)

    def _context(self) -> Context:
        from stageparity.report.verdict import Context

        held = self.held
        return Context(held.tolerances.stages, faults=held.faults, command=held.command, options=held.options)


class Hooks:
    """What a project may say in a conftest.py."""

    def pytest_stageparity_subjects(self, config: pytest.Config) -> Iterable[Held]:  # type: ignore[empty-body]
        """What is held against which goldens. A conftest.py speaks for the tests beside it and below."""

    @pytest.hookspec(firstresult=True)
    def pytest_stageparity_missing(self, config: pytest.Config, tier: str) -> str | None:
        """What this machine lacks to run the tests of a tier; None where nothing."""


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("stageparity_tiers", "tiers, one a line: NAME: what it is; the first has no marker", type="linelist")
    group = parser.getgroup("stageparity", "tiers (ini entry stageparity_tiers)")
    group.addoption("--tiers-md", metavar="FILE", help="write what became of each tier as markdown")
    group.addoption("--rehearse", action="store_true", help="run tests though this machine lacks what their tier needs")


def pytest_configure(config: pytest.Config) -> None:
    if declared := config.getini("stageparity_tiers"):
        config.pluginmanager.register(Tiers(config, declared), "stageparity-tiers")
    elif config.option.tiers_md or config.option.rehearse:
        raise pytest.UsageError("--tiers-md and --rehearse need tiers: declare them in the ini entry stageparity_tiers")


# ---- tests ---------------------------------------------------------------------------------------------------------------

_TASKS = pytest.StashKey[dict[frozenset[int], list[Task]]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.fixturenames
    if "parity_stage" in names:
        pairs = [(task, stage) for task in _tasks(metafunc) for stage in task.stages]
        params = [pytest.param(t, stage, id=t.id(stage), marks=_marks(t)) for t, stage in pairs]
        metafunc.parametrize(("parity_task", "parity_stage"), params)
    elif "parity_task" in names:
        params = [pytest.param(t, id=t.id("all"), marks=_marks(t)) for t in _tasks(metafunc)]
        metafunc.parametrize("parity_task", params)


def _tasks(metafunc: pytest.Metafunc) -> list[Task]:
    """What the conftest files above a test have held, as one task for all tests that read it. Raises UsageError for nothing."""
    from stageparity import run as runs

    hook = metafunc.definition.ihook.pytest_stageparity_subjects
    speakers = frozenset(id(impl.plugin) for impl in hook.get_hookimpls())
    known = metafunc.config.stash.setdefault(_TASKS, {})
    if speakers not in known:
        every = [held for said in hook(config=metafunc.config) for held in said]
        pairs = [(held, ref, dtype) for held in every for ref in held.cases for dtype in held.dtypes]
        known[speakers] = [Task(h, ref, d, tuple(runs.promised(ref, h.tolerances.stages, d))) for h, ref, d in pairs]
    if not known[speakers]:
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: no golden case is held against anything: return some from"
            " pytest_stageparity_subjects in a conftest.py above it"
        )
    return known[speakers]


def _marks(task: Task) -> Sequence[pytest.MarkDecorator]:
    return task.held.marks.get(task.ref.name, ())


@pytest.fixture
def parity_run(parity_task: Task) -> CaseRun:
    """The judged run of that case."""
    return parity_task.run.cases[0]


def test_stage(parity_task: Task, parity_stage: str, request: pytest.FixtureRequest) -> None:
    """A stage is equal to its golden, in every pass that could judge it."""
    if text := parity_task.failure(parity_stage, request.node.nodeid):
        pytest.fail(text, pytrace=False)


def test_every_stage_is_judged_once(parity_task: Task, parity_run: CaseRun) -> None:
    """What the manifest holds, the run judges: no stage falls out unseen, nor out of the pass that feeds it alone."""
    unseen = [f"{stage}: NOT RUN, {reason}" for stage, reason in parity_run.not_run]
    judged = {row.stage: row for row in parity_run.rows}
    unseen += [f"{stage}: promised and not judged" for stage in parity_task.stages if stage not in judged]
    unseen += [f"{stage}: judged and not promised" for stage in judged if stage not in parity_task.stages]
    if (pattern := parity_task.held.not_alone) is not None:
        alone = {stage for stage, row in judged.items() if row.alone is not None or re.match(pattern, stage)}
        unseen += [f"{stage}: not run alone" for stage in judged if stage not in alone]
    if unseen:
        pytest.fail("\n".join(unseen), pytrace=False)
