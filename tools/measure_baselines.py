"""Measure the error of a naive low-precision model: the baselines that budgets are multiples of.

    python tools/measure_baselines.py [--goldens DIR] --accept --reason "..."

Runs the oracle on every small case with each stored tensor rounded to float32, bfloat16 and float16, in several
summation orders, holds each stage against the golden with the spec's casts in float64, and keeps the worst error of
the orders as a number (multiples of rms: rms, max, worst row, worst head). Kept as numbers, so a worse baseline cannot
loosen a gate unseen: the ledger holds the file's hash. Without --accept it prints how the numbers would move.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from goldens import recipes  # noqa: E402
from goldens.oracle import forward, teacher_forced  # noqa: E402
from vidi.parity import ledger  # noqa: E402
from vidi.parity.compare import Rule, compare  # noqa: E402
from vidi.parity.ids import is_exact, sort_ids  # noqa: E402
from vidi.parity.store import GoldenError, list_cases, open_case  # noqa: E402
from vidi.parity.tolerance import baseline_of  # noqa: E402

__all__ = ["main", "measure"]

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
SEEDS = (None, *range(1, 16))
MEASURE = Rule("measure", "no budget: the error itself is wanted", max=math.inf, zero_rows=False)


def measure(goldens: Path) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """dtype -> case -> stage -> worst error of the summation orders, three significant digits."""
    made = recipes.cases()
    errors: dict[str, dict[str, dict[str, dict[str, float]]]] = {dtype: {} for dtype in DTYPES}
    for ref in list_cases(goldens / "small"):
        case, recipe = open_case(ref.folder, ref.name), made[ref.name]
        targets = {stage: golden for stage, golden in case.variant("official").items() if not is_exact(stage)}
        weights, forced = case.weights(), f"{ref.name}.tokens"
        tokens = case.variant("official")[forced].array if forced in case.variant("official") else None
        for dtype, short in DTYPES.items():
            runs = [_run(recipe, weights, tokens, short, seed) for seed in SEEDS]
            errors[dtype][ref.name] = {
                stage: {
                    metric: float(f"{value:.3g}")
                    for metric, value in baseline_of(
                        [compare(stage, run[stage], targets[stage], MEASURE) for run in runs]
                    ).items()
                }
                for stage in sort_ids(targets)
            }
    return errors


def _run(
    recipe: recipes.Recipe, weights: dict[str, np.ndarray], tokens: np.ndarray | None, short: str, seed: int | None
) -> dict[str, np.ndarray]:
    """One rounded run; `tokens` are the golden's greedy ids, which it is forced to follow."""
    arithmetic = {"casts": "official", "round_to": short, "order_seed": seed, "pos_freq": recipes.POS_FREQ}
    run = forward(recipe.config, weights, recipe.inputs, **arithmetic)
    if tokens is not None:
        run[f"{recipe.name}.nocache.logits"] = teacher_forced(
            recipe.config, weights, recipe.inputs, tokens, **arithmetic
        )
    return run


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, or 2 for what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--accept", action="store_true", help="write baselines.json and enter it in the ledger")
    parser.add_argument("--reason", default="")
    args = parser.parse_args(arguments)
    path = args.goldens / "baselines.json"
    try:
        if args.accept and ("pytest" in sys.modules or not args.reason.strip()):
            raise GoldenError('baselines are written outside pytest and with --reason "..."')
        errors = measure(args.goldens)
        _print_moves(json.loads(path.read_text())["errors"] if path.exists() else {}, errors)
        if args.accept:
            body = {"unit": "multiples of the golden's rms", "seeds": SEEDS, "reference": "official", "errors": errors}
            draft = path.with_suffix(".json.tmp")
            draft.write_text(_render(body))
            os.replace(draft, path)
            ledger.append(args.goldens, "baselines", ledger.file_sha256(path), args.reason)
    except GoldenError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


def _print_moves(old: dict, new: dict) -> None:
    for dtype, cases in new.items():
        ratios = [
            value / old[dtype][case][stage][metric]
            for case, stages in cases.items()
            for stage, metrics in stages.items()
            for metric, value in metrics.items()
            if old.get(dtype, {}).get(case, {}).get(stage, {}).get(metric)
        ]
        worst = max((m["max"] for stages in cases.values() for m in stages.values()), default=0.0)
        moved = f"; against the stored ones {min(ratios):.2f} to {max(ratios):.2f} times" if ratios else ""
        print(f"{dtype}: worst max|d|/rms {worst:.3g}{moved}")


def _render(body: dict) -> str:
    """JSON with one stage a line, for readable diffs."""
    head = {key: value for key, value in body.items() if key != "errors"}
    lines = []
    for dtype, cases in body["errors"].items():
        inner = []
        for case, stages in cases.items():
            rows = ",\n".join(f"   {json.dumps(stage)}: {json.dumps(metrics)}" for stage, metrics in stages.items())
            inner.append(f"  {json.dumps(case)}: {{\n{rows}\n  }}")
        lines.append(f" {json.dumps(dtype)}: {{\n" + ",\n".join(inner) + "\n }")
    start = json.dumps(head)[:-1]
    return f'{start}, "errors": {{\n' + ",\n".join(lines) + "\n}}\n"


if __name__ == "__main__":
    raise SystemExit(main())
