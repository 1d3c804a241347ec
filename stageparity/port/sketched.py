"""A case that is known by sketches alone: what its tracer is told, what it leaves in a tensor's place, how that is judged.

No run can go on with a sketch, so such a case is judged chained: the first stage that differs while all that feeds it is equal
is wrong by itself, and what comes after it may only inherit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import strict
from stageparity.compare import compare, compare_sketches
from stageparity.golden import Golden, GoldenError, Sketched
from stageparity.result import Result, Rule
from stageparity.sketch import Sketch, SketchSpec
from stageparity.stage import Axes, Stages
from stageparity.store import Case
from stageparity.subject import reference_of
from stageparity.tolerance import NoBudget, Tolerances, gate_name

__all__ = ["CHAINED_ONLY", "Shown", "Stored", "assembled", "held", "is_sketched", "reference", "rule_of"]

ERRORS = Path("measured") / "full.json"  # in a golden folder
VARIANT = "self"  # of goldens: the model's own, against which none but its own other runs are held
CHAINED_ONLY = (
    "chained only: the goldens are sketches, and no run can go on with one, so nothing was forced. Begin at the first stage "
    "that differs; what comes after it may only inherit"
)
PARTS = ("blocks", "block_max", "top_value", "sample_value")


def is_sketched(case: Case) -> bool:
    """Is a case known by sketches?"""
    return case.variants == (VARIANT,)


def reference(case: Case, dtype: str) -> tuple[str, str]:
    """(variant of the goldens, gate) that judge a foreign run in ``dtype``: as `reference_of`, also of a sketched case."""
    return (VARIANT, gate_name(dtype, VARIANT)) if is_sketched(case) else reference_of(case, dtype)


@dataclass(frozen=True)
class Stored:
    """Stands in for `Tolerances`: a sketched case is allowed multiples of what a plain run in half precision erred when that was
    measured. errors: stage -> errors by metric, multiples of the golden's rms."""

    errors: Mapping[str, Mapping[str, float]]
    others: Tolerances

    @classmethod
    def load(cls, goldens: Path, others: Tolerances) -> Stored:
        """From `ERRORS` of a golden folder; none without the file. Raises GoldenError for one that is damaged."""
        try:
            stages = strict.read_json(goldens / ERRORS, inside=goldens)["stages"]
            return cls({stage: {m: float(e) for m, e in own.items()} for stage, own in stages.items()}, others)
        except strict.Missing:
            return cls({}, others)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise GoldenError(f"{goldens / ERRORS}: damaged ({type(error).__name__}): restore it") from None

    @property
    def stages(self) -> Stages:
        return self.others.stages

    def check(self, case: Case, dtype: str) -> None:
        """Raises ValueError where a case's sketches cannot judge a run in ``dtype``: its masks alone would be compared."""
        if not is_sketched(case):
            return
        name, gate = f"{case.set}/{case.name}", gate_name(dtype, VARIANT)
        known = sorted(g.removesuffix(f"-{VARIANT}") for g in self.others.gates if g.endswith(f"-{VARIANT}"))
        if gate not in self.others.gates:
            raise ValueError(
                f"{name}: what its stages may err by is known of {', '.join(known)} alone: --dtype {known[0]}, not {dtype}"
            )
        if not self.errors:
            raise ValueError(f"{name}: {ERRORS} of its golden folder is missing, which says what its stages may err by")

    def rule(self, gate: str, stage: str, case: str | None = None, **given: Any) -> Rule:
        """As `Tolerances.rule`."""
        if gate.endswith(f"-{VARIANT}") and not self.stages.is_exact(stage):
            if stage not in self.errors:
                raise NoBudget(f"no error of {stage} is stored in {ERRORS}: what it may err by is not known")
            given["baseline"] = self.errors[stage]
        return self.others.rule(gate, stage, case, **given)


def rule_of(targets: Mapping[str, Golden], stages: Stages) -> dict[str, Any]:
    """What a tracer must know to sketch as the goldens are: their spec, and of each sketched stage the axes that tell rows apart
    and the places of the golden's largest entries. Raises ValueError where goldens were sketched by several rules."""
    golden = {stage: g for stage, g in targets.items() if isinstance(g, Sketched)}
    specs = {g.sketch.spec for g in golden.values()}
    if len(specs) != 1:
        raise ValueError(f"{len(specs)} rules of sketching among the goldens of one case, one is needed")
    spec = {key: value for key, value in asdict(specs.pop()).items() if key != "top"}
    return spec | {
        "stages": {
            stage: {"rows": list(stages.axes(stage).of(len(g.shape))[0]), "top": g.sketch.top_index.tolist()}
            for stage, g in golden.items()
        }
    }


@dataclass(frozen=True)
class Shown:
    """What a tracer left in a tensor's place: shape and dtype, and a sketch where the shape is the golden's."""

    shape: tuple[int, ...]
    dtype: str
    sketch: Sketch | None = None


def assembled(
    said: Mapping[str, Any], tensors: Mapping[str, np.ndarray], targets: Mapping[str, Golden]
) -> dict[str, np.ndarray | Shown]:
    """The stages of a sketched dump. said: its header; tensors: what it holds, sketches in parts (``STAGE/blocks``).

    Raises ValueError for sketches by another rule than the golden's, and for parts that are missing or of another form.
    """
    spec, shapes, dtypes = said["sketch"], said.get("shapes"), said.get("dtypes")
    if not (isinstance(spec, dict) and isinstance(shapes, dict) and isinstance(dtypes, dict)):
        raise ValueError("it does not say by which rule it sketched which shapes and dtypes")
    found: dict[str, np.ndarray | Shown] = {name: x for name, x in tensors.items() if "/" not in name}
    for stage, shape in shapes.items():
        golden, dtype = targets.get(stage), str(dtypes.get(stage))
        if stage in found:
            continue
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"{stage}: {shape!r} is no shape")
        if not isinstance(golden, Sketched) or tuple(shape) != golden.shape:
            found[stage] = Shown(tuple(shape), dtype)
            continue
        theirs = golden.sketch.spec
        for key, value in asdict(theirs).items():
            if key != "top" and spec.get(key) != value:
                raise ValueError(f"sketched with {key} {spec.get(key)}, the golden has {value}")
        found[stage] = Shown(golden.shape, dtype, _sketch(stage, tensors, golden.sketch, theirs))
    return found


def _sketch(stage: str, tensors: Mapping[str, np.ndarray], golden: Sketch, spec: SketchSpec) -> Sketch:
    if missing := [part for part in PARTS if f"{stage}/{part}" not in tensors]:
        raise ValueError(f"{stage}: its sketch has no {missing[0]}")
    blocks, block_max, top, samples = (tensors[f"{stage}/{part}"] for part in PARTS)
    squares = math.nan  # of a candidate nobody asks how large it is
    made = Sketch(spec, golden.rows, golden.columns, blocks, block_max, golden.top_index, top, samples, squares)
    if problem := made.problem():
        raise ValueError(f"{stage}: {problem}")
    return made


def held(stage: str, mine: np.ndarray | Shown, golden: Golden, rule: Rule, axes: Axes) -> Result:
    """A candidate's tensor, or what stands in its place, against its golden."""
    if not isinstance(mine, Shown):
        return compare(stage, mine, golden, rule, axes)
    problems = []
    if mine.shape != tuple(golden.shape):
        problems.append(f"shape {list(mine.shape)}, golden has {list(golden.shape)}")
    if not mine.dtype.startswith(("float", "bfloat")):
        problems.append(f"dtype {mine.dtype}, golden has {golden.dtype}")
    if mine.sketch is not None and not np.isfinite(mine.sketch.block_max).all():
        problems.append("some values are NaN or Inf")
    if problems or mine.sketch is None or not isinstance(golden, Sketched):
        return Result(stage, False, rule, problems=tuple(problems or ["its values were not kept"]))
    return compare_sketches(stage, mine.sketch, golden, rule)
