"""Results that need a GPU: files under bench/results, each with the code that it runs and the command that makes it.

Whoever writes one puts `measured_on(NAME)` into it, on the machine and in the checkout that it is measured in.

    python -m tools.studies.gpu JUNIT... [--out OUT]      the tests of a GPU run as OUT (default: where it is stored)

A run may be several sessions of pytest. Refused where a test failed, or ran twice, or not all did; exits 2 then.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from stageparity import evidence, strict
from stageparity.evidence import Basis
from stageparity.golden import GoldenError
from stageparity.store import list_cases
from tools.studies import FRAME, ROOT, say
from vidi import cli

__all__ = ["FOLDER", "RESULTS", "Result", "basis", "main", "measured_on", "stale", "tests_of"]

PLACE = "bench/results"
FOLDER = ROOT / PLACE
PROBE = ("bench/probe_fast.py",)
TESTS = ("tests/gpu", "-m", "gpu or full", "-p", "no:benchmark")
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
    "bench-7b.json": Result(
        ("vidi/commands/bench.py",),
        f"vidi bench --model 7b --frames 60,300,1800 --plain-backend flash --max-new-tokens 8 --json {PLACE}/bench-7b.json",
    ),
    "gpu_tests.json": Result(
        ("tests/gpu/*.py", *BACKENDS),
        "tox -e gpu && python -m tools.studies.gpu .tox/gpu/junit.xml",
        ("official", "official-7b", "small", "small-7b"),
    ),
    "kernels.json": Result(
        ("tests/benchmarks/*.py", *BACKENDS), f"pytest -m bench --benchmark-json {PLACE}/kernels.json tests/benchmarks"
    ),
    "parity-full.json": Result(
        ("vidi/parity/full.py",),
        f"vidi parity --size full --device cuda --json {PLACE}/parity-full.json",
        ("large/full",),
    ),
    "read_video.json": Result(("bench/read_video.py",), f"python bench/read_video.py --json {PLACE}/read_video.json"),
    "video.json": Result(
        ("vidi/commands/bench.py",),
        "python bench/read_video.py --seconds 3600 --make hour.mp4 && "
        f"vidi bench --video hour.mp4 --json {PLACE}/video.json",
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


# ---- the tests' own result ------------------------------------------------------------------------------------------------


def tests_of(junits: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Test file -> what passed, failed and was not run, the last two by name, and the worst error over its budget."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[tuple[str, str]] = set()
    for test in (test for junit in junits for test in _read(junit).iter("testcase")):
        if (key := (test.get("classname", "?"), test.get("name", "?"))) in seen:
            raise GoldenError(f"{'::'.join(key)} ran twice")
        seen.add(key)
        file = found.setdefault(test.get("classname", "?"), {"passed": 0, "failed": [], "not_run": []})
        kinds, name = {child.tag for child in test}, test.get("name", "?")
        if kinds & {"failure", "error"}:
            file["failed"].append(name)
        elif "skipped" in kinds:
            file["not_run"].append(name)
        else:
            file["passed"] += 1
        for entry in test.iter("property"):
            if "over budget" in entry.get("name", "") and math.isfinite(value := float(entry.get("value", "nan"))):
                file["worst_error_over_budget"] = max(value, file.get("worst_error_over_budget", 0.0))
    return dict(sorted(found.items()))


def _read(junit: Path) -> ElementTree.Element:
    try:
        return ElementTree.fromstring(strict.read_bytes(junit, limit=evidence.MAX_BYTES))
    except ElementTree.ParseError as error:
        raise GoldenError(f"{junit}: damaged XML ({error})") from None


def num_tests() -> int:
    """How many tests a GPU run has, counted by collecting them."""
    command = [sys.executable, "-m", "pytest", *TESTS, "--collect-only", "-q", "-p", "no:cacheprovider"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    return sum(line.startswith("tests/") and "::" in line for line in listed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="gpu.py")


def _run(arguments: list[str]) -> None:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("junit", type=Path, nargs="+", help="what pytest --junitxml wrote")
    parser.add_argument("--out", type=Path, default=FOLDER / "gpu_tests.json")
    args = parser.parse_args(arguments)
    files = tests_of(args.junit)
    if failed := [f"{file}::{name}" for file, tests in files.items() for name in tests["failed"]]:
        raise GoldenError(f"{len(failed)} tests failed, the first is {failed[0]}")
    ran = sum(tests["passed"] + len(tests["not_run"]) for tests in files.values())
    if ran != (wanted := num_tests()):
        raise GoldenError(f"{ran} tests ran and there are {wanted}: all of them are needed")
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    evidence.write(args.out, {"measured_on": measured_on("gpu_tests.json", device), "files": files})
    say(strict.printable(f"{args.out}: {ran} tests"))


if __name__ == "__main__":
    sys.exit(main())
