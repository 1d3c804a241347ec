"""Regenerate the small goldens from the oracle: what would change, and, only when told to, the change itself.

    python tools/regen_goldens.py [--set SET] [--case NAME ...] [--stage GLOB]     print what would change, per tensor
    python tools/regen_goldens.py --check                              the same for the gate: exit 1 if anything would
    python tools/regen_goldens.py --accept --reason "..."              write it, whole or not at all, and the ledger
    python tools/regen_goldens.py --accept-tolerances --reason "..."   enter changed tolerances or pos.freq in the ledger
    python tools/regen_goldens.py --case NAME --candidate FILE [...]   values from a safetensors file, not the oracle

--set: small (default), the 9B's, or small-7b.

What counts as changed and what is refused: `tools/regen_plan.py`. The tool never loads the model or torch, and never
runs inside pytest when it writes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from stageparity import atomic, ledger
from stageparity.golden import GoldenError
from stageparity.manifest import set_sha256
from stageparity.store import list_cases, list_sets, verify
from stageparity.strict import printable
from stageparity.strict_safetensors import read_safetensors
from stageparity.writer import NewCase, locked, replaced, write_case, write_weights
from tools import studies
from tools.regen_plan import RECIPES, Change, plan
from vidi import cli

__all__ = ["check", "main"]

ROOT = studies.ROOT
MODEL = ("torch", "vidi.model", "vidi.generate")  # and what lies in a folder of it; the folders alone hold no code
FOLDERS = ("vidi.towers.", "vidi.bridge.", "vidi.attention.", "vidi.decoder.")
LISTED = 40  # changes written out in one ledger entry
WRITTEN = ("tolerances", "pos.freq")
FULL = "measured/full.json"  # vidi.parity.full.NOISE
LEDGER_FILES = {"tolerances": "tolerances.toml", "pos.freq": "pos_freq.safetensors", FULL: FULL, **studies.LEDGER}


def check(goldens: Path) -> list[str]:
    """Everything that the gate must not let pass: changes, broken or stale sets, files the ledger does not cover."""
    problems = []
    for name in RECIPES:
        if (goldens / name).is_dir():
            problems += [f"{name}: {change.line()}" for change in plan(goldens / name)[0]]
    sets = {folder.relative_to(goldens).as_posix(): folder for folder in list_sets(goldens)}
    for subject, folder in sets.items():
        try:
            verify(folder)
            problems.append(ledger.stale(goldens, subject, set_sha256(folder)) or "")
        except GoldenError as error:
            problems.append(str(error))
    for subject in sorted({entry["subject"] for entry in ledger.entries(goldens)} - {*sets, *LEDGER_FILES}):
        problems.append(f"{subject}: in the ledger, but no such golden set lies here: restore it")
    for subject, name in LEDGER_FILES.items():
        if (goldens / name).exists():
            problems.append(ledger.stale(goldens, subject, ledger.file_sha256(goldens / name)) or "")
    problems += [f"baselines: {line}" for line in studies.stale_of("baselines", goldens)]
    return [problem for problem in problems if problem]


def _write(
    goldens: Path, name: str, changes: list[Change], cases: Mapping[str, NewCase], reason: str, at: Callable
) -> None:
    lines = [change.line() for change in changes[:LISTED]]
    if len(changes) > LISTED:
        lines.append(f"and {len(changes) - LISTED} more")

    def record() -> None:
        ledger.append(goldens, name, set_sha256(goldens / name), reason, lines)

    with replaced(goldens / name, at, record=record) as draft:
        for change in changes:
            if change.what.startswith("gone: no recipe"):
                for suffix in (".json", ".h5"):
                    (draft / f"{change.case}{suffix}").unlink()
        made = RECIPES[name].cases()
        for file, raw in {made[case].weights_file: made[case].config for case in cases}.items():
            write_weights(draft, file, RECIPES[name].weights(raw))
        for case in cases.values():
            write_case(draft, case)
        verify(draft)


def _refuse_where_unsafe() -> None:
    if "pytest" in sys.modules or "PYTEST_CURRENT_TEST" in os.environ:
        raise GoldenError("goldens are not written from within pytest: a test run must not turn itself green")
    loaded = sorted(name for name in sys.modules if name in MODEL or name.startswith(FOLDERS))
    if loaded:
        raise GoldenError(f"goldens are not written beside the model ({loaded[0]} is loaded): run the tool alone")


def main(arguments: list[str] | None = None, at: Callable[[str], None] = lambda point: None) -> int:
    """Command line. Exits 0; 1 when --check finds something; 2 for what is refused. at: see `writer.replaced`."""
    return cli.guarded(partial(_run, at=at), arguments, name="regen_goldens.py")


def _run(arguments: list[str], at: Callable[[str], None]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--goldens", type=Path, default=ROOT / "goldens", help="golden folder (default: the repository's)"
    )
    parser.add_argument("--set", choices=RECIPES, default="small", help="the golden set (default: small)")
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--stage", metavar="GLOB", help="only stages that match")
    parser.add_argument("--candidate", type=Path, metavar="FILE", help="new values by stage id, for one --case")
    parser.add_argument("--check", action="store_true", help="exit 1 if anything would change or is not in the ledger")
    parser.add_argument("--accept", action="store_true", help="write the changes")
    parser.add_argument("--accept-tolerances", action="store_true", help="enter changed tolerances in the ledger")
    parser.add_argument("--reason", default="", help="why; needed for writing")
    args = parser.parse_args(arguments)
    if args.accept or args.accept_tolerances:
        _refuse_where_unsafe()
        if not args.reason.strip():
            raise GoldenError('writing needs --reason "..."')
        ledger.check_reason(args.reason)
    for name in args.case or ():
        _refuse_recording(args.goldens, args.set, name)
    if args.check:
        problems = check(args.goldens)
        print(
            printable("\n".join(problems), keep="\n")
            or "goldens are as the oracle makes them, and the ledger covers them"
        )
        return 1 if problems else 0
    if args.accept_tolerances:
        _accept_tolerances(args.goldens, args.reason)
        return 0
    if args.candidate and len(args.case or ()) != 1:
        raise GoldenError("--candidate holds the tensors of one case: name it with --case")
    candidate = read_safetensors(args.candidate) if args.candidate else None
    changes, cases = plan(args.goldens / args.set, args.case, args.stage, candidate)
    print("\n".join(printable(change.line()) for change in changes) or "nothing would change")
    if args.accept:
        missing = not changes and ledger.stale(args.goldens, args.set, set_sha256(args.goldens / args.set))
        if changes:
            _write(args.goldens, args.set, changes, cases, args.reason, at)
        elif missing:
            with locked(args.goldens):
                atomic.collect(args.goldens / args.set)  # what a writer left that was killed before its entry
                ledger.append(args.goldens, args.set, set_sha256(args.goldens / args.set), args.reason)
    return 0


def _refuse_recording(goldens: Path, own: str, name: str) -> None:
    for ref in list_cases(goldens):
        if ref.name == name and ref.set != own and name not in RECIPES[own].cases():
            raise GoldenError(f"{name} of {ref.set} is a recording of the official release: it is never regenerated")


def _accept_tolerances(goldens: Path, reason: str) -> None:
    with locked(goldens):
        for subject in WRITTEN:  # what is measured enters the ledger when it is accepted: tools/study.py
            path = goldens / LEDGER_FILES[subject]
            name = path.name
            if path.exists() and ledger.stale(goldens, subject, ledger.file_sha256(path)):
                ledger.append(goldens, subject, ledger.file_sha256(path), reason)
                print(f"{name}: entered in the ledger")


if __name__ == "__main__":
    sys.exit(main())
