"""Mutants: small arbitrary edits of the model's source, one at a time; does the harness notice each?

What is edited, and where: `tools/studies/edits.py`. Each mutant runs in a forked child, with the model imported afresh, over the
small cases in float64, chained, and over the variants of `RUNS` that chunk, unpad and take the other backend. What all of
it misses meets the unit tests of its own file (`UNIT_TESTS`). A difference, an exception or a timeout kills it.

A survivor needs a reason why it is no hole: `tools/studies/survivors.toml`. A stopped study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fnmatch
import importlib.abc
import importlib.util
import os
import resource
import select
import sys
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stageparity import evidence
from stageparity.evidence import Basis
from stageparity.golden import GoldenError
from stageparity.store import list_cases, open_case
from tools.studies import FRAME, ROOT, counts, say
from tools.studies.edits import Mutant, sample
from tools.studies.log import Log

__all__ = ["RUNS", "UNIT_TESTS", "moves", "problems", "reasons", "run", "summary"]

COUNT, SEED, GOAL = 400, 1, 0.95
SURVIVORS = Path(__file__).with_name("survivors.toml")

#: tests of one folder or file, tried on mutants that the goldens miss
UNIT_TESTS = {
    "*": ("tests/harness/test_gaps.py",),
    "vidi/bridge/*": ("tests/unit/bridge", "tests/properties/test_property_grid.py"),
    "vidi/towers/*": ("tests/unit/towers",),
    "vidi/attention/*": ("tests/unit/attention",),
    "vidi/decoder/*": ("tests/unit/decoder",),
    "vidi/inputs/batch.py": ("tests/unit/inputs/test_inputs_batch.py",),
    "vidi/inputs/pixels.py": ("tests/unit/inputs/test_inputs_video.py",),
    "vidi/loss.py": ("tests/unit/test_loss.py",),
    "vidi/generate.py": ("tests/unit/test_generate.py",),
    "vidi/model.py": ("tests/unit/test_model.py", "tests/unit/test_loss.py", "tests/unit/test_generate.py"),
    "vidi/cache.py": ("tests/unit/test_generate.py", "tests/unit/decoder"),
}

#: (case, options): chained float64 runs, the most telling first
RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("base", {}),
    ("decode", {}),
    ("absent", {}),
    ("pervideo", {}),
    ("train", {}),
    ("holes", {}),
    ("budget", {}),
    ("oneframe", {}),
    ("noaudio", {}),
    ("novideo", {}),
    ("base", {"frame_chunk": 1, "key_chunk": 5, "stream_chunk": 50}),
    ("pervideo", {"frame_chunk": 2, "key_chunk": 7, "stream_chunk": 20}),
    ("absent", {"unpadded": True}),
    ("base", {"tower": "eager"}),
    ("absent", {"key_chunk": 3}),
)

MISSED = "?"  #: all goldens agree; unit tests have not been asked yet


# ---- the study ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, help=f"so many mutants (default: {COUNT})")
    parser.add_argument("--seed", type=int, default=SEED, help="which (default: 1)")
    parser.add_argument("--only", metavar="GLOB", help="mutants whose key matches")
    parser.add_argument("--no-unit", action="store_true", help="goldens alone: what they miss waits for unit tests")
    parser.add_argument("--workers", type=int, default=2, help="mutants side by side (default: 2)")
    seconds = "seconds of processor time for the goldens; unit tests get four times that (default: 20)"
    parser.add_argument("--limit", type=int, default=20, help=seconds)
    parser.add_argument("--fresh", action="store_true", help="forget mutants that are finished")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "build" / "mutants.jsonl", help="where finished mutants are kept"
    )


def part(args: argparse.Namespace) -> str:
    other = (args.count, args.seed) != (COUNT, SEED)
    asked = {
        f"--count {args.count} --seed {args.seed}": other,
        f"--only {args.only}": args.only,
        "--no-unit": args.no_unit,
    }
    return " ".join(text for text, given in asked.items() if given)


def basis(goldens: Path) -> Basis:
    """The model, what judges it, and the unit tests; the attention backends and fast kernels of a GPU too, as far as unit tests
    reach them."""
    tests = {t for paths in UNIT_TESTS.values() for path in paths for t in _files(path)}
    refs = list_cases(goldens / "small")
    return Basis(
        evidence.code(["tools/studies/mutants.py", *sorted(tests)], ROOT, FRAME),
        evidence.goldens(refs),
        evidence.budgets(goldens, [f"small/{ref.name}" for ref in refs]),
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
    log = Log(args.log, basis(args.goldens), args.fresh)
    return summary([m for m, _ in mutants], run(mutants, log, args))


def summary(mutants: list[Mutant], verdicts: Mapping[str, str]) -> dict[str, Any]:
    """Counts by kind and by how they died, and each survivor."""
    alive = [m for m in mutants if not verdicts[m.spot]]
    kinds, living = Counter(m.kind for m in mutants), Counter(m.kind for m in alive)
    return {
        "total": len(mutants),
        "killed": len(mutants) - len(alive),
        "killed_by_unit_tests": sum("tests/" in verdicts[m.spot] for m in mutants),
        "kinds": {kind: {"total": n, "killed": n - living[kind]} for kind, n in sorted(kinds.items())},
        "survivors": [asdict(m) | {"key": m.key} for m in alive],
    }


def reasons() -> dict[str, str]:
    """Why a survivor is no hole, by its key."""
    return tomllib.loads(SURVIVORS.read_text("utf-8"))["why"]


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    known = reasons()
    for survivor in document["survivors"]:
        yield f"{survivor['key']}  (line {survivor['line']})\n    {known.get(survivor['key'], 'UNEXPLAINED')}"
    yield "{killed} of {total} mutants killed, {killed_by_unit_tests} by unit tests alone".format_map(document)


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    known, alive = reasons(), [survivor["key"] for survivor in document["survivors"]]
    found = [f"a survivor without a reason in {SURVIVORS.name}: {key}" for key in alive if not known.get(key)]
    if document["killed"] < GOAL * document["total"]:
        found.append(f"{document['killed']} of {document['total']} killed, {GOAL:.0%} are asked")
    return found


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    yield from counts(before, after, ("total", "killed", "killed_by_unit_tests"))
    then, now = ({s["key"] for s in (d or {}).get("survivors", ())} for d in (before, after))
    yield from (f"survives: {key}" for key in sorted(now - then))
    yield from (f"dies now: {key}" for key in sorted(then - now))


# ---- all of them --------------------------------------------------------------------------------------------------------


def run(mutants: list[tuple[Mutant, str]], log: Log, args: argparse.Namespace) -> dict[str, str]:
    """Verdict by mutant: what kills it, nothing where it lives. Raises GoldenError where sources without any edit die too."""
    import pytest  # noqa: F401  (children inherit it)
    import torch

    from stageparity import run as runs  # noqa: F401
    from stageparity import tolerance
    from vidi.parity.stages import STAGES

    torch.set_num_threads(1)
    unit, limit, cases = not args.no_unit, args.limit, {}
    tolerances = tolerance.load(args.goldens, STAGES)
    for ref in list_cases(args.goldens / "small"):
        case = cases[ref.name] = open_case(ref.folder, ref.name)
        list(case.variant("none").items()), case.inputs  # read and verified here, once for all children
        weights = case.weights()
        case.__dict__["weights"] = lambda weights=weights: weights
    waiting = [
        (m, s) for m, s in mutants if log.done.get(m.spot, MISSED) == MISSED and (unit or m.spot not in log.done)
    ]
    say(f"{len(mutants)} mutants, {len(mutants) - len(waiting)} in {log.path} already")
    if waiting and (broken := _unmutated(cases, tolerances, limit, unit)):
        raise GoldenError(f"without any edit: {broken}; mend that first, a mutant would die of it")
    running: dict[int, tuple[Mutant, int]] = {}
    start = time.monotonic()
    while waiting or running:
        while waiting and len(running) < args.workers:
            mutant, source = waiting.pop(0)
            asked = {} if mutant.spot in log.done else cases  # what the goldens missed waits for unit tests alone
            pid, reader = _fork(mutant, source, asked, tolerances, limit * (4 if unit else 1), unit)
            running[pid] = mutant, reader
        ready, _, _ = select.select([reader for _, reader in running.values()], [], [], 1.0)
        for pid, (mutant, reader) in list(running.items()):
            if reader in ready:
                del running[pid]
                log.add(mutant.spot, (_ended(pid, reader) or f"no end within {limit} s").removeprefix("="))
                if len(log.done) % 25 == 0:
                    say(f"{len(waiting)} to go, {time.monotonic() - start:.0f} s")
    return {m.spot: log.done[m.spot].removeprefix(MISSED) for m, _ in mutants}


def _unmutated(cases: dict[str, Any], tolerances: Any, limit: int, unit: bool) -> str:
    """What a child finds wrong with sources as they are (printed anew by the syntax tree), by group of unit tests."""
    for file in (
        "vidi/bridge/fold.py",
        "vidi/towers/layer.py",
        "vidi/attention/mask.py",
        "vidi/inputs/batch.py",
        "vidi/decoder/mlp.py",
    ):
        source = ast.unparse(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        verdict = (
            _ended(*_fork(Mutant(file, 0, 0, "", "", "", ""), source, cases, tolerances, 4 * limit, unit)) or "no end"
        )
        if verdict not in ("=", "=" + MISSED):
            return f"{file}: {verdict.removeprefix('=')}"
    return ""


# ---- one mutant in a child ----------------------------------------------------------------------------------------------


def _fork(
    mutant: Mutant, source: str, cases: dict[str, Any], tolerances: Any, limit: int, unit: bool
) -> tuple[int, int]:
    """(process, where its verdict can be read). A child that ends by its limit of processor time leaves nothing to read."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        verdict = _verdict(mutant, source, cases, tolerances, unit)
    except BaseException as error:
        verdict = f"{type(error).__name__}: {error}"[:160]
    os.write(writer, ("=" + verdict).encode())
    os._exit(0)


def _ended(pid: int, reader: int) -> str:
    verdict = os.read(reader, 65536).decode()
    os.close(reader)
    os.waitpid(pid, 0)
    return verdict


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from mutated source."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, self.module, "exec"), module.__dict__)


def _import_anew(file: str, source: str) -> None:
    """Forget all of the model and of its stages; the harness knows them by name alone, and stays."""
    for name in [name for name in sys.modules if name.split(".")[0] == "vidi"]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Mutated(file.removesuffix(".py").replace("/", "."), source))


def _verdict(mutant: Mutant, source: str, cases: dict[str, Any], tolerances: Any, unit: bool) -> str:
    """What kills the mutant: a case and stage, an exception, a unit test; nothing where nothing does."""
    _import_anew(mutant.file, source)
    try:
        from stageparity.run import run_case
        from vidi.parity.subject import VidiSubject

        subject = VidiSubject("float64")
        for name, options in RUNS if cases else ():
            with subject.scope(), subject.setting("unpadded" if options.get("unpadded") else ""), _chunks(options):
                model: Any = subject.build(cases[name])
                model.frame_chunk = options.get("frame_chunk", model.frame_chunk)
                model.tower_backend = options.get("tower", model.tower_backend)
                done, _ = run_case(subject, cases[name], model, tolerances, alone=False)
            row = done.first_divergence
            if row is not None:
                return f"{name}{options or ''}: {row.stage}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {error}"[:160]
    return _unit_tests(mutant.file) if unit else MISSED


@contextlib.contextmanager
def _chunks(options: dict[str, Any]) -> Iterator[None]:
    """Other chunk sizes of keys and streams."""
    from unittest import mock

    from vidi.attention import eager
    from vidi.decoder import decoder

    with (
        mock.patch.object(eager, "KEY_CHUNK", options.get("key_chunk", eager.KEY_CHUNK)),
        mock.patch.object(decoder, "STREAM_CHUNK", options.get("stream_chunk", decoder.STREAM_CHUNK)),
    ):
        yield


def _unit_tests(file: str) -> str:
    """The name of the first unit test that the mutant fails, "" where it passes all."""
    import pytest

    tests = [
        test
        for glob, paths in UNIT_TESTS.items()
        if fnmatch.fnmatchcase(file, glob)
        for test in paths
        if any((ROOT / test).rglob("test_*.py")) or (ROOT / test).is_file()
    ]
    failed: list[str] = []

    class Listen:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    if not tests:
        return ""
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests], plugins=[Listen()])
    return "" if code == 0 else failed[0] if failed else f"pytest ends with {int(code)}"
