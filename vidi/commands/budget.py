"""`vidi budget`: what a stage may err by, what that is made of, and the weakest fault that is still seen."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from vidi.commands import arguments

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "stage",
        metavar="STAGE",
        nargs="?",
        help="id or pattern, such as 'layer.*.t2v' (default: all whose largest error may exceed one rms)",
    )
    parser.add_argument("--case", metavar="GLOB", action="append", default=[], help="case, set or SET/CASE; repeatable")
    arguments.add_dtype(parser, "bfloat16")
    parser.add_argument("--goldens", metavar="DIR", help="golden folder (default: embedded)")
    parser.add_argument("--json", metavar="FILE", help="write the budgets as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0; 1 where a stage is judged by nothing: no pass of it has a budget below one rms, nor are its bits held."""
    from stageparity.strict import one_line, printable
    from vidi.commands import cases, outputs
    from vidi.parity.budgets import BLIND, budgets
    from vidi.parity.goldens import goldens_dir
    from vidi.parity.stages import STAGES

    outputs.check(args.json)
    outputs.apart(goldens_dir(args.goldens), args.json)
    refs = cases.select(goldens_dir(args.goldens), args.case)
    if args.stage is not None:
        cases.check_stages(args.stage, refs, STAGES, "STAGE")
    found = list(budgets(goldens_dir(args.goldens), args.stage, args.dtype, args.case))
    if not found:
        raise ValueError(one_line(f"no stage {args.stage!r} has a golden that judges {args.dtype}"))
    judged = {(b.case, b.stage) for b in found if b.judges}
    blind = sorted({(b.case, b.stage) for b in found} - judged)
    wide = [b for b in found if (b.rule.max or 0.0) > BLIND]
    places = {(b.case, b.stage) for b in wide}
    shown = found if args.stage else [b for b in found if (b.case, b.stage) in places]
    _print(shown, args.dtype)
    print(f"{len(wide)} of {len(found)} budgets in {args.dtype} let a value err by more than one rms; ", end="")
    print(printable(f"judged by nothing else: {', '.join(map(' '.join, blind)) or 'none'}"))
    outputs.write(args.json, lambda: json.dumps([_as_json(b) for b in found], indent=1, allow_nan=False) + "\n")
    return int(bool(blind))


def _print(shown: list[Any], dtype: str) -> None:
    from rich.markup import escape
    from rich.table import Table

    from stageparity.report import console as consoles
    from stageparity.strict import printable

    table = Table(title=f"budgets in {dtype}, of the golden's rms")
    for column in ("case", "stage", "pass", "max", "rms", "row", "head", "floor", "bits", "weakest fault"):
        table.add_column(column, overflow="fold")
    for b in shown:
        metrics = (_metric(b, metric) for metric in ("max", "rms", "row", "head"))
        floor = f"{b.rule.floor_ulp:g} ulp" if b.rule.floor_ulp else "-"
        bits = "-" if b.bits is None else f"{b.bits:.0%}"
        cells = (b.case, b.stage, b.kind, *metrics, floor, bits, _fault(b))
        table.add_row(*(escape(printable(cell)) for cell in cells))
    out = consoles.console()
    out.print(table)
    for name, why in sorted({(b.rule.name, b.rule.why) for b in shown}):
        out.print(printable(f"{name}: {why}"), soft_wrap=True, highlight=False, markup=False)


def _metric(b: Any, metric: str) -> str:
    budget = getattr(b.rule, metric)
    if budget is None:
        absolute = b.rule.max_abs if metric == "max" else None
        return "-" if absolute is None else "exact" if absolute == 0 else f"{absolute:.2g} absolute"
    factor, measured = b.parts.get(metric, (None, None))
    return f"{budget:.2g}" + ("" if factor is None else f" = {factor:g} x {measured:.2g}")


def _fault(b: Any) -> str:
    if b.fault is None:
        return "none planted"
    margin, name = b.fault
    return name if math.isinf(margin) else f"{name}, {margin:.3g} x its budget"


def _as_json(b: Any) -> dict[str, Any]:
    rule = {key: getattr(b.rule, key) for key in ("max", "rms", "row", "head", "max_abs", "floor_ulp")}
    fault = b.fault and {"name": b.fault[1], "margin": None if math.isinf(b.fault[0]) else b.fault[0]}
    parts = {metric: {"factor": factor, "baseline": error} for metric, (factor, error) in b.parts.items()}
    place = {"case": b.case, "stage": b.stage, "pass": b.kind, "gate": b.rule.name, "why": b.rule.why}
    return {**place, "budgets": rule, "parts": parts, "bits": b.bits, "weakest_fault": fault}
