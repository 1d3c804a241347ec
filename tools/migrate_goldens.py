"""Bring golden sets of an older manifest format to today's names; no number changes.

    python tools/migrate_goldens.py SET [SET ...]                     what would change
    python tools/migrate_goldens.py SET [SET ...] --accept            write it, whole or not at all
    ... --ledger GOLDENS --reason "..."                               and enter the sets' new hashes there

Format 1 called the oracle with the specification's casts `official`, as it did the recordings; it is `cast` now. Every
tensor is read, verified, written again and compared by content hash.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from stageparity import ledger
from stageparity.golden import GoldenError
from stageparity.manifest import FORMAT, PARTS, parse, set_sha256
from stageparity.store import Case, open_case
from stageparity.strict import printable
from stageparity.writer import NewCase, replaced, write_case
from vidi import cli

__all__ = ["main", "migrate"]

OLD = FORMAT - 1
RENAMED = {"official": "cast"}  # variants


def hashes(case: Case) -> dict[str, str]:
    """Place (under today's names) -> content hash of every stored array."""

    def walk() -> Iterator[tuple[str, str]]:
        yield from ((f"inputs/{name}", entry["sha256"]) for name, entry in case.manifest["inputs"].items())
        for variant, entries in case.manifest["targets"].items():
            for stage, entry in entries.items():
                parts = entry["parts"] if entry["form"] in PARTS else {"": entry}
                for part, stored in parts.items():
                    yield f"{RENAMED.get(variant, variant)}/{stage}/{part}", stored["sha256"]

    return dict(walk())


def migrate(folder: Path) -> int:
    """Rewrite the cases of format 1 in a set's folder; returns how many. Raises GoldenError where a content hash moved."""
    done = 0
    for path in sorted(folder.glob("*.json")):
        case = Case(folder, path.stem, parse(path, (FORMAT, OLD)))
        if case.manifest["format"] == FORMAT:
            continue
        before = hashes(case)
        new = NewCase(
            name=case.name,
            provenance=case.provenance,
            config=case.config,
            inputs=case.inputs,
            targets={RENAMED.get(v, v): dict(case.variant(v).items()) for v in case.variants},
            weights=case.manifest["weights"],
            info=case.info,
            left_out=case.left_out,
        )
        write_case(folder, new)
        if moved := set(before.items()) ^ set(hashes(open_case(folder, case.name)).items()):
            raise GoldenError(f"{folder.name}/{case.name}: {sorted(moved)[0][0]} would not be the same tensor any more")
        done += 1
    return done


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, or 2 for what is refused."""
    return cli.guarded(_run, arguments, name="migrate_goldens.py")


def _run(arguments: list[str]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", type=Path, metavar="SET", help="folder of CASE.json and CASE.h5 files")
    parser.add_argument("--accept", action="store_true", help="write")
    parser.add_argument("--ledger", type=Path, metavar="GOLDENS", help="golden folder whose ledger holds the sets")
    parser.add_argument("--reason", default="names of format 2; every content hash is what it was")
    args = parser.parse_args(arguments)
    ledger.check_reason(args.reason)
    for folder in args.sets:
        if not any(folder.glob("*.json")):
            raise GoldenError(f"{folder}: holds no CASE.json")
        old = [path.stem for path in sorted(folder.glob("*.json")) if parse(path, (FORMAT, OLD))["format"] == OLD]
        print(printable(f"{folder}: {', '.join(old) or 'no case'} of format {OLD}"))
        if args.accept and old:
            _write(folder, args.ledger, args.reason)
    return 0


def _write(folder: Path, goldens: Path | None, reason: str) -> None:
    def record() -> None:
        if goldens is not None:
            subject = folder.resolve().relative_to(goldens.resolve()).as_posix()
            ledger.append(goldens, subject, set_sha256(folder), reason)

    with replaced(folder, goldens=goldens, record=record) as draft:
        print(printable(f"{folder}: {migrate(draft)} cases migrated"))


if __name__ == "__main__":
    sys.exit(main())
