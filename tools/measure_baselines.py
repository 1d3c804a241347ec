"""Measure the error of a naive low-precision model: the baselines that budgets are multiples of.

    python tools/measure_baselines.py [--goldens DIR] [--case SET/CASE ...] [--accept --reason "..."]
    python tools/measure_baselines.py --spread [--case SET/CASE ...]      how far other summation orders lie from the stored

Runs the oracle with each stored tensor rounded to float32, bfloat16 or float16, in several summation orders, twice:
*chained* from raw inputs, and *isolated*, where every stage is fed the golden in place of what the run had, so that its
error is its own. Each stage is held against the golden (small cases: the oracle with the spec's casts in float64;
recordings of the release: their float32), and the worst error of the orders is kept as a number (multiples of rms: rms,
max, worst row, worst head). Kept as numbers, so a worse baseline cannot loosen a gate unseen: the ledger holds the
file's hash, and each case names the oracle and the golden that it was measured from. Without --accept it prints how the
numbers would move.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from goldens.oracle import forward, teacher_forced  # noqa: E402
from stageparity import ledger  # noqa: E402
from stageparity.compare import Result, Rule, compare  # noqa: E402
from stageparity.golden import Golden, Whole  # noqa: E402
from stageparity.stage import is_exact, sort_ids  # noqa: E402
from stageparity.store import Case, GoldenError, Targets, list_cases, open_case  # noqa: E402
from stageparity.tolerance import KINDS, METRICS, baseline_of, read_baselines  # noqa: E402
from stageparity.writer import locked  # noqa: E402
from tools.made_from import made_from  # noqa: E402

__all__ = ["DTYPES", "errors_of", "main", "measure", "orders", "reference"]

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
MEASURE = Rule("measure", "no budget: the error itself is wanted", max=math.inf, zero_rows=False)
LONG = {"longvideo", "verylong"}  # half a minute a run
OTHERS = 1000  # seeds from here on are orders that no baseline was measured with: for --spread

Errors = dict[str, dict[str, float]]
Run = Mapping[str, np.ndarray]


def reference(case: Case) -> Targets:
    """The goldens that low-precision runs of a case are held against."""
    return case.variant("recorded" if "recorded" in case.variants else "official")


def orders(case: Case, dtype: str) -> tuple[int | None, ...]:
    """The summation orders of a case's baseline. float32 errors follow the order, so many are drawn; half-precision
    errors follow the rounding of stored tensors, which all orders share."""
    if case.name in LONG:
        return (None, 1)
    return (None, *range(1, 64 if dtype == "float32" else 8))


def dtypes_of(case: Case) -> tuple[str, ...]:
    """Recordings in float32 judge float32 runs by budgets of their own."""
    return tuple(DTYPES)[1:] if "recorded" in case.variants else tuple(DTYPES)


def measure(case: Case, dtype: str, seeds: Iterable[int | None]) -> dict[str, Errors]:
    """kind (chained, isolated) -> stage -> worst error of the summation orders, three significant digits."""
    targets = {stage: golden for stage, golden in reference(case).items() if not is_exact(stage)}
    weights = case.weights()
    found: dict[str, dict[str, list[Result]]] = {kind: {} for kind in KINDS}
    for seed in seeds:
        for kind, run in errors_of(case, targets, weights, dtype, seed):
            for stage, result in run.items():
                found[kind].setdefault(stage, []).append(result)
    return {
        kind: {
            stage: {metric: float(f"{value:.3g}") for metric, value in baseline_of(stages[stage]).items()}
            for stage in sort_ids(stages)
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
                stage: compare(stage, np.asarray(run[stage]).reshape(golden.shape), golden, MEASURE)
                for stage, golden in targets.items()
                if stage in run
            },
        )


def _settings(case: Case, dtype: str, seed: int | None) -> dict[str, Any]:
    targets, width = reference(case), case.config["hidden_size"]
    table = targets["pos.freq"].array if "pos.freq" in targets else load_file(_tables(case))[str(width)]  # type: ignore[union-attr]
    return {"casts": "official", "round_to": DTYPES[dtype], "order_seed": seed, "pos_freq": table}


def _tables(case: Case) -> Path:
    return case.folder.parent / "pos_freq.safetensors"


def _forward(
    case: Case, weights: Run, dtype: str, seed: int | None, anchor: Run | None, wanted: set[str]
) -> dict[str, np.ndarray]:
    if "logits" not in case.targets:
        return {}
    settings = _settings(case, dtype, seed) | {"thresholds": case.info.get("loss_thresholds")}
    return forward(case.config, weights, case.inputs, keep=wanted.__contains__, anchor=anchor, **settings)


def _decoding(case: Case, weights: Run, dtype: str, seed: int | None) -> Iterator[tuple[str, np.ndarray]]:
    """Logits along the golden's greedy ids, which the run is forced to follow."""
    for variant, given in case.info.get("generate", {}).items():
        inputs, tokens = dict(case.inputs), reference(case).get(f"{variant}.tokens")
        if f"{variant}.prompt_ids" in inputs:
            inputs["inputs.input_ids"] = inputs[f"{variant}.prompt_ids"]
            inputs.pop("inputs.attention_mask", None)
        forced = tokens.array if isinstance(tokens, Whole) else inputs[f"{variant}.tokens"]
        config = case.config | {"sliding_window": given["window"]}
        logits = teacher_forced(config, weights, inputs, forced, **_settings(case, dtype, seed))
        yield f"{variant}.nocache.logits", logits


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, or 2 for what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--case", action="append", metavar="SET/CASE", help="only this case (may be repeated)")
    parser.add_argument("--accept", action="store_true", help="write baselines.json and enter it in the ledger")
    parser.add_argument(
        "--spread", action="store_true", help="print the errors of as many other orders, over the stored"
    )
    parser.add_argument("--reason", default="")
    args = parser.parse_args(arguments)
    path = args.goldens / "baselines.json"
    try:
        if args.accept and ("pytest" in sys.modules or not args.reason.strip()):
            raise GoldenError('baselines are written outside pytest and with --reason "..."')
        cases = [open_case(ref.folder, ref.name) for ref in list_cases(args.goldens)]
        names = {f"{case.set}/{case.name}": case for case in cases}
        unknown = set(args.case or ()) - set(names)
        if unknown:
            raise GoldenError(f"no case named {', '.join(sorted(unknown))}: there are {', '.join(names)}")
        stored = read_baselines(path)
        found: dict[str, dict[str, dict[str, Errors]]] = {}  # case -> dtype -> kind
        for name in args.case or names:
            for dtype in dtypes_of(names[name]):
                seeds = orders(names[name], dtype)
                asked = tuple(OTHERS + i for i in range(len(seeds))) if args.spread else seeds
                own = found.setdefault(name, {})[dtype] = measure(names[name], dtype, asked)
                for kind, errors in own.items():
                    _print_moves(f"{name} {dtype} {kind}", stored[kind].get(dtype, {}).get(name, {}), errors)
        if args.accept and not args.spread:
            draft = path.with_suffix(".json.tmp")
            with locked(args.goldens, wait=True):
                draft.write_text(_render(_joined(path, found, args.goldens)))
                os.replace(draft, path)
                ledger.append(args.goldens, "baselines", ledger.file_sha256(path), args.reason)
    except GoldenError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


def _joined(path: Path, found: Mapping[str, Mapping[str, Mapping[str, Errors]]], goldens: Path) -> dict[str, Any]:
    """What the file holds now (another run may have written since this one began) and what was found, of the cases that
    exist now."""
    names = {f"{ref.set}/{ref.name}": open_case(ref.folder, ref.name) for ref in list_cases(goldens)}
    stored = read_baselines(path)
    body: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    body = {kind: {dtype: dict(_known(stored, kind, dtype, names)) for dtype in DTYPES} for kind in KINDS} | {
        "unit": f"multiples of the golden's rms: {', '.join(METRICS)} (head: where there are heads)",
        "made_from": {name: x for name, x in body.get("made_from", {}).items() if name in names},
        "orders": {name: x for name, x in body.get("orders", {}).items() if name in names},
    }
    for name in names.keys() & found.keys():
        dtypes = found[name]
        for dtype, kinds in dtypes.items():
            for kind, errors in kinds.items():
                body[kind][dtype][name] = errors
            body["orders"].setdefault(name, {})[dtype] = len(orders(names[name], dtype))
        body["made_from"][name] = made_from(names[name])
    return body


def _known(body: Mapping, kind: str, dtype: str, names: Mapping[str, Case]) -> Iterator[tuple[str, Errors]]:
    """What is stored of cases that still exist."""
    for name, errors in body.get(kind, {}).get(dtype, {}).items():
        if name in names:
            yield name, errors


def _print_moves(what: str, old: Errors, new: Errors) -> None:
    """The largest ratio new / old of each metric, and where."""
    parts = []
    for metric in METRICS:
        ratios = [
            (new[stage][metric] / old[stage][metric], stage)
            for stage in new
            if metric in new[stage] and old.get(stage, {}).get(metric)
        ]
        if ratios:
            parts.append(f"{metric} {min(ratios)[0]:.2f} to {max(ratios)[0]:.2f} ({max(ratios)[1]})")
    worst = max((errors["rms"], stage) for stage, errors in new.items()) if new else (0.0, "nothing")
    moved = "; over the stored: " + ", ".join(parts) if parts else ""
    print(f"{what}: {len(new)} stages, largest rms {worst[0]:.3g} at {worst[1]}{moved}", flush=True)


def _render(body: dict) -> str:
    """JSON with one stage of a case a line, for readable diffs in little room; see `tolerance.read_baselines`."""
    columns = [(kind, dtype) for kind in KINDS for dtype in DTYPES]

    def errors_of_case(name: str) -> str:
        held = [body[kind][dtype].get(name, {}) for kind, dtype in columns]
        lines = []
        for stage in sort_ids({stage for errors in held for stage in errors}):
            row = [[own[stage][m] for m in METRICS if m in own[stage]] if stage in own else 0 for own in held]
            lines.append(f"{json.dumps(stage)}:{json.dumps(row, separators=(',', ':'))}")
        return f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}"

    cases = sorted({name for kind, dtype in columns for name in body[kind][dtype]})
    head = {key: body[key] for key in ("unit", "made_from", "orders")} | {"columns": [" ".join(c) for c in columns]}
    return json.dumps(head, indent=1)[:-2] + ',\n "errors": {\n' + ",\n".join(map(errors_of_case, cases)) + "\n}}\n"


if __name__ == "__main__":
    raise SystemExit(main())
