"""What regenerating the small goldens would change: every stored tensor beside the oracle's, or a candidate for it.

A tensor counts as changed above 1e-10 of its rms; where a step in float32 comes before it (the spec's casts), above one
float32 ulp at its scale. Refused, by name: recordings of the official release, values that are not finite, candidates
that are no tensor of the oracle's, and values further from the oracle than the ones they replace.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from goldens import recipes, recipes_7b
from goldens.oracle import forward, greedy, teacher_forced
from stageparity.evidence import commit
from stageparity.golden import Golden, GoldenError, Whole, whole
from stageparity.manifest import weights_sha256
from stageparity.store import Case, list_cases, open_case
from stageparity.writer import NewCase
from vidi.parity.stages import STAGES

__all__ = ["RECIPES", "Change", "oracle_case", "plan"]

ROOT = Path(__file__).resolve().parents[1]
# The sets made by the oracle, and the recipes of each: cases(), weights(config).
RECIPES = {"small": recipes, "small-7b": recipes_7b}
VARIANTS = ("none", "cast")  # each is the `casts` of the oracle that makes it
CHANGED = 1e-10  # of rms


@dataclass(frozen=True)
class Change:
    """One tensor (or input, config, weights) that would change. old_error, new_error: max|d|/rms against the oracle."""

    case: str
    place: str
    what: str
    old_error: float | None = None
    new_error: float | None = None

    def line(self) -> str:
        """How the change is printed and entered in the ledger."""
        errors = ""
        if self.old_error is not None and self.new_error is not None:
            errors = f"; max|d|/rms against the oracle: {self.old_error:.3g} -> {self.new_error:.3g}"
        return f"{self.case}/{self.place}: {self.what}{errors}"


def oracle_case(recipe: recipes.Recipe, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """All tensors that the oracle computes for a recipe: variant -> stage id -> array."""
    table = recipes.pos_freq(recipe.config)
    result = {}
    for casts in VARIANTS:
        result[casts] = forward(recipe.config, weights, recipe.inputs, casts=casts, pos_freq=table)
        if recipe.decode_steps:
            own = greedy(recipe.config, weights, recipe.inputs, recipe.decode_steps, casts=casts, pos_freq=table)
            forced = teacher_forced(recipe.config, weights, recipe.inputs, own.tokens_BS, casts=casts, pos_freq=table)
            result[casts] |= {
                f"{recipe.name}.tokens": own.tokens_BS,
                f"{recipe.name}.lengths": own.lengths_B,
                f"{recipe.name}.nocache.logits": forced,
            }
    return result


def plan(
    folder: Path,
    names: Iterable[str] | None = None,
    glob: str | None = None,
    candidate: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[Change], dict[str, NewCase]]:
    """What would change in the golden set `folder`, one of `RECIPES`, and the cases to write for it.

    candidate: new values by stage id for the one named case and variant `none`, in place of the oracle's.
    """
    source = RECIPES[folder.name]
    made = source.cases()
    stored = {ref.name for ref in list_cases(folder)}
    wanted = set(made) | stored if names is None else set(names)
    unknown = wanted - set(made) - stored
    if unknown:
        raise GoldenError(f"no small case named {', '.join(sorted(unknown))}: there are {', '.join(sorted(made))}")
    changes: list[Change] = []
    cases: dict[str, NewCase] = {}
    for name in sorted(wanted):
        old = open_case(folder, name) if name in stored else None
        if old is not None and old.provenance["origin"] == "official":
            raise GoldenError(f"{name} is a recording of the official release: it is never regenerated, only imported")
        if name not in made:
            changes.append(Change(name, "", "gone: no recipe makes this case any more"))
            continue
        found, case = _compare_case(old, made[name], source.weights(made[name].config), glob, candidate)
        changes += found
        if found:
            cases[name] = case
    return changes, cases


def _compare_case(
    old: Case | None,
    recipe: recipes.Recipe,
    weights: Mapping[str, np.ndarray],
    glob: str | None,
    candidate: Mapping[str, np.ndarray] | None,
) -> tuple[list[Change], NewCase]:
    weights_entry = {"file": recipe.weights_file, "sha256": weights_sha256(weights)}
    oracle = oracle_case(recipe, weights)
    changes: list[Change] = []
    targets: dict[str, dict[str, Golden]] = {}
    for variant in VARIANTS:
        truth = oracle[variant]
        fresh = truth
        if candidate is not None and variant == "none":
            _refuse_unfit(recipe.name, candidate, truth)
            fresh = truth | dict(candidate)
        before: Mapping[str, Golden] = old.variant(variant) if old is not None and variant in old.variants else {}
        after: dict[str, Golden] = dict(before.items())
        selected = STAGES.matching({*fresh, *before}, glob)
        for stage in selected:
            if stage not in fresh:
                changes.append(Change(recipe.name, f"{variant}/{stage}", "gone: the oracle no longer has it"))
                del after[stage]
                continue
            change = _compare_tensor(recipe.name, variant, stage, before.get(stage), fresh[stage], truth.get(stage))
            if change is not None:
                changes.append(change)
                after[stage] = whole(fresh[stage])
        targets[variant] = after
    changes += _compare_rest(old, recipe, weights_entry)
    return changes, _new_case(recipe, targets, weights_entry)


def _refuse_unfit(case: str, candidate: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> None:
    """A candidate must be what the oracle computes, in its dtype and shape, or its distance to it means nothing."""
    for stage, value in candidate.items():
        if stage not in truth:
            raise GoldenError(f"{case}/none/{stage}: the oracle computes no such stage; the candidate is refused")
        mine, theirs = (f"{x.dtype.name} {list(x.shape)}" for x in (value, truth[stage]))
        if mine != theirs:
            raise GoldenError(f"{case}/none/{stage}: the candidate is {mine}, the oracle's {theirs}: it is refused")


def _compare_tensor(
    case: str, variant: str, stage: str, old: Golden | None, new: np.ndarray, truth: np.ndarray | None
) -> Change | None:
    place = f"{variant}/{stage}"
    if not np.isfinite(new).all():
        raise GoldenError(
            f"{case}/{place}: the new value holds NaN or Inf and is refused: mend the oracle or the input"
        )
    if not isinstance(old, Whole) or old.array.shape != new.shape or old.array.dtype != new.dtype:
        _refuse_further(case, place, None, _error(new, truth), _allowed(variant, stage, new) / (_rms(new) or 1.0))
        form = f"{new.dtype.name} {list(new.shape)}"
        return Change(case, place, f"new, {form}" if old is None else f"{old.dtype} {list(old.shape)} -> {form}")
    was, now = old.array.astype(np.float64), new.astype(np.float64)
    difference, allowed = np.abs(now - was), _allowed(variant, stage, old.array)
    if difference.max() <= allowed:
        return None
    at = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
    what = f"{int((difference > allowed).sum())} of {was.size} values, at {list(at)} {was[at]:.9g} -> {now[at]:.9g}"
    before, after = _error(was, truth), _error(now, truth)
    _refuse_further(case, place, before, after, 0.0)
    return Change(case, place, what, before, after)


def _allowed(variant: str, stage: str, array: np.ndarray) -> float:
    """How far a value may move unchanged: 1e-10 of rms, one float32 ulp at the tensor's scale behind a float32 step."""
    if array.dtype.kind in "bui":
        return 0.0
    if variant == "none" or STAGES.tagged(stage, "no-float32-step"):
        return CHANGED * _rms(array)
    return float(np.finfo(np.float32).eps) * float(np.abs(array).max())


def _rms(array: np.ndarray) -> float:
    return float(np.sqrt(np.square(array.astype(np.float64)).mean()))


def _error(array: np.ndarray, truth: np.ndarray | None) -> float | None:
    """max|d| from the oracle over the oracle's rms."""
    if truth is None:
        return None
    return float(np.abs(array.astype(np.float64) - truth.astype(np.float64)).max()) / (_rms(truth) or 1.0)


def _refuse_further(case: str, place: str, before: float | None, after: float | None, allowed: float) -> None:
    if after is None or after <= (allowed if before is None else before):
        return
    old = "and there is no old one to compare with" if before is None else f"than the old one ({before:.3g})"
    raise GoldenError(
        f"{case}/{place}: the new value is further from the oracle ({after:.3g} of rms) {old}: it is refused"
    )


def _compare_rest(old: Case | None, recipe: recipes.Recipe, weights_entry: Mapping[str, str]) -> list[Change]:
    """Inputs, config, info and weights, which are compared exactly."""
    if old is None:
        return []
    changes = []
    stored = {stage: entry for stage, entry in old.manifest["inputs"].items()}
    for stage in sorted({*stored, *recipe.inputs}):
        if stage not in stored or stage not in recipe.inputs:
            changes.append(Change(recipe.name, f"inputs/{stage}", "gone" if stage in stored else "new"))
        elif not np.array_equal(old.inputs[stage], recipe.inputs[stage]):
            changes.append(Change(recipe.name, f"inputs/{stage}", "differs from the recipe's"))
    for place, was, now in (
        ("config", old.config, dict(recipe.config)),
        ("info", old.info, _info(recipe)),
        ("weights", old.manifest["weights"], dict(weights_entry)),
    ):
        if was != now:
            changes.append(Change(recipe.name, place, "differs from the recipe's"))
    return changes


def _info(recipe: recipes.Recipe) -> dict[str, Any]:
    info: dict[str, Any] = {"why": recipe.why}
    if recipe.decode_steps:
        window = recipe.config["sliding_window"]
        info["generate"] = {recipe.name: {"window": window, "steps": recipe.decode_steps}}
    return info


def _new_case(
    recipe: recipes.Recipe, targets: Mapping[str, Mapping[str, Golden]], weights_entry: Mapping[str, str]
) -> NewCase:
    loaded = ("numpy", "h5py", "safetensors", "vidi")
    return NewCase(
        name=recipe.name,
        provenance={
            "origin": "oracle",
            "dtype": "float64",
            "libraries": {name: sys.modules[name].__version__ for name in loaded if name in sys.modules},
            "device": "cpu",
            "seed": None,
            "commit": commit(ROOT),
        },
        config=recipe.config,
        inputs=recipe.inputs,
        targets=targets,
        weights=weights_entry,
        info=_info(recipe),
    )
