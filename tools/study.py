"""Measure what is stored beside the goldens, and accept it.

    python tools/study.py baselines|noise|faults|alarms|mutants|sketches    measure; how figures would move
    python tools/study.py NAME --accept --reason "..."                      write them, and enter them in the ledger
    python tools/study.py NAME --stored                                     the stored figures, nothing is measured
    python tools/study.py --check                                           what is stale or missing, in seconds

Exits 0; 1 where a study finds what must not be, or --check what is stale or missing; 2 for what is refused. NAME --help lists
the options of a study.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stageparity import atomic, evidence, ledger, strict
from stageparity.golden import GoldenError
from stageparity.writer import locked
from tools import studies
from tools.studies import LEDGER, NAMES, ROOT, again, gpu, say, study
from vidi import cli

__all__ = ["main", "stale"]

LISTED = 40  # moves written out in one ledger entry


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="study.py")


def _run(arguments: list[str]) -> int:
    args = _parser().parse_args(arguments)
    return _check(args) if args.study is None else _study(args)


def _parser() -> argparse.ArgumentParser:
    common = cli.parser(add_help=False)
    common.add_argument(
        "--goldens", type=Path, default=ROOT / "goldens", help="golden folder (default: the repository's)"
    )
    common.add_argument("--json", action="store_true", help="print JSON")
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = cli.parser(prog="tools/study.py", description=__doc__, parents=[common], **shape)
    parser.add_argument("--check", action="store_true", help="name what is stale or missing, in seconds")
    named = parser.add_subparsers(dest="study", metavar="NAME")
    for name in NAMES:
        module = study(name)
        own = named.add_parser(
            name, description=sys.modules[f"tools.studies.{name}"].__doc__, parents=[common], **shape
        )
        either = own.add_mutually_exclusive_group()
        either.add_argument("--accept", action="store_true", help="write what was measured, and enter it in the ledger")
        either.add_argument("--stored", action="store_true", help="show what is stored, measure nothing")
        own.add_argument("--reason", default="", help="why; needed for writing")
        module.add_arguments(own)
    return parser


def stale(goldens: Path) -> dict[str, list[str]]:
    """Study, or result of a GPU -> why it is not today's; what is current is left out."""
    found = {name: studies.stale_of(name, goldens) for name in NAMES} | gpu.stale()
    return {name: lines for name, lines in found.items() if lines}


def _check(args: argparse.Namespace) -> int:
    if not args.check:
        raise ValueError(f"name a study ({', '.join(NAMES)}), or --check")
    found = stale(args.goldens)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        lines = [f"STALE {name}: {line}" for name, lines in found.items() for line in lines]
        print(strict.printable("\n".join(lines), keep="\n") or "all is current")
    return int(bool(found))


def _study(args: argparse.Namespace) -> int:
    module, path = study(args.study), args.goldens / LEDGER[args.study]
    before = evidence.read(path)
    if args.accept:
        _refuse_where_unsafe(module.part(args), args.reason)
    if args.stored:
        if before is None:
            raise GoldenError(f"no {path}: {again(args.study)}")
        document, files, moves = before, dict[Path, bytes](), list[str]()
        stale = studies.stale_of(args.study, args.goldens)
    else:
        document, files = _measured(module, args, before)
        part, stale = module.part(args), []
        with strict.shaped(path):
            moves = [f"{part} is a part of the study: not compared"] if part else list(module.moves(before, document))
    with strict.shaped(path):
        problems, shown = module.problems(document, args.goldens), list(module.show(document, args.goldens))
    if args.json:
        told = {"study": args.study, "moves": moves, "problems": problems, "stale": stale}
        print(json.dumps(told | {"document": document}, allow_nan=False))
    else:
        lines = [*shown, "", *(moves or ["no figure moved"] * (not args.stored))]
        lines += [f"{kind}: {line}" for kind, found in (("PROBLEM", problems), ("STALE", stale)) for line in found]
        print(strict.printable("\n".join(lines), keep="\n"))
    if args.accept:
        if problems:
            raise GoldenError(f"not accepted: {problems[0]}")
        with locked(args.goldens, wait=True):
            if evidence.read(path) != before:
                raise GoldenError(f"{path} was changed by another meanwhile: measure again")
            for name, data in files.items():
                atomic.write_bytes(args.goldens / name, data)
            evidence.write(path, document)
            more = [f"and {len(moves) - LISTED} more"] * (len(moves) > LISTED)
            ledger.append(args.goldens, args.study, ledger.file_sha256(path), args.reason, moves[:LISTED] + more)
        say(f"{path}: written, and entered in the ledger")
    return int(bool(problems or stale))


def _measured(
    module: studies.Study, args: argparse.Namespace, before: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[Path, bytes]]:
    """The study's document with what it was measured on, and the files that it names. Raises GoldenError where that changed
    meanwhile."""
    start, basis = time.monotonic(), module.basis(args.goldens)
    found = module.measure(args, before)
    if module.basis(args.goldens) != basis:
        raise GoldenError("code, goldens or budgets changed while they were measured: measure again")
    say(f"{args.study}: {time.monotonic() - start:.0f} s")
    device, files = found.pop("device", ""), found.pop("beside", {})
    return {"measured_on": evidence.measured_on(basis, ROOT, device), **found}, files


def _refuse_where_unsafe(part: str, reason: str) -> None:
    if "pytest" in sys.modules:
        raise GoldenError("nothing is accepted from within pytest: a test run must not turn itself green")
    if not reason.strip():
        raise GoldenError('--accept needs --reason "..."')
    ledger.check_reason(reason)
    if part:
        raise GoldenError(f"{part} is a part of the study: only the whole is accepted")


if __name__ == "__main__":
    sys.exit(main())
