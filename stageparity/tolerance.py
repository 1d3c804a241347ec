"""Budgets from `tolerances.toml` and `measured/baselines.json` of a golden folder: which rule judges which stage.

A gate is named DTYPE-REFERENCE: the dtype of the run, and what it is held against: `none` (an oracle without casts),
`cast` (the oracle with the specification's casts) or `recorded` (recordings of a release). Numbers live in the files
alone; a gate without a reason, or a floor of 0 beside a baseline, is refused.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.result import EXACT, Result, Rule
from stageparity.stage import Stages

__all__ = [
    "BASELINES",
    "KINDS",
    "MARGINS",
    "METRICS",
    "NoBudget",
    "Tolerances",
    "baseline_of",
    "gate_name",
    "load",
    "read_baselines",
    "read_margins",
]

BASELINES = Path("measured") / "baselines.json"  # in a golden folder
MARGINS = Path("margins.json")

METRICS = ("rms", "max", "row", "head")
KINDS = ("chained", "isolated")  # from raw inputs, or fed the golden's inputs: each has baselines of its own
_BUDGETS = {"max", "rms", "row", "head", "max_abs", *(f"c_{m}" for m in METRICS)}
_NUMBERS = {*_BUDGETS, "sums", "bias_ulp", "floor_ulp", "eps"}
_FIELDS = {*_NUMBERS, "why", "like"}
_TABLES = {"stage", "isolated"}  # inside a gate's own table
_WHERE = {"glob", "cases"}  # what a stage's table is for


class NoBudget(ValueError):
    """No gate of this name, or none was ever measured: the stage cannot be judged. The text names what is missing."""


def gate_name(dtype: str, reference: str) -> str:
    """Name of the gate for a run in `dtype` held against `reference` (none, cast, recorded)."""
    return f"{dtype}-{reference}"


def baseline_of(results: list[Result]) -> dict[str, float]:
    """The worst error of several runs of one stage, as stored in baselines.json (multiples of the golden's rms)."""
    return {m: max(r.errors[m] for r in results) for m in METRICS if all(m in r.errors for r in results)}


@dataclass(frozen=True)
class Tolerances:
    """The loaded tables. stages: of the model that is judged. gates: NAME -> fields with a list `stage`. baselines: kind ->
    dtype -> SET/CASE -> stage -> errors. margins: SET/CASE -> stage of tokens -> for each row and step, how far the logit of a
    token that comes close lies below the golden token's, as a multiple of the logits' rms (`read_margins`)."""

    stages: Stages
    gates: Mapping[str, Mapping[str, Any]]
    baselines: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]]
    margins: Mapping[str, Mapping[str, Sequence[Sequence[Mapping[int, float]]]]] = field(default_factory=dict)

    def rule(
        self,
        gate: str,
        stage: str,
        case: str | None = None,
        baseline: Mapping[str, float] | None = None,
        *,
        kind: str = "chained",
    ) -> Rule:
        """The rule for a stage under a gate.

        case: SET/CASE, names the baseline in baselines.json and chooses budgets of its own cases; `baseline` gives it
        directly (errors as multiples of rms).
        kind: chained or isolated, whichever the stage was run. Raises NoBudget for an unknown gate, or where a
        baseline is needed and none was measured.
        """
        if self.stages.is_exact(stage):
            return EXACT
        if gate not in self.gates:
            raise NoBudget(f"no gate named {gate!r} in tolerances.toml: there are {', '.join(sorted(self.gates))}")
        fields = self._fields(gate, stage, case, kind)
        budgets: dict[str, Any] = {key: fields[key] for key in (*METRICS, "max_abs", "sums") if key in fields}
        factors = {m: fields[f"c_{m}"] for m in METRICS if f"c_{m}" in fields}
        if factors:
            measured = baseline
            if measured is None:
                measured = self._baseline(gate, fields.get("like", stage), case, kind)
            budgets |= {m: c * measured[m] for m, c in factors.items() if m in measured}
        ulps: dict[str, Any] = {key: float(fields.get(key, 0.0)) for key in ("bias_ulp", "floor_ulp", "eps")}
        return replace(Rule(gate, fields["why"]), **budgets, **ulps)

    def parts(self, gate: str, stage: str, case: str, *, kind: str) -> dict[str, tuple[float, float]]:
        """Of a rule's budgets those that are multiples of a baseline: metric -> (factor, the baseline's error)."""
        fields = self._fields(gate, stage, case, kind)
        factors = {m: fields[f"c_{m}"] for m in METRICS if f"c_{m}" in fields}
        measured = self._baseline(gate, fields.get("like", stage), case, kind) if factors else {}
        return {m: (c, measured[m]) for m, c in factors.items() if m in measured}

    def _fields(self, gate: str, stage: str, case: str | None, kind: str) -> dict[str, Any]:
        table = self.gates[gate]
        common = {key: value for key, value in table.items() if key not in _TABLES}
        if kind == "isolated":
            common |= table.get("isolated", {})
        for special in table.get("stage", ()):
            here = fnmatch.fnmatchcase(case or "", special.get("cases", "*"))
            if here and any(self._is_of(stage, glob) for glob in special["glob"].split(",")):
                own = {key: value for key, value in special.items() if key not in _WHERE}
                if _BUDGETS & set(own):  # a stage's budgets replace the gate's, all of them
                    common = {key: value for key, value in common.items() if key not in _BUDGETS}
                return common | own
        return common

    def _is_of(self, stage: str, glob: str) -> bool:
        """Does a stage match a shell pattern, or belong to a `@group` of the table's tags?"""
        return self.stages.tagged(stage, glob[1:]) if glob[0] == "@" else fnmatch.fnmatchcase(stage, glob)

    def _baseline(self, gate: str, stage: str, case: str | None, kind: str) -> Mapping[str, float]:
        dtype = gate.split("-")[0]
        try:
            return self.baselines[kind][dtype][case or ""][stage]
        except KeyError:
            raise NoBudget(
                f"no {kind} baseline for {dtype} {case} {stage} in {BASELINES}: measure and accept it (tools/study.py baselines)"
            ) from None


def load(folder: Path, stages: Stages) -> Tolerances:
    """Read tolerances.toml and the baselines of a golden folder.

    Raises ValueError naming the gate and field for an unknown field or one of another type, a missing reason, a number that is
    not positive, or a baseline gate without a floor; Refused for a file that is damaged, a link out of its folder, ...
    """
    path = folder / "tolerances.toml"
    gates = _table(path, "gate", strict.read_toml(path).get("gate", {}))
    for name, table in gates.items():
        _check(name, table, _TABLES)
        for entry in (table["isolated"],) if "isolated" in table else ():
            _check(f"{name}.isolated", entry, set())
        stages_of = table.get("stage", [])
        if not isinstance(stages_of, list):
            raise ValueError(f"gate {name}: stage = {stages_of!r} must be a list of tables")
        for entry in stages_of:
            _check(name, entry, _WHERE)
            if not isinstance(entry.get("glob"), str) or not all(entry["glob"].split(",")):
                raise ValueError(f"gate {name}: glob = {entry.get('glob')!r} must be patterns of stage ids")
            if not isinstance(cases := entry.get("cases", "*"), str) or not cases:
                raise ValueError(f"gate {name}: cases = {cases!r} must be a pattern of SET/CASE")
        if "bias_ulp" in table and not ("sums" in table and "eps" in table):
            raise ValueError(f"gate {name}: bias_ulp widens sums in units of eps, and needs both")
        if any(f"c_{m}" in table for m in METRICS) and not (table.get("floor_ulp", 0) > 0 and table.get("eps", 0) > 0):
            raise ValueError(f"gate {name}: a budget from baselines needs floor_ulp and eps above 0")
    return Tolerances(stages, gates, read_baselines(folder / BASELINES), read_margins(folder / MARGINS))


def read_margins(path: Path) -> dict[str, dict[str, list[list[dict[int, float]]]]]:
    """`Tolerances.margins`, told by exact arithmetic along the golden's own text; empty without the file. A token that is not
    named comes nowhere close. Raises ValueError naming the case of what is not of this form."""
    try:
        stored = strict.read_json(path, inside=path.parent)
    except strict.Missing:
        return {}
    found: dict[str, Any] = {}
    for case, stages in _table(path, "margins", stored).items():
        try:
            found[case] = {
                stage: [[{int(token): float(m) for token, m in step.items()} for step in row] for row in rows]
                for stage, rows in stages.items()
            }
        except (AttributeError, TypeError, ValueError):
            raise ValueError(
                f"{path}: {strict.printable(case[:80])}: rows of steps of tokens and numbers are needed"
            ) from None
    return found


def read_baselines(path: Path) -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """kind -> dtype -> SET/CASE -> stage -> errors by metric; empty without the file.

    The file has a row for each stage of a case: for each of its `columns` ("KIND DTYPE") the errors in METRICS' order
    (head: where a stage has heads), or 0 where none were measured. Raises ValueError naming what is not of this form.
    """
    try:
        stored = strict.read_json(path, inside=path.parents[1])
    except strict.Missing:
        stored = {}
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    orders, columns = _table(path, "orders", stored.get("orders", {})), stored.get("columns", [])
    if not all(isinstance(dtypes, dict | list) for dtypes in orders.values()):
        raise ValueError(f"{path}: orders: the dtypes of each case are needed")
    if not isinstance(columns, list) or not all(
        isinstance(c, str) and c.split()[:1] in ([k] for k in KINDS) for c in columns
    ):
        raise ValueError(f"{path}: columns: names such as 'chained float32' are needed")
    for column, name in enumerate(columns):
        kind, _, dtype = name.partition(" ")
        found[kind][dtype] = {}
        for case, stages in _table(path, "errors", stored.get("errors")).items():
            own = {}
            for stage, row in _table(path, case, stages).items():
                if errors := _errors(path, f"{case} {stage}", row, column):
                    own[stage] = dict(zip(METRICS, errors, strict=False))
            if own or dtype in orders.get(case, ()):  # measured, and maybe nothing to measure
                found[kind][dtype][case] = own
    return found


def _errors(path: Path, name: str, row: Any, column: int) -> list[float]:
    errors = row[column] if isinstance(row, list) and len(row) > column else None
    if errors == 0:
        return []
    if not isinstance(errors, list) or not all(isinstance(e, int | float) and e >= 0 for e in errors):
        raise ValueError(f"{path}: {name}: a list of errors for each column is needed, or 0")
    return errors


def _table(path: Path, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {name}: a table is needed, found {type(value).__name__}")
    return value


def _check(name: str, entry: Any, more: set[str]) -> None:
    allowed = _FIELDS | more
    if not isinstance(entry, dict):
        raise ValueError(f"gate {name}: a table of numbers is needed, found {type(entry).__name__}")
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise ValueError(f"gate {name}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(allowed))}")
    if not isinstance(entry.get("why"), str) or not entry["why"].strip():
        raise ValueError(f"gate {name}: every number needs a reason in `why`")
    if not isinstance(entry.get("like", ""), str):
        raise ValueError(f"gate {name}: like = {entry['like']!r} must be the id of a stage")
    for key in _NUMBERS:
        value = entry.get(key)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"gate {name}: {key} = {value!r} must be a number above 0")
