"""Mutants: small arbitrary edits of the model's source, one at a time; does the CPU gate notice each?

What is edited, and which edits are drawn: `tools/studies/edits.py`. What they meet, goldens first and then the tests that can see
the file: `tools/studies/trial.py`, `seen_by.py`. A difference, an exception, a failed test or no end in time kills a mutant;
deaths are counted by what came first, for a file that cannot even be imported says little of the gate.

A survivor needs a reason why it is no hole: `tools/studies/survivors.toml`. A stopped study goes on where it stopped; a test that
is new sends only those back that had reached the tests of their file.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.golden import GoldenError
from tools.studies import FRAME, ROOT, counts, say
from tools.studies.edits import SOURCES, Mutant, sample
from tools.studies.log import Log
from tools.studies.seen_by import TESTS, tests_of
from tools.studies.trial import LIMIT, MISSED, Child, Goldens, golden_cases, runs_of

__all__ = ["moves", "problems", "reasons", "run", "summary"]

COUNT, SEED, GOAL = 600, 1, 0.97
SURVIVORS = Path(__file__).with_name("survivors.toml")
WAYS = ("goldens", "tests", "import", "time")


# ---- the study ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, help=f"so many mutants (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=SEED, help="which (default: 1)")
    parser.add_argument("--only", metavar="GLOB", help="mutants whose key matches")
    parser.add_argument("--no-tests", action="store_true", help="goldens alone: what they miss waits for tests")
    parser.add_argument("--jobs", type=int, default=2, help="mutants side by side (default: 2)")
    parser.add_argument("--fresh", action="store_true", help="forget mutants that are finished")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "build" / "mutants.jsonl", help="where finished mutants are kept"
    )


def part(args: argparse.Namespace) -> str:
    other = (args.count, args.seed) != (COUNT, SEED)
    asked = {
        f"--count {args.count} --seed {args.seed}": other,
        f"--only {args.only}": args.only,
        "--no-tests": args.no_tests,
    }
    return " ".join(text for text, given in asked.items() if given)


def basis(goldens: Path) -> Basis:
    """The model, what judges it, and the tests with all that they import."""
    tests = {file for paths in TESTS.values() for path in paths for file in _files(path)}
    return _basis(goldens, sorted(tests), FRAME)


def _before_tests(goldens: Path) -> Basis:
    """What the log depends on; each of its lines about tests says itself which."""
    return _basis(goldens, [], (*FRAME, "tools/studies/seen_by.py"))


def _basis(goldens: Path, tests: list[str], without: tuple[str, ...]) -> Basis:
    refs = golden_cases(goldens)
    return Basis(
        evidence.code(["tools/studies/mutants.py", *SOURCES, *tests], ROOT, without),
        evidence.goldens(refs),
        evidence.budgets(goldens, [f"{ref.set}/{ref.name}" for ref in refs]),
    )


def _files(path: str) -> list[str]:
    found = [ROOT / path] if (ROOT / path).is_file() else (ROOT / path).rglob("*.py")
    return [file.relative_to(ROOT).as_posix() for file in found]


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Run the mutants that the log lacks."""
    os.nice(max(0, 10 - os.nice(0)))  # 10 in all
    mutants = sample(args.count, args.seed)
    if args.only:
        mutants = [pair for pair in mutants if fnmatch.fnmatchcase(pair[0].key, args.only)]
    log = Log(args.log, _before_tests(args.goldens), args.fresh)
    return summary([m for m, _ in mutants], run(mutants, log, args))


def summary(mutants: list[Mutant], verdicts: Mapping[str, str]) -> dict[str, Any]:
    """Counts by how they died, by kind and by file, and each survivor."""
    alive = [m for m in mutants if not verdicts[m.key]]
    ways = Counter(verdicts[m.key].partition(":")[0] for m in mutants)
    return {
        "total": len(mutants),
        "killed": len(mutants) - len(alive),
        "killed_by": {way: ways[way] for way in WAYS},
        "kinds": _tally(mutants, alive, "kind"),
        "files": _tally(mutants, alive, "file"),
        "survivors": [asdict(m) | {"key": m.key} for m in alive],
    }


def _tally(mutants: list[Mutant], alive: list[Mutant], name: str) -> dict[str, Any]:
    total, living = (Counter(getattr(m, name) for m in some) for some in (mutants, alive))
    return {each: {"total": n, "killed": n - living[each]} for each, n in sorted(total.items())}


def reasons() -> dict[str, str]:
    """Why a survivor is no hole, by its key."""
    return tomllib.loads(SURVIVORS.read_text("utf-8"))["why"]


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    known = reasons()
    for survivor in document["survivors"]:
        yield f"{survivor['key']}  (line {survivor['line']})\n    {known.get(survivor['key'], 'UNEXPLAINED')}"
    ways = ", ".join(f"{n} by {way}" for way, n in document.get("killed_by", {}).items())
    yield f"{document['killed']} of {document['total']} mutants killed: {ways or 'it is not stored by what'}"


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    known, alive = reasons(), [survivor["key"] for survivor in document["survivors"]]
    found = [f"a survivor without a reason in {SURVIVORS.name}: {key}" for key in alive if not known.get(key)]
    if document["killed"] < GOAL * document["total"]:
        found.append(f"{document['killed']} of {document['total']} killed, {GOAL:.0%} are asked")
    return found


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    yield from counts(before, after, ("total", "killed", "killed_by"))
    then, now = ({s["key"] for s in (d or {}).get("survivors", ())} for d in (before, after))
    yield from (f"survives: {key}" for key in sorted(now - then))
    yield from (f"dies now: {key}" for key in sorted(then - now))


# ---- all of them --------------------------------------------------------------------------------------------------------


def run(mutants: list[tuple[Mutant, str]], log: Log, args: argparse.Namespace) -> dict[str, str]:
    """Verdict by key: what kills it, nothing where it lives. Raises GoldenError where sources without any edit die too."""
    tests = not args.no_tests
    waiting = [(m, s) for m, s in mutants if _waits(m, log, tests)]
    say(f"{len(mutants)} mutants, {len(mutants) - len(waiting)} in {log.path} already")
    goldens = Goldens.load(args.goldens) if waiting else Goldens({}, None)
    running: list[Child] = []
    start, judged, seconds = time.monotonic(), 0, 0.0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                mutant, source = waiting.pop(0)
                running.append(Child(mutant, source, goldens, runs=mutant.key not in log.done, tests=tests))
            for child in [child for child in running if child.ended()]:
                running.remove(child)
                if child.verdict:
                    _unharmed(child.mutant.file, goldens, log, tests=child.missed)
                _enter(child, log, tests)
                judged, seconds = judged + 1, seconds + child.seconds
                if not child.verdict and tests:
                    say(f"survives: {child.mutant.key}")
                if judged % 10 == 0:
                    clock = time.monotonic() - start
                    say(f"{len(waiting)} to go; {judged} in {clock:.0f} s, of processor time {seconds:.0f} s")
    finally:
        for child in running:
            child.kill()
    return {m.key: _known(m, log) or "" for m, _ in mutants}


def _waits(mutant: Mutant, log: Log, tests: bool) -> bool:
    known = _known(mutant, log)
    return known is None and (tests or mutant.key not in log.done)


def _known(mutant: Mutant, log: Log) -> str | None:
    """What the log knows: of the goldens, and of the tests as they stand today."""
    found = log.done.get(mutant.key)
    return log.done.get(_faced(mutant)) if found == MISSED else found


def _enter(child: Child, log: Log, tests: bool) -> None:
    log.add(child.mutant.key, MISSED if child.missed else child.verdict)
    if child.missed and tests:
        log.add(_faced(child.mutant), child.verdict)


def _faced(mutant: Mutant) -> str:
    """The mutant before the tests of its file, as they stand today."""
    return f"{mutant.key} | {_tests_today(tests_of(mutant.file))}"


@cache
def _tests_today(tests: tuple[str, ...]) -> str:
    files = [file for path in tests for file in _files(path)]
    return evidence.digest(json.dumps([tests, evidence.code(files, ROOT, FRAME)]))


def _unharmed(file: str, goldens: Goldens, log: Log, *, tests: bool) -> None:
    """A death counts where the same judges spare the file unharmed, printed anew by its syntax tree; asked once of all files that
    have the same. Raises GoldenError where they do not, or take more than half of the time that a mutant has."""
    key = f"unharmed {evidence.digest(repr(runs_of(file)))}" + f" | {_tests_today(tests_of(file))}" * tests
    if key in log.done:
        return
    source = ast.unparse(ast.parse((ROOT / file).read_text("utf-8")))
    child = Child(Mutant(file, 0, "unharmed", "", "", ""), source, goldens, runs=True, tests=tests)
    while not child.ended():
        pass
    if child.verdict:
        raise GoldenError(f"{file}, without any edit: {child.verdict}; mend that first, a mutant would die of it")
    if child.seconds > LIMIT / 2:
        raise GoldenError(f"{file}, without any edit: {child.seconds:.0f} s; at most half of {LIMIT} s tell a mutant")
    say(f"unharmed {file}: {child.seconds:.0f} s")
    log.add(key, "")
