"""What a run means, in sentences: whose error it is, how far over, how sure that is, and what to type next.

Errors are shown as multiples of what the rule allows ("of budget", 1 = just equal).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.faults.plant import Fault, own_stages
from stageparity.port.explain import Explanation
from stageparity.run import CaseRun, Row, Run
from stageparity.stage import Stages

__all__ = [
    "GUILTY", "WORDS", "Context", "Finding", "References", "conclusion", "findings", "headline", "inherited", "lookalikes",
    "number", "over", "rerun", "short", "some", "split", "summary", "whose",
]  # fmt: skip

WORDS = {0: "equal", 1: "different", 2: "traced in another way", 3: "nothing compared"}  #: of a run's exit code
GUILTY = ("stage", "wiring", "tracing")  # kinds of rows that differ by themselves
_NAMES = 6  # of known faults listed beside a divergence
WHOSE = {
    "stage": "its own error: fed its golden inputs alone, it differs",
    "wiring": "an error of what feeds it or takes its result, {file}: fed goldens in the run it differs{alone}",
    "inherited": "inherited: fed its golden inputs, it is within its budget",
    "chained": "not told apart: it cannot be fed alone",
    "tracing": "how it is traced, not the model: {tracing}",
}


@dataclass(frozen=True)
class References:
    """What an error is held beside, as multiples of the stage's budget: the largest noise seen, the weakest fault that must be
    caught. Both by the entry's name; either may be empty."""

    noise: Mapping[str, float] = field(default_factory=dict)
    faults: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, measured: Path, dtype: str, stages: Stages) -> References:
        """From ``noise.json`` and ``faults.json`` of a golden folder's ``measured``. What is not there, or was measured in
        another dtype, stays empty."""
        noise = _inside(_read(measured / "noise.json"), "noise_by_stage", dtype)
        weakest: dict[str, float] = {}
        planted = _read(measured / "faults.json")
        lower = _inside(planted, "dtypes", dtype, "margins")  # those of another dtype that are seen here
        found = planted.get("faults", [])
        for fault in (f for f in (found if isinstance(found, list) else []) if isinstance(f, dict)):
            if any(fault.get(key) for key in ("crashed", "loud", "not_run")):
                continue
            margin = fault.get("margin") if fault.get("dtype") == dtype else lower.get(str(fault.get("name")))
            stage = fault.get("expected_stage")
            if isinstance(stage, str) and stage and isinstance(margin, int | float):  # null: an exact stage differs
                key = stages.template_of(stage)
                weakest[key] = min(margin, weakest.get(key, math.inf))
        return cls({stage: ratio for stage, ratio in noise.items() if isinstance(ratio, int | float)}, weakest)


def _read(path: Path) -> dict[str, Any]:
    try:
        return strict.read_json(path, inside=path.parents[1])
    except strict.Missing:
        return {}


def _inside(found: Any, *keys: str) -> dict[str, Any]:
    """The table under these keys; an empty one where something else stands there: what is drawn beside figures judges nothing."""
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Context:
    """What a report says beside a run's figures. sections: titles of the specification. faults: known ones, by name.
    command: how a rerun begins; options: how it ends. explained: SET/CASE -> which faults make its tensors
    (`stageparity.port.explain`), where that was asked."""

    stages: Stages
    sections: Mapping[str, str] = field(default_factory=dict)
    faults: Mapping[str, Fault] = field(default_factory=dict)
    references: References = field(default_factory=References)
    command: tuple[str, ...] = ("parity",)
    options: tuple[str, ...] = ()
    seen: str = ""  #: of a foreign model that differs nowhere: how much of it was seen
    sure: tuple[str, ...] = ()  #: what else is known of the first finding
    explained: Mapping[str, Sequence[Explanation]] = field(default_factory=dict)

    def what(self, stage_id: str) -> str:
        """A few words on a stage, with its section; nothing for an id that nobody knows."""
        found = self.stages.find(stage_id)
        return f"{found[0].what} ({found[0].spec} of the specification)" if found else ""


# ---- findings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One stage family that is convicted, and where. kind: whose error (`Row.kind`)."""

    name: str
    kind: str
    rows: tuple[tuple[CaseRun, Row], ...]

    @property
    def first(self) -> tuple[CaseRun, Row]:
        return self.rows[0]

    @property
    def ratio(self) -> float:
        return max(row.failed.ratio for _, row in self.rows if row.failed)

    @property
    def whose(self) -> str:
        return whose(self.first[1])


def whose(row: Row) -> str:
    """Whose error a row that differs is, in a sentence."""
    if row.said and row.kind != "inherited":
        return row.said
    alone = " and alone it does not" if row.alone is not None else ", and it cannot be fed alone"
    return WHOSE[row.kind].format(file=row.wiring or "its caller", alone=alone, tracing=row.tracing)


def findings(run: Run, stages: Stages) -> list[Finding]:
    """Everything that is wrong by itself, in pipeline order: stages that differ when fed their golden inputs, alone or in a
    forced run. A case where nothing is, and that differs all the same, gives its first divergence."""
    found: dict[tuple[str, str], list[tuple[CaseRun, Row]]] = {}
    for case in run.cases:
        red = [row for row in case.rows if not row.ok]
        guilty = [row for row in red if row.kind in GUILTY] or red[:1]
        for row in guilty:
            found.setdefault((stages.template_of(row.stage), row.kind), []).append((case, row))
    made = [Finding(name, kind, tuple(rows)) for (name, kind), rows in found.items()]
    return sorted(made, key=lambda f: stages.order(f.first[1].stage))


def headline(run: Run, context: Context) -> str:
    """The verdict in one sentence."""
    if said := conclusion(run, context):
        return said[0]
    return context.seen if context.seen and not run.nothing else summary(run)


def conclusion(run: Run, context: Context) -> list[str]:
    """The three lines that a red run ends with: what is wrong and how far over, how sure that is, what to type next."""
    guilty = findings(run, context.stages)
    if not guilty:
        return []
    first = guilty[0]
    case, row = first.first
    where = f"{row.stage} of {case.name}" + (f", in {len(first.rows)} places" if len(first.rows) > 1 else "")
    others = [f.name for f in guilty[1:] if f.name != first.name]
    also = f" Also wrong by themselves: {some(list(dict.fromkeys(others)))}." if others else ""
    red = sum(not r.ok for c in run.cases for r in c.rows)
    convicted = sum(len(f.rows) for f in guilty)
    rest = (
        f"{red - convicted} of {red} rows that differ only inherit" if red > convicted else "nothing inherits from it"
    )
    noise, weakest = context.references.noise.get(first.name), context.references.faults.get(first.name)
    sure = [f"noise never passed {short(noise)} of this budget"] if noise is not None else []
    sure += [f"the weakest known fault here reaches {short(weakest)}"] if weakest is not None else []
    if (explained := _explained(case, row.stage, context)) is not None:
        sure.append(explained.text())
    elif alike := lookalikes(case, row.stage, context):
        sure.append(f"known faults of this stage: {some(alike)}")
    word = "TRACED IN ANOTHER WAY" if first.kind == "tracing" else "WRONG"
    return [
        f"{word}: {first.name} ({where}): {over(first)}, {first.whose}.{also}",
        f"how sure: {'; '.join([*context.sure, *sure, rest])}",
        f"next: {rerun(case, row, run, context)}",
    ]


def over(found: Finding) -> str:
    """How far over; where no multiple of a budget tells that (exact bits, padding that holds values, NaN), in what way."""
    failed = found.first[1].failed
    if math.isfinite(found.ratio):  # what is said beside it, of other circumstances, is of the first place
        here = "" if failed is None or failed.ratio > 0.5 * found.ratio else f" at most, {_times(failed.ratio)} there"
        return f"{_times(found.ratio)} its budget{here}"
    worst = next(row.failed for _, row in found.rows if row.failed and not math.isfinite(row.failed.ratio))
    ratios = [worst.errors[key] / budget for key, budget in worst.budgets.items() if budget]
    sized = [f"{_times(max(ratios))} its budget"] if ratios and math.isfinite(max(ratios)) else []
    return (
        "; ".join([*sized, *worst.problems[:1]])
        or f"{worst.elements_over} of {worst.count} values differ, where none may"
    )


def lookalikes(case: CaseRun, stage: str, context: Context) -> list[str]:
    """Names of known faults that this case reports first at this stage and as this row's kind, the most specific first: those
    whose code the fewest of its stages run. None for what is inherited. Where its tensors are those of a fault: that one."""
    explained = _explained(case, stage, context)
    if explained is not None and explained.recognised:
        return list(explained.faults)
    ids = [row.stage for row in case.rows]
    row = next(row for row in case.rows if row.stage == stage)
    if row.kind == "inherited":
        return []
    kinds = {"code": row.kind != "wiring" or row.alone is None, "wiring": row.kind != "stage"}
    owned: dict[str, list[str]] = {}
    for fault in context.faults.values():
        for entry in (entry for entry, possible in kinds.items() if possible):
            if own_stages(fault, context.stages, [stage], entry):
                owned.setdefault(fault.name, own_stages(fault, context.stages, ids, entry))
    return sorted((name for name, own in owned.items() if own[0] == stage), key=lambda name: len(owned[name]))


def _explained(case: CaseRun, stage: str, context: Context) -> Explanation | None:
    """What explains the stages among which this one is."""
    return next((e for e in context.explained.get(case.name, ()) if stage in e.stages), None)


def some(names: Sequence[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more


def rerun(case: CaseRun, row: Row, run: Run, context: Context) -> str:
    """One command that runs this stage of this case alone, quoted for a shell."""
    # What a run hands over beside the stage whose golden it borrows is judged with that.
    stage = row.stage if row.chained is None else context.stages.judged_as(row.stage)
    words = [*context.command, "--case", case.name, "--stage", stage, "--dtype", run.dtype, *context.options]
    return shlex.join(words)


# ---- figures ------------------------------------------------------------------------------------------------------------


def inherited(row: Row) -> float | None:
    """What of a row's chained error does not come from the stage itself, as a multiple of the budget.

    Independent errors add by their squares, so it is sqrt(chained² - local²), and 0 where the chained error is the local
    one within 1 %. None where the stage was not fed alone, or where its error has no size (exact values, NaN).
    """
    if row.chained is None or row.alone is None:
        return None
    total, local = row.chained.ratio, row.alone.ratio
    if math.isinf(local):
        return None
    if total <= 1.01 * local:
        return 0.0
    return math.sqrt(total**2 - local**2) if math.isfinite(total) else total


def split(row: Row) -> str:
    """How much of a row's error is its own, in multiples of the budget."""
    if row.chained is None:
        return "fed alone: a run does not hand it over"
    if row.alone is None:
        return "not fed alone, so not split into local and inherited"
    came = inherited(row)
    forced = f", forced {_times(row.forced.ratio)}" if row.forced is not None else ""
    return f"local {_times(row.alone.ratio)}{forced}, inherited {'not told apart' if came is None else _times(came)}"


def _times(ratio: float) -> str:
    return f"{short(ratio)}×" if math.isfinite(ratio) else "∞"


def short(value: float | None) -> str:
    """Two digits: 0.32, 1.5, 3.5e5; `-` for what was not measured."""
    if value is None or not math.isfinite(value):
        return number(value)
    text = f"{value:.2g}" if 1e-3 <= value < 1e4 else f"{value:.1e}" if value else "0"
    mantissa, _, exponent = text.partition("e")
    return f"{float(mantissa):g}" + (f"e{int(exponent)}" if exponent else "")


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
    parts = [f"{len(rows)} stages of {len(run.cases)} cases in {run.dtype}{_about(run.about)}: {verdict}"]
    return ", ".join(parts + [f"{missing} NOT RUN"] * bool(missing))


def _about(about: Mapping[str, str]) -> str:
    with_backend = f" with {about['backend']}" if "backend" in about else ""
    return with_backend + (f" on the {about['path']} path" if about.get("path", "plain") != "plain" else "")


def grouped(not_run: Sequence[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """(stages, reason) for stages that share a reason."""
    by_reason: dict[str, list[str]] = {}
    for stage, reason in not_run:
        by_reason.setdefault(reason.replace(stage, "STAGE"), []).append(stage)
    for reason, names in by_reason.items():
        yield names, reason.replace("STAGE", names[0] if len(names) == 1 else "STAGE")
