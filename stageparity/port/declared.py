"""Budgets that someone declares for a model that is approximate on purpose: 8-bit weights, a bfloat16 cache.

    [[group]]
    stages = "layer.*,mixer.*"      # shell patterns of stage ids, joined by commas; the first group that matches counts
    rms = 0.02                      # of the golden's rms: rms(d); max: max|d|. Fed goldens: its own error alone
    max = 0.2
    chained = {rms = 0.09, max = 1} # from raw inputs on, where what came before adds up; left out: the same
    reason = "weights in 8 bits, groups of 32: half a step is 1/510 of a group's range"

What is declared replaces the budget, never the comparison: a report still says how large the error is, how it grows along
the depth, and what it does to the answer.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import strict
from stageparity.golden import Golden, Whole
from stageparity.result import Rule
from stageparity.run import CaseRun
from stageparity.stage import Stages
from stageparity.tolerance import Tolerances

__all__ = ["Declared", "effects", "load"]

_SIZES = ("rms", "max")
_KEYS = {"stages", *_SIZES, "chained", "reason"}


@dataclass(frozen=True)
class Declared:
    """Stands in for `Tolerances`: a declared budget where a group names the stage, the project's elsewhere."""

    groups: Sequence[Mapping[str, Any]]
    others: Tolerances

    @property
    def stages(self) -> Stages:
        return self.others.stages

    def rule(self, gate: str, stage: str, case: str | None = None, **given: Any) -> Rule:
        """As `Tolerances.rule`; what is compared bit for bit stays so."""
        group = None if self.stages.is_exact(stage) else self.group(stage)
        own = {key: group[key] for key in _SIZES if key in group} if group else {}
        sizes = group.get("chained", own) if group and given.get("kind", "chained") == "chained" else own
        if group is None or not sizes:  # a stage may inherit an approximation and add none of its own
            return self.others.rule(gate, stage, case, **given)
        return Rule("declared", group["reason"], **sizes)

    def group(self, stage: str) -> Mapping[str, Any] | None:
        """The group that names a stage."""
        return next(
            (group for group in self.groups if any(fnmatch.fnmatchcase(stage, glob) for glob in _globs(group))), None
        )

    def idle(self, compared: Iterable[str]) -> list[str]:
        """A line for each pattern that matches none of the stages that were compared: a slip, or of another case."""
        stages = list(compared)
        return [
            f"group {n + 1}: {glob!r} matches none of the stages that were compared"
            for n, group in enumerate(self.groups)
            for glob in _globs(group)
            if not any(fnmatch.fnmatchcase(stage, glob) for stage in stages)
        ]


def _globs(group: Mapping[str, Any]) -> list[str]:
    return [glob.strip() for glob in group["stages"].split(",")]


def load(path: Path, others: Tolerances) -> Declared:
    """Read a file of declared budgets. Raises ValueError naming the group and field that cannot be used."""
    found = strict.read_toml(path)
    groups = found.get("group")
    if set(found) != {"group"} or not isinstance(groups, list) or not groups:
        raise ValueError(f"{path}: [[group]] tables are needed, each with stages, rms or max, and a reason")
    for n, group in enumerate(groups):
        where = f"{path}: group {n + 1}"
        if not isinstance(group, dict) or (unknown := sorted(set(group) - _KEYS)):
            said = f"unknown key {unknown[0]}" if isinstance(group, dict) else "no table"
            raise ValueError(f"{where}: {said}; known are {', '.join(sorted(_KEYS))}")
        for key in ("stages", "reason"):
            if not isinstance(group.get(key), str) or not group[key].strip():
                raise ValueError(f"{where}: {key} is needed, as text")
        chained = group.get("chained", {})
        if not isinstance(chained, dict) or set(chained) - set(_SIZES):
            raise ValueError(f"{where}: chained = {chained!r} must be a table of rms and max")
        sizes = [table[key] for table in (group, chained) for key in _SIZES if key in table]
        if not sizes or not all(type(x) in (int, float) and 0 < x < 1e3 for x in sizes):
            raise ValueError(
                f"{where}: rms or max is needed, a number above 0 and below 1000 (multiples of the golden's rms)"
            )
    return Declared(groups, others)


def effects(
    run: CaseRun, tensors: Mapping[str, np.ndarray], targets: Mapping[str, Golden], stages: Stages, logits: str
) -> list[str]:
    """What an approximation does, in lines: the error along the depth, and at the answer. logits: pattern of ids of logits."""
    lines = []
    for name, growth in _growth(run, stages).items():
        if len(growth) > 1:
            shown = growth if len(growth) <= 8 else [*growth[:3], *growth[-3:]]
            steps = ", ".join(f"{stage} {error:.1e}" for stage, error in shown)
            lines.append(
                f"error along the depth, {name}: {steps} of rms ({growth[-1][1] / growth[0][1]:.1f} times the first)"
            )
    for stage in fnmatch.filter(tensors, logits):
        golden = targets.get(stage)
        if isinstance(golden, Whole) and golden.array.shape == tensors[stage].shape:
            lines.append(f"{stage}: {_answer(tensors[stage], golden.array)}")
    return lines


def _growth(run: CaseRun, stages: Stages) -> dict[str, list[tuple[str, float]]]:
    """(stage, rms error) by family, of families along a loop of numbers."""
    found: dict[str, list[tuple[str, float]]] = {}
    for row in run.rows:
        entry = stages.find(row.stage)
        loops = [name for name in (entry[1] if entry else ()) if stages.places.get(name) and stages.places[name].loop]
        error = (row.chained or row.shown).errors.get("rms")
        if entry and loops and not entry[0].derived and error and entry[0].template.endswith("output"):
            found.setdefault(entry[0].name, []).append((row.stage, error))
    return found


def _answer(mine: np.ndarray, golden: np.ndarray) -> str:
    """Divergence of the two distributions over tokens, and how many best tokens change."""
    p, q = (_log_softmax(x.astype(np.float64)) for x in (golden, mine))
    kl = (np.exp(p) * (p - q)).sum(-1)
    changed = p.argmax(-1) != q.argmax(-1)
    first = f", the first at {[int(i) for i in np.argwhere(changed)[0]]}" if changed.any() else ""
    tokens = f"{int(changed.sum())} of {changed.size} best tokens change{first}"
    return f"KL {kl.mean():.1e} nats a token, at most {kl.max():.1e}; {tokens}"


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
