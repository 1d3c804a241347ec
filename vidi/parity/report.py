"""What a parity run found, for a terminal and for machines. The HTML page is `html.py`.

Errors are shown as multiples of the golden's rms, and as multiples of what the rule allows ("of budget", 1 = just equal).
The table is plain aligned text: a terminal adds colour, a narrow one loses columns, a file gets all of them. A stage id is
never cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from vidi.parity import faults, stages
from vidi.parity.compare import Result
from vidi.parity.faults import plant
from vidi.parity.suite import CaseRun, Row, Run

__all__ = [
    "as_json", "diagnosis", "grouped", "inherited", "lookalikes", "number", "print_run", "rerun", "short", "some",
    "split", "summary", "table", "write_json",
]  # fmt: skip

# Columns in the order of the line, and how early each gives way on a narrow terminal (0 = never).
_COLUMNS = {"stage": 0, "verdict": 0, "max|d|/rms": 2, "rms(d)/rms": 3, "of budget": 0, "alone": 1, "values": 4}
_NAMES = 6  # of known faults listed beside a divergence
_ASCII = str.maketrans({"×": "x", "∞": "inf", "§": "sec. ", "…": "...", "·": "*", "≤": "<=", "²": "^2"})


# ---- one divergence ------------------------------------------------------------------------------------------------------


def diagnosis(case: CaseRun, run: Run, options: str = "") -> list[str]:
    """The first diverging stage of a case: local or inherited, the failure text, faults that look like it, and one
    command that reruns just this. Empty where nothing differs. ``options``: what else that command needs."""
    row = case.first_divergence
    if row is None:
        return []
    lines = [f"{case.name}: first divergence at {row.stage} ({split(row)})"]
    if found := stages.find(row.stage):
        lines.append(f"  {found[0].what} ({found[0].spec} of the specification)")
    lines += [f"  {line}" for line in next(r for r in row.results if not r.ok).text().splitlines()]
    if alike := lookalikes(case, row.stage):
        lines.append(f"  faults that look like this: {some(alike)}")
    return [*lines, f"  rerun: {rerun(case, row, run, options)}"]


def inherited(row: Row) -> float | None:
    """What of a row's chained error does not come from the stage itself, as a multiple of the budget.

    Independent errors add by their squares, so it is sqrt(chained² - local²), and 0 where the chained error is the local
    one within 1 %. None where the stage was not fed alone, or where its error has no size (exact values, NaN).
    """
    if row.chained is None or row.isolated is None:
        return None
    total, local = row.chained.ratio, row.isolated.ratio
    if math.isinf(local):
        return None
    if total <= 1.01 * local:
        return 0.0
    return math.sqrt(total**2 - local**2) if math.isfinite(total) else total


def split(row: Row) -> str:
    """How much of a row's error is its own, in multiples of the budget."""
    if row.chained is None or row.isolated is None:
        return "not fed alone, so not split into local and inherited"
    came = inherited(row)
    return f"local {_times(row.isolated.ratio)}, inherited {'not told apart' if came is None else _times(came)}"


def _times(ratio: float) -> str:
    return f"{short(ratio)}×" if math.isfinite(ratio) else "∞"


def short(value: float | None) -> str:
    """Two digits: 0.32, 1.5, 3.5e5; `-` for what was not measured."""
    if value is None or not math.isfinite(value):
        return number(value)
    text = f"{value:.2g}" if 1e-3 <= value < 1e4 else f"{value:.1e}" if value else "0"
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}" + (f"e{int(exponent)}" if exponent else "")


def lookalikes(case: CaseRun, stage: str) -> list[str]:
    """Names of known faults that this case reports first at this stage, the most specific first: those whose code the
    fewest of its stages run. `vidi faults --list` tells what they do."""
    ids = [row.stage for row in case.rows]
    near = [fault for fault in faults.FAULTS.values() if plant.own_stages(fault, [stage])]
    owned = {fault.name: plant.own_stages(fault, ids) for fault in near}
    return sorted((name for name, own in owned.items() if own[0] == stage), key=lambda name: len(owned[name]))


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def rerun(case: CaseRun, row: Row, run: Run, options: str = "") -> str:
    """One command that runs this stage of this case alone."""
    stage = row.stage.replace(".cached.", ".nocache.")  # decoding step by step is judged with its target
    command = f"vidi parity --case {case.name} --stage '{stage}' --dtype {run.dtype} --backend {run.backend}"
    return f"{command} {options}".rstrip()


# ---- the terminal --------------------------------------------------------------------------------------------------------


def print_run(run: Run, console: Console, *, verbose: bool = True, options: str = "") -> None:
    """A table of every stage, what was NOT RUN, the first divergence of each case, and one line of summary."""
    say = _printer(console)
    for case in run.cases:
        if verbose:
            say(f"\n{case.name} against {case.reference}, {case.seconds:.1f} s")
            for line, ok in table(case, console.width if console.is_terminal else None):
                say(line, None if ok else "red")
        for note in case.notes:
            console.print(f"NOTE {case.name} {note}", soft_wrap=True, highlight=False, markup=False)
        for names, reason in grouped(case.not_run):
            some = names[0] if len(names) == 1 else f"{len(names)} stages ({names[0]} … {names[-1]})"
            say(f"NOT RUN {case.name} {some}: {reason}")
    for case in run.cases:
        for line in diagnosis(case, run, options):
            say(line, "red")
    say(summary(run))


def _printer(console: Console) -> Any:
    def say(line: str, style: str | None = None) -> None:
        if not console.encoding.lower().startswith("utf"):
            line = line.translate(_ASCII)
        console.print(line, style=style, soft_wrap=True, highlight=False, markup=False)

    return say


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
    shown = row.chained or row.isolated
    assert shown is not None
    return [
        row.stage,
        "equal" if row.ok else "DIFFERENT",
        number(shown.errors.get("max")),
        number(shown.errors.get("rms")),
        number(shown.ratio),
        number(row.isolated.ratio if row.isolated else None),
        str(shown.count),
    ]


def number(value: float | None) -> str:
    """Two digits, `-` for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    return "0" if value == 0 else "∞" if math.isinf(value) else f"{value:.1e}"


def summary(run: Run) -> str:
    """One line: how many stages were compared, how many differ, how many could not be judged."""
    rows = [row for case in run.cases for row in case.rows]
    different = sum(not row.ok for row in rows)
    missing = sum(len(case.not_run) for case in run.cases)
    verdict = "nothing compared" if run.nothing else f"{different} different" if different else "all equal"
    how = f"{run.dtype} with {run.backend}" + (" on the fast path" if run.path == "fast" else "")
    parts = [f"{len(rows)} stages of {len(run.cases)} cases in {how}: {verdict}"]
    if missing:
        parts.append(f"{missing} NOT RUN")
    return ", ".join(parts)


def grouped(not_run: Sequence[tuple[str, str]]) -> list[tuple[list[str], str]]:
    """(stages, reason) for stages that share a reason."""
    by_reason: dict[str, list[str]] = {}
    for stage, reason in not_run:
        by_reason.setdefault(reason.replace(stage, "STAGE"), []).append(stage)
    return [
        (names, reason.replace("STAGE", names[0] if len(names) == 1 else "STAGE"))
        for reason, names in by_reason.items()
    ]


# ---- machines ------------------------------------------------------------------------------------------------------------


def as_json(run: Run) -> dict[str, Any]:
    """The whole run as plain values; infinities become null."""
    return {
        "verdict": {0: "equal", 1: "different", 3: "nothing compared"}[run.exit_code],
        "exit_code": run.exit_code,
        "dtype": run.dtype,
        "backend": run.backend,
        "path": run.path,
        "fingerprint": run.fingerprint,
        "cases": [
            {
                "case": case.case,
                "set": case.set,
                "reference": case.reference,
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
