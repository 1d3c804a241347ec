"""Faults planted in the source of a foreign port: texts exchanged in a copy of its folder, and what the port doctor makes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidi import cli

__all__ = ["Edit", "Planted", "diagnose", "found"]


@dataclass(frozen=True)
class Edit:
    """In ``file`` of the port, ``old`` (which stands there once) becomes ``new``."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Planted:
    """guilty: for each stage family that is wrong by itself, of which kind. known: the fault of vidi/parity/faults that it is,
    if it is one. case: the golden case that shows it."""

    name: str
    edits: tuple[Edit, ...]
    guilty: Mapping[str, str]
    known: str = ""
    case: str = "small/base"


def diagnose(port: Path, at: Path, case: str, python: Path, *more: str, edits: tuple[Edit, ...] = (), adapter: str = "adapter.py") -> tuple[int, dict[str, Any]]:
    """(exit status, JSON) of `vidi port run` on a copy of a port's folder with faults in it."""
    shutil.copytree(port, at, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        text = (at / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.old!r} stands {text.count(edit.old)} times in {edit.file}"
        (at / edit.file).write_text(text.replace(edit.old, edit.new))
    report = at / "report.json"
    command = ["port", "run", str(at / adapter), "--python", str(python), "--case", case, "--quiet", "--json", str(report)]
    status = cli.main([*command, *more])
    return status, json.loads(report.read_text()) if report.exists() else {}


def found(report: Mapping[str, Any]) -> dict[str, str]:
    """Family and kind of every finding of a report."""
    return {finding["stage"]: finding["kind"] for finding in report["findings"]}
