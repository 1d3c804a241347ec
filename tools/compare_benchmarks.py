"""Compare two benchmark runs by ratio, as a gate.

    python tools/compare_benchmarks.py BEFORE.json AFTER.json [--slack 0.05] [--across-devices]

Each file is what `pytest -m bench --benchmark-json FILE` writes. Times of two runs are never compared: a benchmark holds
its time over the floor and over the plain implementation, both measured in its own run, and these ratios are. Exit 1
where one grew by more than the slack or a benchmark is gone, 2 where the files cannot be compared, 0 otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.strict import printable
from vidi import cli

__all__ = ["Change", "compare", "main", "read"]

MAX_BYTES = 64 << 20
RATIOS = ("to_floor", "to_plain")

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Change:
    """One ratio of one benchmark in both runs; None where a run lacks it."""

    name: str
    ratio: str
    before: float | None
    after: float | None

    def worse(self, slack: float) -> bool:
        if self.after is None:
            return True
        return self.before is not None and not self.after <= self.before * (1 + slack)  # NaN is worse

    def line(self, slack: float) -> str:
        sizes = ["-" if x is None else f"{x:.3f}" for x in (self.before, self.after)]
        moved = f"{self.after / self.before - 1:+.1%}" if self.before and self.after is not None else ""
        verdict = "WORSE" if self.worse(slack) else ""
        return f"{self.name:<32} {self.ratio:<9} {sizes[0]:>9} {sizes[1]:>9} {moved:>8} {verdict}".rstrip()


def read(path: Path) -> Figures:
    """Benchmark name -> its extra_info. Raises ValueError where the file holds no comparable benchmark."""
    raw = strict.read_json(path, limit=MAX_BYTES)
    with strict.shaped(path):
        found = {str(entry["name"]): entry["extra_info"] for entry in raw["benchmarks"]}
        found = {name: info for name, info in found.items() if any(ratio in info for ratio in RATIOS)}
        wrong = [n for n, i in found.items() if not all(isinstance(i.get(r, 0.0), int | float) for r in RATIOS)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]}: a ratio is no number")
    if not found:
        raise ValueError(f"{path}: no benchmark with a ratio in it; write it with pytest -m bench --benchmark-json")
    return found


def compare(before: Figures, after: Figures) -> list[Change]:
    """Every ratio of either run. The plain variant's ratio to itself says nothing and is left out."""
    changes = []
    for name in sorted({*before, *after}):
        sides = before.get(name, {}), after.get(name, {})
        for ratio in RATIOS:
            values = [side.get(ratio) for side in sides]
            is_plain = any(side.get("variant") == "plain" for side in sides)
            if values != [None, None] and not (ratio == "to_plain" and is_plain):
                changes.append(Change(name, ratio, *values))
    return changes


def devices(figures: Figures) -> str:
    return ", ".join(sorted({str(info.get("device", "unknown device")) for info in figures.values()}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status is described above."""
    return cli.guarded(_run, arguments, name="compare_benchmarks.py")


def _run(arguments: list[str]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--slack", type=float, default=0.05, help="how much a ratio may grow: 0.05 is 5 %% (default)")
    parser.add_argument("--across-devices", action="store_true", help="compare runs of different devices all the same")
    options = parser.parse_args(arguments)
    if not 0 <= options.slack < math.inf:
        parser.error(f"--slack is {options.slack}: a number from 0 on is needed")
    before, after = read(options.before), read(options.after)
    if devices(before) != devices(after) and not options.across_devices:
        raise ValueError(f"measured on {devices(before)} and on {devices(after)}; --across-devices compares them")
    changes = compare(before, after)
    print(f"{printable(devices(before))} -> {printable(devices(after))}; a ratio may grow by {options.slack:.0%}")
    print("\n".join(printable(change.line(options.slack)) for change in changes))
    worse = [change for change in changes if change.worse(options.slack)]
    gone = sum(change.after is None for change in worse)
    print(f"{len(changes)} ratios, {len(worse) - gone} worse, {gone} gone")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
