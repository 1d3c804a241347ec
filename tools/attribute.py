"""Code or environment, two by two: the same parity run in two environments, at one revision or at two.

    python tools/attribute.py --env OLD/bin/python --env NEW/bin/python [--rev HEAD~1 --rev HEAD] [--case GLOB] [--dtype bfloat16]

Each environment is an interpreter that has what the model needs; each revision is checked out beside this one. Says of the
first stage that is equal in one cell and differs in another whether that follows the environment, the code, or only both
together, and names the library versions that differ.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity.strict import one_line, printable
from vidi import cli
from vidi.commands import outputs

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cell:
    """One run. ratios: (case, stage) -> worst error over its budget in any pass, infinite for what no budget helps."""

    env: str
    rev: str
    ratios: Mapping[tuple[str, str], float]
    libraries: Mapping[str, str]


def read(text: str, env: str, rev: str) -> Cell:
    """A cell from the JSON of `vidi parity`."""
    found = json.loads(text)
    ratios = {}
    for case in found["cases"]:
        for row in case["stages"]:
            passes = [row[name] for name in ("chained", "forced", "alone") if row[name] is not None]
            worst = [math.inf if p["ratio"] is None else p["ratio"] for p in passes]
            ratios[f"{case['set']}/{case['case']}", row["stage"]] = max(worst, default=0.0)
    fingerprint = found["fingerprint"]
    return Cell(env, rev, ratios, {"python": fingerprint.get("python", "?"), **fingerprint.get("libraries", {})})


def verdict(cells: Sequence[Cell]) -> list[str]:
    """What the cells say, in lines: the first stage that some find equal and others not, and what that follows."""
    envs, revs = (list(dict.fromkeys(getattr(c, key) for c in cells)) for key in ("env", "rev"))
    at = {(c.env, c.rev): c for c in cells}
    lines = [_changed(at[envs[0], revs[0]], at[envs[-1], revs[0]])] if len(envs) > 1 else []
    moved: dict[str, list[tuple[str, str]]] = {"the environment": [], "the code": [], "both together": []}
    common = set.intersection(*(set(c.ratios) for c in cells))
    for key in (key for key in cells[0].ratios if key in common):
        red = {place: c.ratios[key] > 1 for place, c in at.items()}
        if len(set(red.values())) == 1:
            continue
        by_env = all(len({red[env, rev] for rev in revs}) == 1 for env in envs)
        by_rev = all(len({red[env, rev] for env in envs}) == 1 for rev in revs)
        moved["the environment" if by_env else "the code" if by_rev else "both together"].append(key)
    for cause, keys in moved.items():
        if keys:
            case, stage = keys[0]
            told = ", ".join(f"{env} {rev}: {c.ratios[keys[0]]:.2g}" for (env, rev), c in at.items())
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            lines.append(f"follows {cause}: {stage} of {case}{more} ({told} of budget)")
    always = [key for key in cells[0].ratios if key in common and all(c.ratios[key] > 1 for c in cells)]
    if always:
        more = f" and {len(always) - 1} more" if len(always) > 1 else ""
        lines.append(f"differs everywhere: {always[0][1]} of {always[0][0]}{more}")
    if not any(moved.values()) and not always:
        ratio, (case, stage) = max((c.ratios[key], key) for c in cells for key in common)
        lines.append(f"equal in all {len(cells)} cells; nearest to its budget: {stage} of {case}, {ratio:.2g}")
    for a, b in itertools.pairwise(cells):
        if lost := sorted(set(a.ratios) ^ set(b.ratios)):
            lines.append(f"not compared in every cell: {len(lost)} stages, first {lost[0][1]} of {lost[0][0]}")
            break
    return lines


def _changed(a: Cell, b: Cell) -> str:
    names = sorted(n for n in {*a.libraries, *b.libraries} if a.libraries.get(n) != b.libraries.get(n))
    told = ", ".join(f"{n} {a.libraries.get(n, 'absent')} against {b.libraries.get(n, 'absent')}" for n in names)
    return f"the environments differ in {told}" if names else "the environments have the same versions"


@contextmanager
def _checked_out(revs: Sequence[str]) -> Iterator[dict[str, Path]]:
    """rev -> a folder with its files; this tree for no revision."""
    with tempfile.TemporaryDirectory() as folder:
        places, made = {}, []
        try:
            for n, rev in enumerate(revs):
                places[rev] = ROOT
                if rev != "here":
                    places[rev] = Path(folder) / str(n)
                    command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(places[rev]), rev]
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        raise ValueError(f"--rev {rev}: {one_line(done.stderr)}")
                    made.append(places[rev])
            yield places
        finally:
            for place in made:
                subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(place)], check=False)


def _run(env: str, rev: str, tree: Path, options: Sequence[str]) -> Cell:
    command = [env, "-m", "vidi", "parity", "--quiet", "--json", "-", *options]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--env {env}: {error.strerror}; the path of an interpreter is needed") from None
    if done.returncode not in (0, 1):
        said = one_line(done.stderr[-600:])
        raise ValueError(f"--env {env} --rev {rev}: vidi parity ended with {done.returncode}: {said}")
    return read(done.stdout, env, rev)


def run(argv: Sequence[str]) -> int:
    """0: the cells agree; 1: some differ."""
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", action="append", metavar="PYTHON", default=[], help="an interpreter; give two")
    parser.add_argument(
        "--rev", action="append", metavar="REV", default=[], help="a revision; give two (default: this tree)"
    )
    parser.add_argument("--case", action="append", metavar="GLOB", default=[])
    parser.add_argument("--stage", metavar="GLOB")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", metavar="FILE", help="also write the cells and lines; - is standard output")
    args = parser.parse_args(argv)
    envs, revs = args.env or [sys.executable], args.rev or ["here"]
    if len(envs) > 2 or len(revs) > 2 or len(envs) * len(revs) < 2:
        raise ValueError("two --env, two --rev, or both are needed: nothing else tells one cause from the other")
    outputs.check(None if args.json == "-" else args.json)
    options = [word for case in args.case for word in ("--case", case)] + ["--dtype", args.dtype]
    options += ["--stage", args.stage] if args.stage else []
    with _checked_out(revs) as trees:
        cells = []
        for env, rev in itertools.product(envs, revs):
            print(printable(f"{env} at {rev} …"), file=sys.stderr, flush=True)
            cells.append(_run(env, rev, trees[rev], options))
    lines = verdict(cells)
    if args.json:
        _write(args.json, cells, lines)
    if args.json != "-":
        print(printable("\n".join(lines), keep="\n"))
    return int(any(line.startswith("follows") for line in lines))


def _write(name: str, cells: Sequence[Cell], lines: Sequence[str]) -> None:
    from stageparity import atomic

    def finite(x: float) -> float | None:
        return x if math.isfinite(x) else None

    shown: list[dict[str, Any]] = [
        {
            "env": c.env,
            "rev": c.rev,
            "libraries": dict(c.libraries),
            "ratios": [[*k, finite(r)] for k, r in c.ratios.items()],
        }
        for c in cells
    ]
    text = json.dumps({"lines": list(lines), "cells": shown}, indent=1) + "\n"
    print(text, end="") if name == "-" else atomic.write_text(name, text)


if __name__ == "__main__":
    sys.exit(cli.guarded(run))
