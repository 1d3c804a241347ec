"""What a parity run found, for a terminal and for machines. The HTML page is `html.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vidi.parity.compare import Result
from vidi.parity.suite import CaseRun, Row, Run

__all__ = ["as_json", "diagnosis", "print_run", "rerun", "write_json"]


def diagnosis(case: CaseRun) -> list[str]:
    """The first diverging stage of a case, its error split into local and inherited, the failure text, and how to
    rerun just this. Empty where nothing differs."""
    row = case.first_divergence
    if row is None:
        return []
    lines = [f"{case.name}: first divergence at {row.stage} ({split(row)})"]
    shown = next(r for r in row.results if not r.ok)
    lines += [f"  {line}" for line in shown.text().splitlines()]
    return lines


def split(row: Row) -> str:
    """How much of a row's error is its own: errors as multiples of the budget."""
    if row.chained is None or row.isolated is None:
        return "not fed alone, so not split into local and inherited"
    return f"local {_times(row.isolated)}, inherited {_times(row.chained)} of the budget"


def _times(result: Result) -> str:
    return f"{result.ratio:.2g}×" if math.isfinite(result.ratio) else "∞"


def rerun(case: CaseRun, row: Row, run: Run) -> str:
    """One command that runs this stage of this case alone."""
    return f"vidi parity --case {case.name} --stage '{row.stage}' --dtype {run.dtype} --backend {run.backend}"


def print_run(run: Run, console: Console, *, verbose: bool = True) -> None:
    """A table of every stage, worst first divergence below it; plain text where the terminal cannot draw."""
    for case in run.cases:
        if verbose:
            console.print(_table(case))
        for stage, reason in _grouped(case.not_run).items():
            console.print(f"NOT RUN {case.name} {stage}: {reason}", soft_wrap=True, highlight=False)
    for case in run.cases:
        for line in diagnosis(case):
            console.print(line, style="red", soft_wrap=True, highlight=False, markup=False)
        if (row := case.first_divergence) is not None:
            console.print(f"  rerun: {rerun(case, row, run)}", soft_wrap=True, highlight=False, markup=False)
    console.print(summary(run), soft_wrap=True, highlight=False)


def summary(run: Run) -> str:
    """One line: how many stages were compared, how many differ, how many could not be judged."""
    rows = [row for case in run.cases for row in case.rows]
    different = sum(not row.ok for row in rows)
    missing = sum(len(case.not_run) for case in run.cases)
    verdict = "nothing compared" if run.nothing else f"{different} different" if different else "all equal"
    parts = [f"{len(rows)} stages of {len(run.cases)} cases in {run.dtype} with {run.backend}: {verdict}"]
    if missing:
        parts.append(f"{missing} NOT RUN")
    return ", ".join(parts)


def _grouped(not_run: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Stages that share a reason, in one line."""
    by_reason: dict[str, list[str]] = {}
    for stage, reason in not_run:
        by_reason.setdefault(reason.replace(stage, "STAGE"), []).append(stage)
    return {
        (names[0] if len(names) == 1 else f"{len(names)} stages ({names[0]} …)"): reason
        for reason, names in by_reason.items()
    }


def _table(case: CaseRun) -> Table:
    table = Table(title=f"{case.name} against {case.reference}, {case.seconds:.1f} s", title_justify="left", box=None)
    for name in ("stage", "verdict", "max|d|/rms", "rms(d)/rms", "of budget", "alone", "values"):
        table.add_column(name, justify="left" if name in ("stage", "verdict") else "right")
    for row in case.rows:
        shown = row.chained or row.isolated
        assert shown is not None
        table.add_row(
            row.stage,
            "equal" if row.ok else "DIFFERENT",
            *(_number(shown.errors.get(key)) for key in ("max", "rms")),
            _number(shown.ratio),
            _number(row.isolated.ratio if row.isolated else None),
            str(shown.count),
            style=None if row.ok else "red",
        )
    return table


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "0" if value == 0 else "∞" if math.isinf(value) else f"{value:.1e}"


def as_json(run: Run) -> dict[str, Any]:
    """The whole run as plain values; infinities become null."""
    return {
        "verdict": {0: "equal", 1: "different", 3: "nothing compared"}[run.exit_code],
        "exit_code": run.exit_code,
        "dtype": run.dtype,
        "backend": run.backend,
        "fingerprint": run.fingerprint,
        "cases": [
            {
                "case": case.case,
                "set": case.set,
                "reference": case.reference,
                "seconds": round(case.seconds, 3),
                "first_divergence": case.first_divergence.stage if case.first_divergence else None,
                "stages": [_row_json(row) for row in case.rows],
                "not_run": [{"stage": stage, "reason": reason} for stage, reason in case.not_run],
            }
            for case in run.cases
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "stage": row.stage,
        "ok": row.ok,
        "chained": _result_json(row.chained),
        "isolated": _result_json(row.isolated),
    }


def _result_json(result: Result | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "ok": result.ok,
        "ratio": _finite(result.ratio),
        "errors": {key: _finite(value) for key, value in result.errors.items()},
        "budgets": {key: _finite(value) for key, value in result.budgets.items()},
        "values": result.count,
        "rule": result.rule.name,
        "why": result.rule.why,
        "problems": list(result.problems),
        "text": None if result.ok else result.text(),
    }


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def write_json(run: Run, path: Path, extra: Mapping[str, Any] | None = None) -> None:
    path.write_text(json.dumps(as_json(run) | dict(extra or {}), indent=1, allow_nan=False) + "\n", encoding="utf-8")
