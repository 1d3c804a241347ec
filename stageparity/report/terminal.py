"""What a parity run found, for a terminal and for machines. The HTML page is `page.py`.

The table is plain aligned text: a terminal adds colour, a narrow one loses columns, a file gets all of them. A stage id is
never cut.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stageparity import strict
from stageparity.report import verdict
from stageparity.report.verdict import Context, number
from stageparity.result import Result
from stageparity.run import CaseRun, Row, Run

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["as_json", "diagnosis", "encodable", "print_run", "say", "table", "to_text"]

# Columns in the order of the line, and how early each gives way on a narrow terminal (0 = never).
_COLUMNS = {
    "stage": 0,
    "verdict": 0,
    "max|d|/rms": 3,
    "rms(d)/rms": 4,
    "of budget": 0,
    "alone": 1,
    "forced": 2,
    "values": 5,
}
_ASCII = str.maketrans({"×": "x", "∞": "inf", "§": "sec. ", "…": "...", "·": "*", "≤": "<=", "²": "^2"})


_SHOWN = 4  # findings told at length; the rest has a line each


def diagnoses(run: Run, context: Context) -> Iterator[str]:
    """What is wrong by itself, the first at length, and the reason of each budget once."""
    reasons: dict[str, None] = {}
    for n, found in enumerate(verdict.findings(run, context.stages)):
        yield from diagnosis(found, run, context)[: None if n < _SHOWN else 2]
        if n < _SHOWN and (failed := found.first[1].failed):
            reasons |= {f"budget {failed.rule.name}: {failed.rule.why}": None}
    yield from reasons


def diagnosis(found: verdict.Finding, run: Run, context: Context) -> list[str]:
    """What is wrong by itself: where, by how much, the failure text, faults that look like it, how to run just this."""
    case, row = found.first
    assert row.failed is not None
    more = f" and in {len(found.rows) - 1} more places" if len(found.rows) > 1 else ""
    lines = [f"{case.name}: {row.stage}{more} ({verdict.split(row)})", f"  {found.whose}"]
    if what := context.what(row.stage):
        lines.append(f"  {what}")
    lines += [f"  {line}" for line in row.failed.text(why=False).splitlines()]
    if alike := verdict.lookalikes(case, row.stage, context):
        lines.append(f"  faults that look like this: {verdict.some(alike)}")
    return [*lines, f"  rerun: {verdict.rerun(case, row, run, context)}"]


def print_run(run: Run, console: Console, context: Context, *, verbose: bool = True) -> None:
    """The verdict in a sentence, a table of every stage, what was NOT RUN, what is wrong by itself, and the verdict with its
    reasons at the end, where a long run leaves the eye."""

    def told(line: str, style: str | None = None) -> None:
        say(console, line, style)

    dashes = False
    if verbose:
        told(verdict.headline(run, context), "bold red" if run.exit_code else "bold")
    for case in run.cases:
        if verbose and case.rows:
            console.print()
            told(f"{case.name} against {case.reference}, {case.seconds:.1f} s")
            for line, ok in table(case, console.width if console.is_terminal else None):
                told(line, None if ok else "red")
            dashes |= any(row.alone is None or row.forced is None for row in case.rows)
        for note in case.notes:
            told(f"NOTE {case.name} {note}")
        for names, reason in verdict.grouped(case.not_run):
            shown = names[0] if len(names) == 1 else f"{len(names)} stages ({names[0]} … {names[-1]})"
            told(f"NOT RUN {case.name} {shown}: {reason}")
    if dashes:
        told("- = not fed alone, not forced: the case holds not all that feeds it, or nothing runs it so")
    for line in diagnoses(run, context):
        told(line, "red")
    told(verdict.summary(run))
    for line in verdict.conclusion(run, context):
        told(line, "red")


def say(console: Console, line: str, style: str | None = None) -> None:
    """One line: names come out of files of others, and a terminal would obey their controls and cannot show every letter."""
    console.print(encodable(line, console), style=style, soft_wrap=True, highlight=False, markup=False)


def encodable(line: str, console: Console) -> str:
    """The line without controls, in letters that the console's encoding has."""
    line = strict.printable(line)
    if console.encoding.lower().startswith("utf"):
        return line
    return line.translate(_ASCII).encode(console.encoding, "backslashreplace").decode(console.encoding)


def table(case: CaseRun, width: int | None = None) -> Iterator[tuple[str, bool]]:
    """Lines of a case's table and whether each is good news; ``width`` in columns, None = no limit."""
    cells = [list(_COLUMNS), *(_cells(row) for row in case.rows)]
    sizes = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    kept = list(range(len(_COLUMNS)))
    for i in sorted((i for i, rank in enumerate(_COLUMNS.values()) if rank), key=lambda i: -list(_COLUMNS.values())[i]):
        if width is not None and sum(sizes[k] + 2 for k in kept) > width:
            kept.remove(i)
    verdicts = [True, *(row.ok for row in case.rows)]
    for line, ok in zip(cells, verdicts, strict=True):
        parts = (line[i].ljust(sizes[i]) if i < 2 else line[i].rjust(sizes[i]) for i in kept)
        yield "  ".join(parts).rstrip(), ok


def _cells(row: Row) -> list[str]:
    shown = row.shown
    return [
        row.stage,
        "equal" if row.ok else "DIFFERENT",
        number(shown.errors.get("max")),
        number(shown.errors.get("rms")),
        number(shown.ratio),
        number(row.alone.ratio if row.alone else None),
        number(row.forced.ratio if row.forced else None),
        str(shown.count),
    ]


# ---- machines ------------------------------------------------------------------------------------------------------------


def as_json(run: Run, context: Context) -> dict[str, Any]:
    """The whole run as plain values; infinities become null."""
    guilty = verdict.findings(run, context.stages)
    first = guilty[0].first if guilty else None
    return {
        "verdict": verdict.WORDS[run.exit_code],
        "headline": verdict.headline(run, context),
        "exit_code": run.exit_code,
        "text": [verdict.summary(run), *verdict.conclusion(run, context)],
        "first_divergence": {"case": first[0].name, "stage": first[1].stage} if first else None,
        "findings": [
            {
                "stage": found.name,
                "kind": found.kind,
                "wiring": found.first[1].wiring,
                "ratio": _finite(found.ratio),
                "at": [{"case": case.name, "stage": row.stage} for case, row in found.rows],
            }
            for found in guilty
        ],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "dtype": run.dtype,
        **run.about,
        "fingerprint": run.fingerprint,
        "cases": [
            {
                "case": case.case,
                "set": case.set,
                "reference": case.reference,
                "golden": case.golden,
                "seconds": round(case.seconds, 3),
                "first_divergence": case.first_divergence.stage if case.first_divergence else None,
                "stages": [_row_json(row) for row in case.rows],
                "notes": list(case.notes),
                "not_run": [{"stage": stage, "reason": reason} for stage, reason in case.not_run],
            }
            for case in run.cases
        ],
    }


def _row_json(row: Row) -> dict[str, Any]:
    passes = {name: _result_json(getattr(row, name)) for name in ("chained", "forced", "alone")}
    return {"stage": row.stage, "ok": row.ok, "kind": row.kind or None, **passes}


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


def to_text(run: Run, context: Context) -> str:
    """`as_json` as a file's text."""
    return json.dumps(as_json(run, context), indent=1, allow_nan=False) + "\n"
