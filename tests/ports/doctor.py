"""`vidi port run` on a copy of a foreign port, and what it said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.ports.planted import Planted
from vidi import cli

__all__ = ["Examined", "examine", "recognised"]


class Examined:
    """Exit status and JSON of one run, and the folder of the port that ran."""

    def __init__(self, status: int, report: Mapping[str, Any], folder: Path) -> None:
        self.status, self.report, self.folder = status, report, folder

    @property
    def guilty(self) -> dict[str, str]:
        """Stage family -> kind of everything that is wrong by itself."""
        return {finding["stage"]: finding["kind"] for finding in self.report["findings"]}

    @property
    def kinds(self) -> set[str]:
        """Kinds of all rows that differ."""
        return {row["kind"] for case in self.report["cases"] for row in case["stages"] if not row["ok"]}

    @property
    def compared(self) -> int:
        return sum(len(case["stages"]) for case in self.report["cases"])


def examine(
    port: Path,
    at: Path,
    python: Path,
    cases: Sequence[str],
    *more: str,
    adapter: str = "adapter.py",
    fault: Planted | None = None,
) -> Examined:
    """Judge the port in folder ``port``, with a fault planted in its copy at ``at``. more: further arguments."""
    shutil.copytree(port, at, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    if fault is not None:
        fault.plant(at)
    report = at / "report.json"
    chosen = [word for case in cases for word in ("--case", case)]
    fixed = ["--python", str(python), "--quiet", "--no-environment", "--json", str(report)]
    status = cli.main(["port", "run", str(at / adapter), *fixed, *chosen, *more])
    return Examined(status, json.loads(report.read_text()) if report.exists() else {}, at)


def recognised(dump: Path) -> set[str]:
    """Names of the known faults whose tensors a dump holds, as `vidi port explain` tells them from stored sketches."""
    report = dump.parent / "explained.json"
    assert cli.main(["port", "explain", str(dump), "--json", str(report)]) == 1
    explained = json.loads(report.read_text())
    assert explained, "no sketches of known faults for this case"
    return {name for case in explained.values() for one in case if one["recognised"] for name in one["faults"]}
