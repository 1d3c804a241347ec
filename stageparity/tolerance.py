"""Budgets from `tolerances.toml` and `measured/baselines.json` of a golden folder: which rule judges which stage.

A gate is named DTYPE-REFERENCE: the dtype of the run, and what it is held against: `none` (an oracle without casts),
`cast` (the oracle with the specification's casts) or `recorded` (recordings of a release). Numbers live in the files
alone; a gate without a reason, or a floor of 0 beside a baseline, is refused.
"""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stageparity.result import EXACT, Result, Rule
from stageparity.stage import Stages

__all__ = ["BASELINES", "KINDS", "METRICS", "Tolerances", "baseline_of", "gate_name", "load", "read_baselines"]

BASELINES = Path("measured") / "baselines.json"  # in a golden folder

METRICS = ("rms", "max", "row", "head")
KINDS = ("chained", "isolated")  # from raw inputs, or fed the golden's inputs: each has baselines of its own
_BUDGETS = {"max", "rms", "row", "head", "max_abs", *(f"c_{m}" for m in METRICS)}
_NUMBERS = {*_BUDGETS, "sums", "bias_ulp", "floor_ulp", "eps"}
_FIELDS = {*_NUMBERS, "why", "like"}
_TABLES = {"stage", "isolated"}  # inside a gate's own table


def gate_name(dtype: str, reference: str) -> str:
    """Name of the gate for a run in `dtype` held against `reference` (none, cast, recorded)."""
    return f"{dtype}-{reference}"


def baseline_of(results: list[Result]) -> dict[str, float]:
    """The worst error of several runs of one stage, as stored in baselines.json (multiples of the golden's rms)."""
    return {m: max(r.errors[m] for r in results) for m in METRICS if all(m in r.errors for r in results)}


@dataclass(frozen=True)
class Tolerances:
    """The loaded tables. stages: of the model that is judged. gates: NAME -> fields with a list `stage`. baselines: kind ->
    dtype -> SET/CASE -> stage -> errors."""

    stages: Stages
    gates: Mapping[str, Mapping[str, Any]]
    baselines: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]]

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

        case: SET/CASE, names the baseline in baselines.json; `baseline` gives it directly (errors as multiples of rms).
        kind: chained or isolated, whichever the stage was run. Raises ValueError for an unknown gate, or where a
        baseline is needed and none was measured.
        """
        if self.stages.is_exact(stage):
            return EXACT
        if gate not in self.gates:
            raise ValueError(f"no gate named {gate!r} in tolerances.toml: there are {', '.join(sorted(self.gates))}")
        fields = self._fields(gate, stage, kind)
        budgets: dict[str, Any] = {key: fields[key] for key in (*METRICS, "max_abs", "sums") if key in fields}
        factors = {m: fields[f"c_{m}"] for m in METRICS if f"c_{m}" in fields}
        if factors:
            measured = baseline
            if measured is None:
                measured = self._baseline(gate, fields.get("like", stage), case, kind)
            budgets |= {m: c * measured[m] for m, c in factors.items() if m in measured}
        ulps: dict[str, Any] = {key: float(fields.get(key, 0.0)) for key in ("bias_ulp", "floor_ulp", "eps")}
        return replace(Rule(gate, fields["why"]), **budgets, **ulps)

    def _fields(self, gate: str, stage: str, kind: str) -> dict[str, Any]:
        table = self.gates[gate]
        common = {key: value for key, value in table.items() if key not in _TABLES}
        if kind == "isolated":
            common |= table.get("isolated", {})
        for special in table.get("stage", ()):
            if any(self._is_of(stage, glob) for glob in special["glob"].split(",")):
                own = {key: value for key, value in special.items() if key != "glob"}
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
            raise ValueError(
                f"no {kind} baseline for {dtype} {case} {stage} in {BASELINES}: measure and accept it (tools/study.py baselines)"
            ) from None


def load(folder: Path, stages: Stages) -> Tolerances:
    """Read tolerances.toml and the baselines of a golden folder.

    Raises ValueError naming the gate and field for an unknown field, a missing reason, a number that is not positive,
    or a baseline gate without a floor.
    """
    gates = tomllib.loads((folder / "tolerances.toml").read_text("utf-8")).get("gate", {})
    for name, table in gates.items():
        _check(name, table, _TABLES)
        for entry in (table["isolated"],) if "isolated" in table else ():
            _check(f"{name}.isolated", entry, set())
        for entry in table.get("stage", ()):
            _check(name, entry, {"glob"})
        if "bias_ulp" in table and not ("sums" in table and "eps" in table):
            raise ValueError(f"gate {name}: bias_ulp widens sums in units of eps, and needs both")
        if any(f"c_{m}" in table for m in METRICS) and not (table.get("floor_ulp", 0) > 0 and table.get("eps", 0) > 0):
            raise ValueError(f"gate {name}: a budget from baselines needs floor_ulp and eps above 0")
    return Tolerances(stages, gates, read_baselines(folder / BASELINES))


def read_baselines(path: Path) -> dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]]:
    """kind -> dtype -> SET/CASE -> stage -> errors by metric; empty without the file.

    The file has a row for each stage of a case: for each of its `columns` ("KIND DTYPE") the errors in METRICS' order
    (head: where a stage has heads), or 0 where none were measured.
    """
    stored = json.loads(path.read_text("utf-8")) if path.exists() else {}
    found: dict[str, Any] = {kind: {} for kind in KINDS}
    for column, (kind, dtype) in enumerate(name.split() for name in stored.get("columns", ())):
        found[kind][dtype] = {}
        for case, stages in stored["errors"].items():
            own = {stage: dict(zip(METRICS, row[column], strict=False)) for stage, row in stages.items() if row[column]}
            if own or dtype in stored.get("orders", {}).get(case, ()):  # measured, and maybe nothing to measure
                found[kind][dtype][case] = own
    return found


def _check(name: str, entry: Mapping[str, Any], more: set[str]) -> None:
    allowed = _FIELDS | more
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise ValueError(f"gate {name}: unknown field {', '.join(unknown)}; known are {', '.join(sorted(allowed))}")
    if not str(entry.get("why", "")).strip():
        raise ValueError(f"gate {name}: every number needs a reason in `why`")
    for key in _NUMBERS:
        value = entry.get(key)
        if value is not None and not (isinstance(value, int | float) and value > 0):
            raise ValueError(f"gate {name}: {key} = {value!r} must be a number above 0")
