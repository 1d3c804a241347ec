"""Results that need a GPU: files under bench/results, each with the code that it runs and the command that makes it.

Whoever writes one puts `measured_on(NAME)` into it, on the machine and in the checkout that it is measured in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.store import list_cases
from tools.studies import FRAME, ROOT

__all__ = ["FOLDER", "RESULTS", "Result", "basis", "measured_on", "stale"]

PLACE = "bench/results/h100"
FOLDER = ROOT / PLACE
PROBE = ("bench/probe_fast.py",)
BACKENDS = ("vidi/attention/flash.py", "vidi/attention/flex.py")  # imported by name


@dataclass(frozen=True)
class Result:
    """entries: where its code begins. again: the command. cases: folders below goldens/ whose cases judge it."""

    entries: tuple[str, ...]
    again: str
    cases: tuple[str, ...] = ()


RESULTS: Mapping[str, Result] = {
    "bench.json": Result(
        ("vidi/commands/bench.py",),
        f"vidi bench --max-new-tokens 24 --plain 60 --profile 300 --json {PLACE}/bench.json",
    ),
    "gpu_tests.json": Result(("tests/gpu/*.py", *BACKENDS), f"tests/gpu/run_all.sh {PLACE}", ("official", "small")),
    "kernels.json": Result(("tests/benchmarks/*.py", *BACKENDS), f"tests/gpu/run_all.sh {PLACE}"),
    "parity-full.json": Result(
        ("vidi/parity/full.py",),
        f"vidi parity --size full --device cuda --json {PLACE}/parity-full.json",
        ("large/full",),
    ),
    **{
        f"probe-{name}.json": Result(
            PROBE, f"python bench/probe_fast.py --only {parts} --json {PLACE}/probe-{name}.json"
        )
        for name, parts in (
            ("kernels", "step,attend,stream,vision"),
            ("stream-sustained", "stream,vision"),
            ("tower", "tower"),
            ("vision", "vision"),
        )
    },
}


def basis(name: str) -> Basis:
    """What a result depends on today: code, and where goldens judge it these and the tolerances."""
    result = RESULTS[name]
    files = (path.relative_to(ROOT).as_posix() for entry in result.entries for path in sorted(ROOT.glob(entry)))
    goldens = ROOT / "goldens"
    refs = [ref for folder in result.cases for ref in list_cases(goldens / folder)]
    names = [f"{ref.set}/{ref.name}" for ref in refs]
    return Basis(
        evidence.code(files, ROOT, FRAME), evidence.goldens(refs), evidence.budgets(goldens, names) if names else {}
    )


def measured_on(name: str, device: str) -> dict[str, Any]:
    """What a result says that is made now."""
    return evidence.measured_on(basis(name), ROOT, device)


def stale(folder: Path = FOLDER) -> dict[str, list[str]]:
    """File name -> why it is no result of today's code; what nobody knows how to measure is one too."""
    found = {
        name: evidence.stale(evidence.read(folder / name), basis(name), result.again)
        for name, result in RESULTS.items()
    }
    unknown = {path.name for path in folder.iterdir() if path.is_file()} - set(RESULTS)
    return found | {
        name: ["no code of it is kept: enter it in tools/studies/gpu.py or delete it"] for name in sorted(unknown)
    }
