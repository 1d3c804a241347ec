"""`vidi faults`: plants known faults one by one and tells which the harness sees, and where."""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import sys
import time
from typing import Any

from stageparity.strict import one_line, printable
from vidi.commands import arguments
from vidi.parser import meant

__all__ = ["add_arguments", "run"]

SEEN = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--fault", action=arguments.Joined, metavar="GLOB", help="only faults that match, such as 'masks.*,*window*'"
    )
    parser.add_argument(
        "--model", choices=("9b", "7b"), help="only faults of Vidi 1.5 9B or of Vidi 7B (default: both)"
    )
    parser.add_argument("--list", action="store_true", help="name the faults and what they patch, plant none")
    parser.add_argument("--goldens", metavar="DIR", help="folder with the sets small and official (default: embedded)")
    arguments.add_dtype(
        parser,
        None,
        help="run every fault there, to see which are below its noise; those named in faults.json may be (default: each in"
        " its own dtype)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the verdicts as JSON")


def run(args: argparse.Namespace) -> int:
    """Returns 0 all killed (but those known to be below the noise of --dtype) and 95 % localised, 1 not.

    Raises what `cli.guarded` tells as 2.
    """
    import torch

    from stageparity.faults import judge, stored
    from vidi.commands import outputs
    from vidi.parity import faults
    from vidi.parity.goldens import goldens_dir

    outputs.check(args.json)
    planted = {"9b": faults.FAULTS, "7b": faults.FAULTS_7B, None: faults.FAULTS | faults.FAULTS_7B}[args.model]
    chosen = _chosen(planted, args.fault)
    if args.list:
        arguments.unread(args, "with --list", json=None, goldens=None, dtype=None)
        for fault in chosen:
            print(f"{fault.name:44} {fault.dtype:9} {fault.case:16} {', '.join(map(str, fault.targets))}: {fault.what}")
        return SEEN
    threads, start, done = torch.get_num_threads(), time.perf_counter(), 0

    def progress(verdict: Any) -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            print(f"\r{done} of {len(chosen)} {verdict.fault.name:50}", end="", file=sys.stderr, flush=True)

    outputs.apart(goldens_dir(args.goldens), args.json)
    torch.set_num_threads(1)  # tensors are small: threads would only wait for each other
    try:
        bench = faults.bench(goldens_dir(args.goldens))
        known = stored.invisible(stored.read(bench.goldens), args.dtype)
        verdicts = judge.judge_all(chosen, bench, args.dtype, progress)
    finally:
        torch.set_num_threads(threads)
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
    result = judge.as_json(verdicts, time.perf_counter() - start)
    _print(verdicts, result, args.dtype, known)
    outputs.write(args.json, lambda: json.dumps(result, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return judge.exit_code(verdicts, known)


def _chosen(known: dict[str, Any], globs: str | None) -> list[Any]:
    """The faults that match one of the patterns. Raises ValueError for a pattern that none matches."""
    parts = [part.strip() for part in ("*" if globs is None else globs).split(",")]
    for part in parts:
        if not fnmatch.filter(known, part):
            raise ValueError(one_line(f"no fault matches {part!r}{meant(part, known)}: vidi faults --list names them"))
    return [fault for name, fault in known.items() if any(fnmatch.fnmatchcase(name, part) for part in parts)]


def _print(verdicts: list[Any], result: dict[str, Any], dtype: str | None, known: list[str]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from stageparity.report import console as consoles

    table = Table(title="faults" + (f" in {dtype}" if dtype else ""))
    for column in ("fault", "first reported at", "as", "expected", "error/tolerance", "verdict"):
        table.add_column(column, overflow="fold")
    for v in verdicts:
        cells = (v.fault.name, v.stage or "-", v.kind or "-", _expected(v), _margin(v), _verdict(v, known))
        table.add_row(*(escape(printable(cell)) for cell in cells))
    out = consoles.console()
    out.print(table)
    for name, text in _named(verdicts, known).items():
        out.print(printable(f"{name}: {text}"), soft_wrap=True, highlight=False, markup=False)
    low, median = result["minimum_margin"], result["median_margin"]
    out.print(
        f"{result['killed']} of {result['total']} silent faults seen, {result['localised']} first at their own stage;"
        f" margin at least {_number(low)}, median {_number(median)}; {result['crashed']} crashed, {result['loud']} loud,"
        f" {result['not_run']} NOT RUN; {result['seconds']} s",
        soft_wrap=True,
        highlight=False,
    )


def _verdict(v: Any, known: list[str]) -> str:
    if v.not_run:
        return f"NOT RUN: {v.not_run}"
    if v.crashed:
        return f"crashed: {v.crashed}"
    if v.loud:
        return f"loud at {v.loud[0]}"
    if not v.killed:
        return "below the noise" if v.fault.name in known else "NOT SEEN"
    if v.localised:
        return "seen"
    if (v.stage, v.kind) != (v.expected_stage, v.expected_kind):
        return "seen, elsewhere" if v.stage != v.expected_stage else "seen, as another's error"
    return f"seen, also alone at {', '.join(v.strays)}"


def _expected(v: Any) -> str:
    return f"{v.expected_stage} ({v.expected_kind})" if v.expected_stage else "-"


def _named(verdicts: list[Any], known: list[str]) -> dict[str, str]:
    ran = [v for v in verdicts if v.not_run is None and v.silent]
    lists = {
        "not seen": [v.fault.name for v in ran if not v.killed and v.fault.name not in known],
        "below the noise": [f"{v.fault.name} ({v.margin:.2f})" for v in ran if not v.killed and v.fault.name in known],
        "seen, though known to be below the noise": [v.fault.name for v in ran if v.killed and v.fault.name in known],
        "margin under 2": [f"{v.fault.name} ({v.margin:.2f})" for v in ran if v.killed and v.margin < 2],
        "NOT RUN": [f"{v.fault.name} ({v.not_run})" for v in verdicts if v.not_run],
    }
    return {name: ", ".join(found) for name, found in lists.items() if found}


def _margin(v: Any) -> str:
    return "-" if v.not_run else "exact" if math.isinf(v.margin) else f"{v.margin:.3g}"


def _number(value: float | None) -> str:
    return "without bound" if value is None or math.isinf(value) else f"{value:.3g}"
