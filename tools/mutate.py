"""Small arbitrary edits of the model's source, one at a time: does the harness notice each?

    python tools/mutate.py [--count 400] [--seed 1] [--workers 2] [--log FILE] [--only GLOB] [--accept]

What is edited, and where: `tools/edits.py`.
Each runs in a forked child, with the mutated file imported afresh, over the small cases in float64, chained, and over the
variants of `RUNS` that chunk, unpad and take the other backend. A mutant that all of it misses meets the unit tests of its own
file (`UNIT_TESTS`). A difference, an exception or a timeout kills it.

Finished mutants are lines of --log; a second call goes on where the first stopped (and starts anew for a changed file).
--accept writes `goldens/mutants.json`: counts, and every survivor with the reason why it is no hole (`why`, kept by edit from the
file before; an unexplained one is listed as such and fails `tests/harness/test_mutants.py`).
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import select
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tools.edits import SOURCES, Mutant, sample  # noqa: E402

__all__ = ["UNIT_TESTS", "main", "run", "summary"]

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
KEPT = ("vidi.config", "vidi.checkpoint", "vidi.parity")  # modules that hold no model code survive in a child
FRESH = ("vidi.parity.feed", "vidi.parity.trace", "vidi.parity.stages", "stageparity.run", "vidi.parity.faults")

# ---- one mutant in a child ----------------------------------------------------------------------------------------------


class _Mutated(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from mutated source."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: Any) -> None:
        exec(compile(self.source, self.module, "exec"), module.__dict__)


def _import_anew(file: str, source: str) -> None:
    for name in list(sys.modules):
        held = any(name == kept or name.startswith(kept + ".") for kept in KEPT)
        fresh = any(name == f or name.startswith(f + ".") for f in FRESH)
        if name.startswith("vidi.") and (not held or fresh):
            del sys.modules[name]
            owner, _, last = name.rpartition(".")
            if owner in sys.modules and last in vars(sys.modules[owner]):
                delattr(sys.modules[owner], last)
    sys.meta_path.insert(0, _Mutated(file.removesuffix(".py").replace("/", "."), source))


def _verdict(mutant: Mutant, source: str, cases: dict[str, Any], tolerances: Any, unit: bool) -> str:
    """What kills the mutant: a case and stage, an exception, a unit test; "" where nothing does."""
    _import_anew(mutant.file, source)
    try:
        from vidi.parity import suite

        for name, options in RUNS if cases else ():
            with _varied(cases[name], options) as model:
                run, _ = suite.run_case(cases[name], model, tolerances, dtype="float64", isolate=False)
            row = run.first_divergence
            if row is not None:
                return f"{name}{options or ''}: {row.stage}"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name}: {error}"[:160]
    return _unit_tests(mutant.file) if unit else MISSED


def _varied(case: Any, options: dict[str, Any]) -> Any:
    """The case's model with other chunk sizes, backends, or attention on unpadded rows."""
    import contextlib

    from vidi.attention import eager
    from vidi.decoder import decoder
    from vidi.parity import feed
    from vidi.parity.faults import varlen

    @contextlib.contextmanager
    def varied() -> Iterator[Any]:
        chunks = eager.KEY_CHUNK, decoder.STREAM_CHUNK
        eager.KEY_CHUNK, decoder.STREAM_CHUNK = (
            options.get("key_chunk", chunks[0]),
            options.get("stream_chunk", chunks[1]),
        )
        model = feed.load_model(case, feed.DTYPES["float64"])
        model.frame_chunk = options.get("frame_chunk", model.frame_chunk)
        model.tower_backend = options.get("tower", model.tower_backend)
        try:
            with varlen.route(options.get("unpadded", False)):
                yield model
        finally:
            eager.KEY_CHUNK, decoder.STREAM_CHUNK = chunks

    return varied()


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


# ---- all of them --------------------------------------------------------------------------------------------------------


def run(mutants: list[tuple[Mutant, str]], log: Path, workers: int, limit: int, *, unit: bool = True) -> dict[str, str]:
    """Verdict by mutant key; those in ``log`` for the same file content are not run again."""
    import torch

    torch.set_num_threads(1)
    import pytest  # noqa: F401  (children inherit it)

    from stageparity import fingerprint, store, tolerance  # noqa: F401
    from vidi.parity import suite  # noqa: F401

    goldens = ROOT / "goldens"
    tolerances, cases = tolerance.load(goldens), {}
    for ref in store.list_cases(goldens / "small"):
        case = cases[ref.name] = store.open_case(ref.folder, ref.name)
        list(case.variant("none").items()), case.inputs  # read and verified here, once for all children
        weights = case.weights()
        case.__dict__["weights"] = lambda weights=weights: weights
    done = _read(log)
    waiting = [(m, s) for m, s in mutants if done.get((m.spot, _sha(m.file)), MISSED) == MISSED]
    if not unit:
        waiting = [(m, s) for m, s in waiting if (m.spot, _sha(m.file)) not in done]
    print(f"{len(mutants)} mutants, {len(mutants) - len(waiting)} in {log} already", file=sys.stderr)
    if waiting and (broken := _unmutated(cases, tolerances, limit, unit)):
        raise SystemExit(f"without any edit: {broken}; mend that first, a mutant would die of it")
    running: dict[int, tuple[Mutant, int]] = {}
    start = time.monotonic()
    while waiting or running:
        while waiting and len(running) < workers:
            mutant, source = waiting.pop(0)
            missed = (mutant.spot, _sha(mutant.file)) in done
            reader, writer = os.pipe()
            pid = os.fork()
            if not pid:
                _child(
                    mutant,
                    source,
                    {} if missed else cases,
                    tolerances,
                    (reader, writer, limit * (4 if unit else 1)),
                    unit,
                )
            os.close(writer)
            running[pid] = mutant, reader
        ready, _, _ = select.select([reader for _, reader in running.values()], [], [], 1.0)
        for pid, (mutant, reader) in list(running.items()):
            if reader not in ready:
                continue
            # A child that ends by its limit of processor time leaves nothing to read.
            verdict = os.read(reader, 65536).decode() or f"no end within {limit} s"
            os.close(reader)
            os.waitpid(pid, 0)
            del running[pid]
            verdict = verdict.removeprefix("=")
            done[mutant.spot, _sha(mutant.file)] = verdict
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": mutant.spot, "sha": _sha(mutant.file), "verdict": verdict}) + "\n")
            if len(done) % 25 == 0:
                print(f"{len(waiting)} to go, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return {m.spot: done[m.spot, _sha(m.file)].removeprefix(MISSED) for m, _ in mutants}


def _child(
    mutant: Mutant, source: str, cases: dict[str, Any], tolerances: Any, ends: tuple[int, int, int], unit: bool
) -> None:
    reader, writer, limit = ends
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
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            _child(Mutant(file, 0, 0, "", "", "", ""), source, cases, tolerances, (reader, writer, 4 * limit), unit)
        os.close(writer)
        verdict = os.read(reader, 65536).decode() or "no end"
        os.close(reader)
        os.waitpid(pid, 0)
        if verdict not in ("=", "=" + MISSED):
            return f"{file}: {verdict.removeprefix('=')}"
    return ""


def _sha(file: str) -> str:
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16]


def _read(log: Path) -> dict[tuple[str, str], str]:
    if not log.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {(line["key"], line["sha"]): line["verdict"] for line in lines}


def summary(
    mutants: list[tuple[Mutant, str]], verdicts: dict[str, str], seed: int, before: dict[str, str]
) -> dict[str, Any]:
    """What is stored: counts by kind and by how they died, and each survivor with its reason."""
    alive = [m for m, _ in mutants if not verdicts[m.spot]]
    kinds, living = Counter(m.kind for m, _ in mutants), Counter(m.kind for m in alive)
    unit = sum("tests/" in verdicts[m.spot] for m, _ in mutants)
    return {
        "seed": seed,
        "total": len(mutants),
        "killed": len(mutants) - len(alive),
        "killed_by_unit_tests": unit,
        "kinds": {kind: {"total": n, "killed": n - living[kind]} for kind, n in sorted(kinds.items())},
        "sources": {file: _sha(file) for file in SOURCES},
        "survivors": [asdict(m) | {"key": m.key, "why": before.get(m.key, "")} for m in alive],
    }


def main(arguments: list[str] | None = None) -> int:
    """Exits 0 where at least 95 % are killed and every survivor is explained, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument(
        "--limit",
        type=int,
        default=20,
        help="seconds of processor time for the goldens; unit tests get four times that",
    )
    parser.add_argument("--no-unit", action="store_true", help="goldens alone: what they miss waits for unit tests")
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--only", help="mutants whose key matches this glob")
    parser.add_argument("--accept", action="store_true", help="write goldens/mutants.json")
    args = parser.parse_args(arguments)
    os.nice(max(0, 10 - os.nice(0)))  # 10 in all
    args.log.parent.mkdir(parents=True, exist_ok=True)
    mutants = sample(args.count, args.seed)
    if args.only:
        mutants = [pair for pair in mutants if fnmatch.fnmatchcase(pair[0].key, args.only)]
    verdicts = run(mutants, args.log, args.workers, args.limit, unit=not args.no_unit)
    stored = ROOT / "goldens" / "mutants.json"
    before = {s["key"]: s["why"] for s in json.loads(stored.read_text("utf-8"))["survivors"]} if stored.exists() else {}
    result = summary(mutants, verdicts, args.seed, before)
    for survivor in result["survivors"]:
        print(f"{survivor['key']}  (line {survivor['line']})\n    {survivor['why'] or 'UNEXPLAINED'}")
    print(
        f"{result['killed']} of {result['total']} mutants killed, {result['killed_by_unit_tests']} by unit tests alone"
    )
    if args.accept:
        stored.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    explained = all(s["why"] for s in result["survivors"])
    return int(not (explained and result["killed"] >= 0.95 * result["total"]))


if __name__ == "__main__":
    sys.exit(main())
