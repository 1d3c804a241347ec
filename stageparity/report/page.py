"""The run as one self-contained page, for a browser without a network.

First what is wrong by itself and whose error it is, then every case and every stage, a heat map of the worst case by row, what
was NOT RUN, and the fingerprint. Noise and the weakest fault of a stage are drawn where they have been measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jinja2
import markupsafe

from stageparity.report import figures, verdict
from stageparity.report.verdict import Context
from stageparity.run import CaseRun, Row, Run
from stageparity.strict import printable

__all__ = ["render", "worst_case"]

_WHOLE = 14  # letters that a phone's column holds
_TEXTS = 12  # failure texts shown per case; the rest is one command away


def render(run: Run, context: Context) -> str:
    """The page as text. Names out of files are escaped for HTML, and what a terminal or a browser would obey is shown as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stageparity.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["num"] = verdict.short
    environment.filters["parted"] = _parted
    guilty = verdict.findings(run, context.stages)
    worst = guilty[0].first[0] if guilty else worst_case(run)
    page = environment.get_template("page.html.j2").render(
        run=run,
        verdict=verdict.WORDS[run.exit_code],
        headline=verdict.headline(run, context),
        summary=verdict.summary(run),
        conclusion=verdict.conclusion(run, context),
        head=_finding(guilty[0], run, context) if guilty else None,
        findings=[_finding(found, run, context) for found in guilty],
        closest=_closest(run),
        cases=[_case(case, context, worst) for case in run.cases],
        notes=[(case.name, note) for case in run.cases for note in case.notes],
        not_run=[(case.name, names, why) for case in run.cases for names, why in verdict.grouped(case.not_run)],
        heat=_heat(worst) if worst else None,
        drawn={"noise": bool(context.references.noise), "faults": bool(context.references.faults)},
        axis=figures.AXIS,
        levels=_level_names(),
        about=run.about,
        fingerprint=_flat(run.fingerprint),
        sections=_sections(context),
    )
    return printable(page, keep="\n")


def worst_case(run: Run) -> CaseRun | None:
    """The case closest to a budget."""
    return max((case for case in run.cases if case.rows), key=_top_ratio, default=None)


def _top_ratio(case: CaseRun) -> float:
    return max((r.ratio for row in case.rows for r in row.results), default=0.0)


def _closest(run: Run) -> list[tuple[str, str, float]]:
    """(case, stage, ratio) of the stages nearest to their budget, the nearest first."""
    every = [(case.name, row.stage, max(r.ratio for r in row.results)) for case in run.cases for row in case.rows]
    return sorted(every, key=lambda entry: -entry[2])[:5]


def _finding(found: verdict.Finding, run: Run, context: Context) -> dict[str, Any]:
    case, row = found.first
    assert row.failed is not None
    entry = context.stages.find(row.stage)
    local = row.alone.ratio if row.alone else None
    came = verdict.inherited(row)
    return {
        "case": case.name,
        "anchor": _anchor(case),
        "stage": row.stage,
        "name": found.name,
        "places": len(found.rows),
        "over": verdict.over(found),
        "what": entry[0].what if entry else "",
        "spec": entry[0].spec if entry else "",
        "whose": found.whose,
        "split": verdict.split(row),
        "local": local,
        "inherited": came,
        "bars": {
            "local": None if local is None else figures.strip({"alone": local}),
            "inherited": None if came is None else figures.strip({"chained": came}),
        },
        "text": row.failed.text(),
        "alike": verdict.some(verdict.lookalikes(case, row.stage, context)),
        "rerun": verdict.rerun(case, row, run, context),
        "more": sum(not r.ok for r in case.rows) - 1,
    }


def _case(case: CaseRun, context: Context, worst: CaseRun | None) -> dict[str, Any]:
    texts = 0
    rows = []
    for row in case.rows:
        guilty = row.kind in verdict.GUILTY or row is case.first_divergence
        show_text = not row.ok and guilty and texts < _TEXTS
        texts += show_text
        rows.append(_row(row, context, show_text))
    different = sum(not row.ok for row in case.rows)
    return {
        "name": case.name,
        "anchor": _anchor(case),
        "reference": case.reference,
        "seconds": case.seconds,
        "rows": rows,
        "different": different,
        "not_run": len(case.not_run),
        "top": verdict.short(_top_ratio(case)) if case.rows else "-",
        "open": case is worst,
    }


def _row(row: Row, context: Context, show_text: bool) -> dict[str, Any]:
    shown, found, name = row.shown, context.stages.find(row.stage), context.stages.template_of(row.stage)
    exact = shown.rule.max_abs == 0.0
    marks = {
        "noise": context.references.noise.get(name),
        "fault": context.references.faults.get(name),
        "chained": row.chained.ratio if row.chained else None,
        "alone": row.alone.ratio if row.alone else None,
    }
    return {
        "stage": row.stage,
        "ok": row.ok,
        "spec": found[0].spec if found else "",
        "what": found[0].what if found else "",
        "strip": None if exact and row.ok else figures.strip(marks),
        "ratio": verdict.short(shown.ratio),
        "alone": verdict.short(row.alone.ratio if row.alone else None),
        "max": verdict.short(shown.errors.get("max")),
        "rms": verdict.short(shown.errors.get("rms")),
        "count": shown.count,
        "text": row.failed.text() if show_text and row.failed else None,
    }


def _heat(case: CaseRun) -> dict[str, Any]:
    rows = []
    for row in case.rows:
        shown = row.shown
        if shown.row_errors is None and row.ok:
            continue  # exact and equal: no error to colour
        at = list(shown.worst_row) if shown.worst_row is not None else "-"
        rows.append(
            {
                "stage": row.stage,
                "ok": row.ok,
                "svg": figures.heat_row(shown),
                "count": shown.row_errors.size if shown.row_errors is not None else shown.rows,
                "title": f"{row.stage}: worst row {at}, {verdict.short(shown.ratio)} of the budget",
            }
        )
    return {"case": case.name, "rows": rows}


def _level_names() -> list[str]:
    ends = [f"{end:g}" for end in figures.LEVELS]
    return [f"≤ {ends[0]}", *(f"≤ {end}" for end in ends[1:]), f"> {ends[-1]}"]


def _sections(context: Context) -> list[dict[str, Any]]:
    """Sections of the specification, each with the stages that it describes."""
    return [
        {
            "number": number,
            "anchor": "s" + number[1:],
            "title": title,
            "stages": [s for s in context.stages if s.spec.split(".")[0] == number],
        }
        for number, title in context.sections.items()
    ]


def _parted(stage: str) -> markupsafe.Markup:
    """A stage id that may break after its dots; within a long word of it after its underscores too, never between letters."""
    words = (word.split("_") if len(word) > _WHOLE else [word] for word in stage.split("."))
    return markupsafe.Markup(".<wbr>").join(markupsafe.Markup("_<wbr>").join(parts) for parts in words)


def _anchor(case: CaseRun) -> str:
    return "case-" + case.name.replace("/", "-")


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            out += _flat(value, f"{prefix}{key}.")
        else:
            out.append((prefix + key, str(value)))
    return out
