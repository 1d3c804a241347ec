"""Studies: everything that is measured and stored beside the goldens, and how one learns that it is no longer so.

Each study is a module of the same few functions (`Study`); `tools/study.py` runs them. Importing one loads no torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.golden import GoldenError

__all__ = [
    "CPU", "FRAME", "GATE", "LEDGER", "LONG", "NAMES", "ROOT", "Study", "again", "chosen", "counts", "say", "stale_of",
    "study",
]  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("baselines", "noise", "faults", "alarms", "mutants", "sketches")
GATE = NAMES[:3]  #: measured in minutes: stale ones fail the gate, the others `tox -e evidence`
LEDGER = {name: f"measured/{name}.json" for name in NAMES}
LONG = ("official/longvideo", "official/verylong")  #: half a minute a run
FRAME = ("tools/studies/__init__.py", "tools/studies/gpu.py", *evidence.ASIDE)  #: what writes a result down
CPU = (*FRAME, "vidi/fast/*", "vidi/attention/fl*.py")  #: what a study on a CPU never enters


class Study(Protocol):
    """What `tools/study.py` asks of a module. A document is what its file holds, without ``measured_on``."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Its own options, beside --goldens, --accept, --reason, --stored and --json."""

    def basis(self, goldens: Path) -> Basis:
        """What the whole study depends on today."""

    def part(self, args: argparse.Namespace) -> str:
        """Why the options ask for a part of the study, which nobody may accept; nothing where they do not."""

    def measure(self, args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
        """Measure and tell on stderr how far it is. ``device`` in the result goes into ``measured_on``; ``files`` (place in the
        golden folder -> bytes) are written beside the document."""

    def moves(self, before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterable[str]:
        """How figures move, a line each."""

    def show(self, document: Mapping[str, Any], goldens: Path) -> Iterable[str]:
        """The figures for people."""

    def problems(self, document: Mapping[str, Any], goldens: Path) -> list[str]:
        """What must not be, a line each; a document with any is not accepted."""


def study(name: str) -> Study:
    return importlib.import_module(f"tools.studies.{name}")  # type: ignore[return-value]


def again(name: str) -> str:
    """The command that measures anew."""
    return f'python tools/study.py {name} --accept --reason "..."'


def stale_of(name: str, goldens: Path) -> list[str]:
    """Why a stored study is not today's; empty where it is."""
    return evidence.stale(evidence.read(goldens / LEDGER[name]), study(name).basis(goldens), again(name))


def counts(before: Mapping[str, Any] | None, after: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """How numbers of two documents moved."""
    for key in keys:
        if (old := (before or {}).get(key)) != after[key]:
            yield f"{key}: {old} -> {after[key]}"


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def chosen(asked: Iterable[str] | None, known: Iterable[str], what: str) -> list[str]:
    """Those asked for, or all. Raises GoldenError naming the choices."""
    known = list(known)
    if unknown := sorted(set(asked or ()) - set(known)):
        raise GoldenError(f"no {what} named {', '.join(unknown)}: there are {', '.join(known)}")
    return list(asked or known)
