"""Baselines: the error of a naive low-precision model, of which budgets are multiples.

Runs the oracle with each stored tensor rounded to float32, bfloat16 or float16, in several summation orders, twice:
*chained* from raw inputs, and *isolated*, where every stage is fed the golden in place of what the run had, so that its
error is its own. Each stage is held against the golden (small cases: the oracle with the spec's casts in float64; recordings
of the release: their float32), and the worst error of the orders is kept as a number (multiples of rms: rms, max, worst row,
worst head), so that a worse baseline cannot loosen a gate unseen.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from goldens.oracle import forward, teacher_forced
from stageparity import evidence
from stageparity.compare import Result, Rule, compare
from stageparity.evidence import Basis
from stageparity.golden import Golden, GoldenError, Whole
from stageparity.manifest import parse
from stageparity.store import Case, Targets, list_cases, open_case
from stageparity.strict_safetensors import read_safetensors
from stageparity.tolerance import BASELINES, KINDS, METRICS, baseline_of, read_baselines
from tools.studies import LONG, ROOT, chosen, say
from vidi.parity.goldens import inputs_of
from vidi.parity.stages import STAGES

__all__ = ["DTYPES", "dtypes_of", "errors_of", "measure_case", "moves", "orders", "reference"]

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MEASURE = Rule("measure", "no budget: the error itself is wanted", max=math.inf, zero_rows=False)
OTHERS = 1000  # seeds from here on are orders that no baseline was measured with: for --spread

Errors = dict[str, dict[str, float]]
Run = Mapping[str, np.ndarray]


def reference(case: Case) -> Targets:
    """The goldens that low-precision runs of a case are held against."""
    return case.variant("recorded" if "recorded" in case.variants else "cast")


def orders(case: Case, dtype: str) -> tuple[int | None, ...]:
    """The summation orders of a case's baseline. float32 errors follow the order, so many are drawn; half-precision
    errors follow the rounding of stored tensors, which all orders share."""
    if f"{case.set}/{case.name}" in LONG:
        return (None, 1)
    return (None, *range(1, 64 if dtype == "float32" else 8))


def dtypes_of(case: Case) -> tuple[str, ...]:
    """Recordings in float32 judge float32 runs by budgets of their own."""
    return tuple(DTYPES)[1:] if "recorded" in case.variants else tuple(DTYPES)


def _cases(goldens: Path) -> dict[str, Case]:
    return {f"{ref.set}/{ref.name}": open_case(ref.folder, ref.name) for ref in list_cases(goldens)}


# ---- the study ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", action="append", metavar="SET/CASE", help="only this case (may be repeated)")
    parser.add_argument("--spread", action="store_true", help="as many other orders: how far they lie from the stored")


def part(args: argparse.Namespace) -> str:
    return "--spread" if args.spread else ""


def basis(goldens: Path) -> Basis:
    """The oracle, how an error is told (with the axes that are rows and heads), and the goldens."""
    refs = list_cases(goldens)
    cases = {
        f"{ref.set}/{ref.name}": Case(ref.folder, ref.name, parse(ref.folder / f"{ref.name}.json")) for ref in refs
    }
    drawn = {name: {dtype: len(orders(case, dtype)) for dtype in dtypes_of(case)} for name, case in cases.items()}
    return Basis(
        evidence.code(["goldens/oracle/__init__.py", "stageparity/compare.py"], ROOT),
        evidence.goldens(refs),
        plan={
            "orders": evidence.digest(json.dumps(drawn, sort_keys=True)),
            "axes": evidence.digest(repr([(entry.template, entry.exact, entry.axes) for entry in STAGES])),
        },
    )


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """The cases asked for, beside what the file holds of the others, as long as that is today's."""
    cases = _cases(args.goldens)
    names = chosen(args.case, cases, "case")
    stored = read_baselines(args.goldens / BASELINES)
    if args.accept and set(names) != set(cases):
        _refuse_mixture(before, basis(args.goldens), names)
    for n, name in enumerate(names, 1):
        for dtype in dtypes_of(cases[name]):
            seeds = orders(cases[name], dtype)
            say(f"{n}/{len(names)} {name} {dtype}: {len(seeds)} orders")
            asked = tuple(OTHERS + i for i in range(len(seeds))) if args.spread else seeds
            for kind, errors in measure_case(cases[name], dtype, asked).items():
                stored[kind].setdefault(dtype, {})[name] = errors
    held = {
        name: case for name, case in cases.items() if any(name in stored[k].get(d, {}) for k in KINDS for d in DTYPES)
    }
    return {
        "unit": f"multiples of the golden's rms: {', '.join(METRICS)} (head: where there are heads)",
        "orders": {name: {dtype: len(orders(case, dtype)) for dtype in dtypes_of(case)} for name, case in held.items()},
        "columns": [f"{kind} {dtype}" for kind in KINDS for dtype in DTYPES],
        "errors": {name: _rows(stored, name) for name in held},
    }


def _refuse_mixture(before: dict[str, Any] | None, now: Basis, names: Iterable[str]) -> None:
    """Raises GoldenError where the file would hold numbers of two oracles."""
    then = (before or {}).get("measured_on", {})
    old = [name for name in now.goldens if name not in names and then.get("goldens", {}).get(name) != now.goldens[name]]
    if then.get("code") != dict(now.code) or old:
        why = f"their goldens are others now ({', '.join(old)})" if old else "the oracle is another now"
        raise GoldenError(f"the other cases were measured before, and {why}: measure all of them, without --case")


def _rows(stored: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Stage -> its errors in the order of `columns` and METRICS, 0 where none were measured."""
    held = [stored[kind].get(dtype, {}).get(name, {}) for kind in KINDS for dtype in DTYPES]
    stages = STAGES.sort({stage for errors in held for stage in errors})
    return {s: [[own[s][m] for m in METRICS if m in own[s]] if s in own else 0 for own in held] for s in stages}


# ---- one case -----------------------------------------------------------------------------------------------------------


def measure_case(case: Case, dtype: str, seeds: Iterable[int | None]) -> dict[str, Errors]:
    """kind (chained, isolated) -> stage -> worst error of the summation orders, three significant digits."""
    targets = {stage: golden for stage, golden in reference(case).items() if not STAGES.is_exact(stage)}
    weights = case.weights()
    found: dict[str, dict[str, list[Result]]] = {kind: {} for kind in KINDS}
    for seed in seeds:
        for kind, run in errors_of(case, targets, weights, dtype, seed):
            for stage, result in run.items():
                found[kind].setdefault(stage, []).append(result)
    return {
        kind: {
            stage: {metric: float(f"{value:.3g}") for metric, value in baseline_of(stages[stage]).items()}
            for stage in STAGES.sort(stages)
        }
        for kind, stages in found.items()
    }


def errors_of(
    case: Case, targets: Mapping[str, Golden], weights: Run, dtype: str, seed: int | None
) -> Iterator[tuple[str, dict[str, Result]]]:
    """("chained" or "isolated", stage -> comparison) of one rounded run."""
    held = {stage: golden.array for stage, golden in reference(case).items() if isinstance(golden, Whole)}
    for kind, anchor in (("chained", None), ("isolated", held)):
        run = dict(_forward(case, weights, dtype, seed, anchor, set(targets)))
        if anchor is None:
            run |= _decoding(case, weights, dtype, seed)
        yield (
            kind,
            {
                stage: compare(stage, np.asarray(run[stage]).reshape(golden.shape), golden, MEASURE, STAGES.axes(stage))
                for stage, golden in targets.items()
                if stage in run
            },
        )


def _settings(case: Case, dtype: str, seed: int | None) -> dict[str, Any]:
    targets, width = reference(case), case.config["hidden_size"]
    own = targets.get("pos.freq")
    table = (
        own.array
        if isinstance(own, Whole)
        else read_safetensors(case.folder.parent / "pos_freq.safetensors")[str(width)]
    )
    return {"casts": "cast", "round_to": DTYPES[dtype], "order_seed": seed, "pos_freq": table}


def _forward(
    case: Case, weights: Run, dtype: str, seed: int | None, anchor: Run | None, wanted: set[str]
) -> dict[str, np.ndarray]:
    if not {"logits", "loss.logits"} & set(case.targets):
        return {}
    settings = _settings(case, dtype, seed) | {"thresholds": case.info.get("loss_thresholds")}
    return forward(case.config, weights, inputs_of(case), keep=wanted.__contains__, anchor=anchor, **settings)


def _decoding(case: Case, weights: Run, dtype: str, seed: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Logits along the golden's greedy ids, which the run is forced to follow."""
    for variant, given in case.info.get("generate", {}).items():
        inputs, tokens = inputs_of(case), reference(case).get(f"{variant}.tokens")
        if f"{variant}.prompt_ids" in inputs:
            inputs["inputs.input_ids"] = inputs[f"{variant}.prompt_ids"]
            inputs.pop("inputs.attention_mask", None)
        forced = tokens.array if isinstance(tokens, Whole) else inputs[f"{variant}.tokens"]
        config = case.config | {"sliding_window": given["window"]}
        logits = teacher_forced(config, weights, inputs, forced, **_settings(case, dtype, seed))
        yield f"{variant}.nocache.logits", logits


# ---- figures ------------------------------------------------------------------------------------------------------------


def _errors(document: Mapping[str, Any] | None) -> Iterator[tuple[str, str, list[float]]]:
    """(case and column, stage, errors in METRICS' order) of everything measured."""
    held = document or {"errors": {}, "columns": ()}
    for case, stages in held["errors"].items():
        for stage, row in stages.items():
            yield from ((f"{case} {c}", stage, own) for c, own in zip(held["columns"], row, strict=True) if own)


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """New over stored of each metric, smallest and largest, for every case, kind and dtype of which a number moved."""
    old, new = ({(place, stage): own for place, stage, own in _errors(d)} for d in (before, after))
    ratios: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for place, stage in [*new, *(key for key in old if key not in new)]:
        then, now = old.get((place, stage)), new.get((place, stage))
        if then is None or now is None:
            ratios.setdefault(place, {}).setdefault("new" if then is None else "gone", []).append((1.0, stage))
        elif then != now:
            for metric, was, is_ in zip(METRICS, then, now, strict=False):
                ratio = is_ / was if was else math.inf if is_ else 1.0
                ratios.setdefault(place, {}).setdefault(metric, []).append((ratio, stage))
    for place, found in ratios.items():
        parts = (f"{m} {min(r)[0]:.3g} to {max(r)[0]:.3g} ({max(r)[1]})" for m, r in found.items())
        yield f"{place}: over the stored: {', '.join(parts)}"


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    worst: dict[str, tuple[float, str]] = {}
    for place, stage, own in _errors(document):
        worst[place] = max(worst.get(place, (0.0, "")), (own[0], stage))
    yield from (f"{place}: largest rms {error:.3g} at {stage}" for place, (error, stage) in worst.items())


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    missing = sorted({f"{ref.set}/{ref.name}" for ref in list_cases(goldens)} - set(document["errors"]))
    return [f"{name} has no baseline" for name in missing]
