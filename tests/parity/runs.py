"""Parity runs of whole golden cases, each done once however many tests read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from stageparity import fingerprint, manifest, store, tolerance
from stageparity.stage import sort_ids
from vidi.parity import feed, report, suite

__all__ = ["GOLDENS", "Task", "rows", "run", "tasks", "text_of"]

GOLDENS = Path(__file__).parents[2] / "goldens"
DTYPES = {"official": ("float32", "bfloat16", "float16"), "small": ("float64", "float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Task:
    """One golden case through one backend in one dtype."""

    set: str
    case: str
    backend: str
    dtype: str

    def id(self, stage: str) -> str:
        """`batch-layer.2.t2v-eager-float32`; a small case as `small.batch-…`."""
        case = self.case if self.set == "official" else f"{self.set}.{self.case}"
        return f"{case}-{stage}-{self.backend}-{self.dtype}"


def tasks() -> Iterator[tuple[Task, list[str]]]:
    """Every run of the CPU tier, and the rows that its case promises, from the manifests alone."""
    for ref in store.list_cases(GOLDENS):
        targets = manifest.parse(ref.folder / f"{ref.name}.json")["targets"]
        for dtype in DTYPES[ref.set]:
            stages = targets["recorded" if ref.set == "official" else "none" if dtype == "float64" else "official"]
            cached = [s.replace(".nocache.", ".cached.") for s in stages if s.endswith(".nocache.logits")]
            yield Task(ref.set, ref.name, "eager", dtype), [*sort_ids(stages), *cached]


@cache
def run(task: Task) -> suite.CaseRun:
    """The case through the model, judged."""
    with fingerprint.ieee():
        fingerprint.assert_ieee()
        case = store.open_case(GOLDENS / task.set, task.case)
        model = feed.load_model(case, feed.DTYPES[task.dtype], backend=task.backend)
        done, _ = suite.run_case(case, model, tolerance.load(GOLDENS), dtype=task.dtype)
    assert not done.not_run, f"not judged: {done.not_run}"
    return done


@cache
def rows(task: Task) -> Mapping[str, suite.Row]:
    """The judged rows of a run by stage."""
    return {row.stage: row for row in run(task).rows}


def text_of(task: Task, row: suite.Row, test: str) -> str:
    """What a failing test says: errors against budgets, local and inherited parts, faults that look like this, and how to
    run just this again."""
    shown = [r.text() for r in row.results if not r.ok]
    if near := report.lookalikes(run(task), row.stage):
        shown.append(f"looks like: {report.some(near)}")
    again = f"python -m pytest '{test}'"
    stage = row.stage.replace(".cached.", ".nocache.")
    command = f"vidi parity --case {task.set}/{task.case} --stage '{stage}' --dtype {task.dtype}"
    return "\n".join([report.split(row), *shown, f"rerun: {again}", f"   or: {command} --backend {task.backend}"])
