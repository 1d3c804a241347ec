"""Faults: what the harness makes of every known fault, each in its own dtype, and those of wrong mathematics in every lower
dtype too (`stageparity/faults/stored.py` says what is kept).

A fault that has been seen in some dtype must stay so: a result where it lies below the noise is refused, unless it is named by
--invisible "DTYPE NAME", with the reason in --reason.
"""

from __future__ import annotations

import argparse
import fnmatch
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.faults import stored
from stageparity.golden import GoldenError
from stageparity.store import list_cases
from tools.studies import CPU, ROOT, counts, say

__all__ = ["grown", "moves"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fault", metavar="GLOB", help="only faults that match, such as 'masks.*'")
    more = "this one may be below the noise from now on (may be repeated)"
    parser.add_argument("--invisible", metavar="DTYPE NAME", action="append", default=[], help=more)


def part(args: argparse.Namespace) -> str:
    return f"--fault {args.fault}" if args.fault else ""


def basis(goldens: Path) -> Basis:
    from vidi.parity.faults import FAULTS

    used = {fault.place for fault in FAULTS.values()}
    entries = ["vidi/parity/faults/__init__.py", "stageparity/faults/judge.py", "stageparity/faults/stored.py"]
    return Basis(
        evidence.code(entries, ROOT, CPU),
        evidence.goldens(ref for ref in list_cases(goldens) if f"{ref.set}/{ref.name}" in used),
        evidence.budgets(goldens, sorted(used)),
    )


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Plant them all. Raises GoldenError where one is missed, or newly below the noise of a dtype."""
    import torch

    from stageparity import fingerprint
    from stageparity.faults import judge
    from vidi.parity import faults

    torch.set_num_threads(1)
    start, bench = time.perf_counter(), faults.bench(args.goldens)
    chosen = [fault for name, fault in faults.FAULTS.items() if fnmatch.fnmatchcase(name, args.fault or "*")]
    if not chosen:
        raise GoldenError(f"no fault matches {args.fault!r}: vidi faults --list names them")

    def planted(dtype: str | None) -> list[judge.Verdict]:
        done = 0

        def progress(verdict: judge.Verdict) -> None:
            nonlocal done
            done += 1
            if not done % 25 or done == len(chosen):
                say(f"{dtype or 'own dtypes'}: {done} of {len(chosen)}, {time.perf_counter() - start:.0f} s")

        return judge.judge_all(chosen, bench, dtype, progress)

    verdicts = planted(None)
    result = judge.as_json(verdicts, time.perf_counter() - start)
    if judge.exit_code(verdicts):
        bad = ", ".join(v.fault.name for v in verdicts if v.not_run is None and not v.localised)
        raise GoldenError(
            f"{result['killed']} of {result['total']} seen, {result['localised']} localised; not as expected: {bad}"
        )
    lower = {dtype: stored.by_dtype(planted(dtype)) for dtype in stored.LOWER}
    machine = fingerprint.fingerprint()
    new = {"device": f"{machine['device']} {machine['cpu_capability']}", **result, "dtypes": lower}
    if lost := grown(None if args.fault else before, new, args.invisible):
        raise GoldenError(f"seen before, now below the noise: {', '.join(lost)}")
    return new


def grown(old: Mapping[str, Any] | None, new: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """'DTYPE NAME' of every fault that was seen in a dtype and now lies below its noise."""
    found = []
    for dtype, own in (old or {}).get("dtypes", {}).items():
        found += [f"{dtype} {name}" for name in new["dtypes"][dtype]["invisible"] if name in own["margins"]]
    return [name for name in found if name not in allowed]


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    yield f"{document['killed']} of {document['total']} seen, {document['localised']} first at their own stage"
    for dtype, own in document["dtypes"].items():
        unseen = ", ".join(own["invisible"]) or "none"
        yield f"{dtype}: {own['killed']} of {own['total']} seen, {own['localised']} first there; below the noise: {unseen}"


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    missed = document["total"] - document["killed"]
    return [f"{missed} faults are not seen"] if missed else []


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """Counts, and margins that shrank below half of what they were."""
    yield from counts(before, after, ("total", "killed", "localised", "minimum_margin"))
    then, now = (dict(_margins(document or {})) for document in (before, after))
    for name, margin in now.items():
        old = then.get(name)
        if old is not None and margin is not None and margin < old / 2:
            yield f"{name}: margin {old:.3g} -> {margin:.3g}"


def _margins(document: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    yield from ((fault["name"], fault["margin"]) for fault in document.get("faults", ()))
    for dtype, own in document.get("dtypes", {}).items():
        yield from ((f"{dtype} {name}", margin) for name, margin in {**own["margins"], **own["invisible"]}.items())
