"""`vidi parity --html FILE`: the run as one self-contained page, for a browser without a network.

First what diverged first and whether the error is the stage's own, then every case and every stage, a heat map of the
worst case by token, what was NOT RUN, and the fingerprint. Noise and the weakest fault of a stage are drawn where the
golden folder holds them (`noise.json`, `faults.json`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from vidi.parity import figures, ids, report, stages, store
from vidi.parity.suite import CaseRun, Row, Run

__all__ = ["References", "render", "worst_case", "write"]

SPEC = {
    "§1": "Sizes of the released checkpoint",
    "§2": "Inputs",
    "§3": "Visual path",
    "§4": "Audio path",
    "§5": "Position embedding",
    "§6": "Text",
    "§7": "Decoder layer (decomposed attention)",
    "§8": "Head and loss",
    "§9": "Unpadding for varlen kernels",
}
_TEXTS = 12  # failure texts shown per case; the rest is one command away


@dataclass(frozen=True)
class References:
    """What an error is drawn beside, as multiples of the stage's budget: largest noise seen, weakest fault that must be
    caught. Both by the registry's template; either may be empty."""

    noise: Mapping[str, float]
    faults: Mapping[str, float]

    @classmethod
    def load(cls, folder: Path, dtype: str) -> References:
        """From ``noise.json`` (`tools/measure_noise.py`) and ``faults.json`` (`vidi faults --json`) of a golden folder.
        What is not there, or was measured in another dtype, stays empty."""
        noise = _read(folder / "noise.json").get("noise_by_stage", {}).get(dtype, {})
        weakest: dict[str, float] = {}
        planted = _read(folder / "faults.json")
        lower = planted.get("dtypes", {}).get(dtype, {}).get("margins", {})  # those of another dtype that are seen here
        for fault in planted.get("faults", []):
            if any(fault.get(key) for key in ("crashed", "loud", "not_run")):
                continue
            margin = fault.get("margin") if fault.get("dtype") == dtype else lower.get(fault.get("name"))
            if fault.get("expected_stage") and margin is not None:  # null: an exact stage differs
                key = stages.template_of(fault["expected_stage"])
                weakest[key] = min(margin, weakest.get(key, math.inf))
        return cls({stage: ratio for stage, ratio in noise.items() if ratio is not None}, weakest)

    def of(self, stage: str) -> tuple[float | None, float | None]:
        """(noise, weakest fault) of a stage id."""
        key = stages.template_of(stage)
        return self.noise.get(key), self.faults.get(key)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write(run: Run, path: Path, *, options: str = "", references: References | None = None) -> None:
    """Write the page, whole or not at all. ``options``: what else the rerun commands need."""
    if references is None:
        references = References.load(store.goldens_dir(), run.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(render(run, references, options))
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def render(run: Run, references: References, options: str = "") -> str:
    """The page as text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vidi.parity", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["num"] = report.short
    environment.filters["parted"] = _parted
    worst = worst_case(run)
    return environment.get_template("page.html.j2").render(
        run=run,
        verdict={0: "equal", 1: "different", 3: "nothing compared"}[run.exit_code],
        summary=report.summary(run),
        head=_divergence(worst, run, options) if worst and worst.first_divergence else None,
        alike=report.some(report.lookalikes(worst, worst.first_divergence.stage))
        if worst and worst.first_divergence
        else "",
        divergences=[_divergence(case, run, options) for case in run.cases if case.first_divergence],
        closest=_closest(run),
        cases=[_case(case, references, worst) for case in run.cases],
        notes=[(case.name, note) for case in run.cases for note in case.notes],
        not_run=[(case.name, names, why) for case in run.cases for names, why in report.grouped(case.not_run)],
        heat=_heat(worst) if worst else None,
        drawn={"noise": bool(references.noise), "faults": bool(references.faults)},
        axis=figures.AXIS,
        levels=_level_names(),
        fingerprint=_flat(run.fingerprint),
        sections=_sections(),
    )


def worst_case(run: Run) -> CaseRun | None:
    """The case that diverges at the earliest stage (of those, the one with the most stages judged); where none diverges,
    the one closest to a budget."""
    diverging = [case for case in run.cases if case.first_divergence is not None]
    if diverging:
        return min(diverging, key=lambda c: (*ids.order(c.first_divergence.stage)[:4], -len(c.rows)))  # type: ignore[union-attr]
    judged = [case for case in run.cases if case.rows]
    return max(judged, key=_top_ratio, default=None)


def _top_ratio(case: CaseRun) -> float:
    return max((r.ratio for row in case.rows for r in row.results), default=0.0)


def _closest(run: Run) -> list[tuple[str, str, float]]:
    """(case, stage, ratio) of the stages nearest to their budget, the nearest first."""
    every = [(case.name, row.stage, max(r.ratio for r in row.results)) for case in run.cases for row in case.rows]
    return sorted(every, key=lambda entry: -entry[2])[:5]


def _divergence(case: CaseRun, run: Run, options: str) -> dict[str, Any]:
    row = case.first_divergence
    assert row is not None
    found = stages.find(row.stage)
    failed = next(r for r in row.results if not r.ok)
    return {
        "case": case.name,
        "anchor": _anchor(case),
        "stage": row.stage,
        "what": found[0].what if found else "",
        "spec": found[0].spec if found else "",
        "origin": _origin(row),
        "split": report.split(row),
        "local": row.isolated.ratio if row.isolated else None,
        "inherited": report.inherited(row),
        "bars": {
            name: None if ratio is None else figures.strip({"chained" if name == "inherited" else "alone": ratio})
            for name, ratio in (
                ("local", row.isolated.ratio if row.isolated else None),
                ("inherited", report.inherited(row)),
            )
        },
        "text": failed.text(),
        "rerun": report.rerun(case, row, run, options),
        "more": sum(not r.ok for r in case.rows) - 1,
    }


def _origin(row: Row) -> str:
    if row.isolated is None:
        return "not fed alone"
    return (
        "inherited: alone, the stage is within its budget"
        if row.isolated.ok
        else "local: the stage differs when fed its golden inputs"
    )


def _case(case: CaseRun, references: References, worst: CaseRun | None) -> dict[str, Any]:
    texts = 0
    rows = []
    for row in case.rows:
        own = row.isolated is not None and not row.isolated.ok
        show_text = not row.ok and (own or row is case.first_divergence) and texts < _TEXTS
        texts += show_text
        rows.append(_row(row, references, show_text))
    different = sum(not row.ok for row in case.rows)
    return {
        "name": case.name,
        "anchor": _anchor(case),
        "reference": case.reference,
        "seconds": case.seconds,
        "rows": rows,
        "different": different,
        "not_run": len(case.not_run),
        "top": report.short(_top_ratio(case)) if case.rows else "-",
        "open": case is worst,
    }


def _row(row: Row, references: References, show_text: bool) -> dict[str, Any]:
    shown = row.chained or row.isolated
    assert shown is not None
    found = stages.find(row.stage)
    noise, fault = references.of(row.stage)
    exact = shown.rule.max_abs == 0.0
    marks = {
        "noise": noise,
        "fault": fault,
        "chained": row.chained.ratio if row.chained else None,
        "alone": row.isolated.ratio if row.isolated else None,
    }
    return {
        "stage": row.stage,
        "ok": row.ok,
        "spec": found[0].spec if found else "",
        "what": found[0].what if found else "",
        "strip": None if exact and row.ok else figures.strip(marks),
        "ratio": report.short(shown.ratio),
        "alone": report.short(row.isolated.ratio if row.isolated else None),
        "max": report.short(shown.errors.get("max")),
        "rms": report.short(shown.errors.get("rms")),
        "count": shown.count,
        "text": next(r for r in row.results if not r.ok).text() if show_text else None,
    }


def _heat(case: CaseRun) -> dict[str, Any]:
    rows = []
    for row in case.rows:
        shown = row.chained or row.isolated
        assert shown is not None
        if shown.row_errors is None and row.ok:
            continue  # exact and equal: no error to colour
        at = list(shown.worst_row) if shown.worst_row is not None else "-"
        rows.append(
            {
                "stage": row.stage,
                "ok": row.ok,
                "svg": figures.heat_row(shown),
                "count": shown.row_errors.size if shown.row_errors is not None else shown.rows,
                "title": f"{row.stage}: worst row {at}, {report.short(shown.ratio)} of the budget",
            }
        )
    return {"case": case.name, "rows": rows}


def _level_names() -> list[str]:
    ends = [f"{end:g}" for end in figures.LEVELS]
    return [f"≤ {ends[0]}", *(f"≤ {end}" for end in ends[1:]), f"> {ends[-1]}"]


def _sections() -> list[dict[str, Any]]:
    """Sections of the specification, each with the stages that it describes."""
    return [
        {
            "number": number,
            "anchor": "s" + number[1:],
            "title": title,
            "stages": [s for s in stages.STAGES if s.spec.split(".")[0] == number],
        }
        for number, title in SPEC.items()
    ]


def _parted(stage: str) -> markupsafe.Markup:
    """A stage id that may break after its dots."""
    return markupsafe.Markup(".<wbr>").join(stage.split("."))


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
