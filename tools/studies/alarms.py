"""Alarms: 300 parity runs of the unharmed model under settings that must not matter; how many say that it is different?

Each run is a process of its own under one setting (dtype, threads, instruction sets, chunk sizes, order of keys, attention
kernel of the towers, cases), drawn from a fixed seed. Kept are every setting, how many comparisons it made, each alarm with its
text, and the worst error over budget of each gate. A stopped study goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import queue
import random
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stageparity.evidence import Basis
from stageparity.store import list_cases
from tools.studies import LONG, ROOT, counts, runs, say
from tools.studies.log import Log
from tools.studies.runs import Server, Setting

__all__ = ["LEVELS", "RUNS", "drawn", "moves", "problems", "summary", "unpacked"]

RUNS = 300
DTYPES = ("float64", "float32", "bfloat16", "float16")
LONG_AT = (1, 102, 203)  # half a minute each: three runs, in float32, bfloat16 and float16
FIELDS = ("setting", "comparisons", "alarms", "not_run", "worst", "bits", "seconds")
LEVELS: tuple[dict[str, Any], ...] = (
    {},
    {"aten": "default"},
    {"aten": "avx2"},
    {"onednn": "SSE41"},
    {"onednn": "AVX2"},
    {"mkl": "COMPATIBLE"},
    {"mkl": "AVX2"},
    {"aten": "default", "onednn": "SSE41", "mkl": "COMPATIBLE"},
)
Run = dict[str, Any]


def drawn(names: Iterable[str], count: int = RUNS) -> Iterator[Setting]:
    """The settings, from a fixed seed: dtypes and levels in turn, so that each pair occurs; the rest by lot."""
    names = list(names)
    small, recorded = ([n for n in names if n.startswith(kind) and n not in LONG] for kind in ("small", "official"))
    long = [n for n in names if n in LONG]
    lot = random.Random(2026)
    for i in range(count):
        dtype = DTYPES[i % 4]
        cases = lot.sample(small, 3)
        if dtype != "float64":
            cases.append(recorded[i // 4 % len(recorded)])
            if i in LONG_AT and long:
                cases = [long[i % len(long)]]
        yield Setting(
            dtype,
            tuple(cases),
            threads=lot.choice((1, 2)),
            mkldnn=lot.random() > 0.15,
            towers=lot.choice(("sdpa", "eager")),
            frame_chunk=lot.choice((1, 2, 64)),
            key_chunk=lot.choice((20, 100, 8192)),
            stream_chunk=lot.choice((50, 300, 32768)),
            key_order=lot.choice((None, lot.randrange(1000))),
            **LEVELS[i // 4 % len(LEVELS)],
        )


def _settings(goldens: Path) -> list[Setting]:
    return list(drawn(f"{ref.set}/{ref.name}" for ref in list_cases(goldens)))


# ---- the study ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=RUNS, help=f"only the first so many runs (default: all {RUNS})")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--fresh", action="store_true", help="forget runs that are finished")
    parser.add_argument(
        "--log", type=Path, default=ROOT / "build" / "alarms.jsonl", help="where finished runs are kept"
    )


def part(args: argparse.Namespace) -> str:
    return "" if args.count >= RUNS else f"--count {args.count}"


def basis(goldens: Path) -> Basis:
    return runs.basis(goldens, _settings(goldens))


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Make the runs that the log lacks."""
    settings = _settings(args.goldens)[: args.count]
    log = Log(args.log, basis(args.goldens), args.fresh)
    waiting = [i for i in range(len(settings)) if str(i) not in log.done]
    say(f"{len(settings)} runs, {len(settings) - len(waiting)} in {args.log} already")
    for i, run in _runs(settings, waiting, args.goldens, args.jobs):
        log.add(str(i), run)
        say(
            f"{len(log.done)}/{len(settings)} run {i}: {run['seconds']} s, {len(run['alarms'])} alarms {run['alarms'][:2]}"
        )
    made = [log.done[str(i)] for i in range(len(settings))]
    gates = sorted({gate for run in made for gate in run["worst"]})
    return {
        "device": made[0]["device"],
        "summary": summary(made),
        "gates": gates,
        "fields": FIELDS,
        "runs": [_packed(run, gates) for run in made],
    }


def _runs(settings: list[Setting], waiting: list[int], goldens: Path, jobs: int) -> Iterator[tuple[int, Run]]:
    """(number, run) as they are done; settings of one environment follow each other, so that a server serves many."""
    waiting = sorted(waiting, key=lambda i: str(sorted(settings[i].environment().items())))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        free = queue.SimpleQueue[Server]()
        for _ in range(jobs):
            free.put(stack.enter_context(Server(goldens)))

        def task(i: int) -> tuple[int, Run]:
            server = free.get()
            try:
                return i, _one(settings[i], server)
            finally:
                free.put(server)

        yield from pool.map(task, waiting)


def _one(setting: Setting, server: Server) -> Run:
    """What is kept of one run."""
    found = server.run(setting)
    worst: dict[str, float] = {}
    for row in found["rows"]:
        gate = f"{row['gate']} {row['kind']}"
        if not row["exact"]:
            worst[gate] = max(worst.get(gate, 0.0), row["ratio"])
    return {
        "setting": {"dtype": setting.dtype, "cases": list(setting.cases), **runs.changed(setting)},
        "comparisons": len(found["rows"]),
        "alarms": [
            f"{r['case']} {r['stage']} {r['kind']}: {r['ratio']:.3g} of budget" for r in found["rows"] if not r["ok"]
        ],
        "not_run": found["not_run"],
        "worst": {gate: float(f"{ratio:.3g}") for gate, ratio in sorted(worst.items())},
        "bits": found["bits"],
        "seconds": found["seconds"],
        "device": found["machine"]["device"],
    }


def _packed(run: Run, gates: list[str]) -> list[Any]:
    """A run as a list in the order of FIELDS; `worst` in that of the gates (null: not judged), `bits` in that of its cases."""
    worst = [run["worst"].get(gate) for gate in gates]
    bits = [run["bits"].get(case, "") for case in run["setting"]["cases"]]
    return [{**run, "worst": worst, "bits": bits}[name] for name in FIELDS]


def unpacked(document: Mapping[str, Any]) -> list[Run]:
    """The runs of a document, figures by name."""
    found = []
    for packed in document["runs"]:
        run = dict(zip(document["fields"], packed, strict=True))
        run["worst"] = {g: w for g, w in zip(document["gates"], run["worst"], strict=True) if w is not None}
        run["bits"] = {c: b for c, b in zip(run["setting"]["cases"], run["bits"], strict=True) if b}
        found.append(run)
    return found


# ---- figures ------------------------------------------------------------------------------------------------------------


def summary(made: list[Run]) -> dict[str, Any]:
    """Counts over runs."""
    worst: dict[str, float] = {}
    bits: dict[str, set[str]] = {}
    for run in made:
        for gate, ratio in run["worst"].items():
            worst[gate] = max(worst.get(gate, 0.0), ratio)
        for case, value in run["bits"].items():
            bits.setdefault(f"{run['setting']['dtype']} {case}", set()).add(value)
    return {
        "runs": len(made),
        "with_alarm": sum(bool(run["alarms"]) for run in made),
        "alarms": sum(len(run["alarms"]) for run in made),
        "comparisons": sum(run["comparisons"] for run in made),
        "not_run": sum(len(run["not_run"]) for run in made),
        "different_results": sum(len(values) for values in bits.values()),
        "worst_of_budget": dict(sorted(worst.items())),
    }


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    yield json.dumps(document["summary"], indent=1)
    for run in unpacked(document):
        yield from (f"{run['setting']}: {alarm}" for alarm in run["alarms"])


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    told, found = document["summary"], []
    if told["runs"] < RUNS:
        found.append(f"{RUNS - told['runs']} of {RUNS} runs are missing")
    if told["with_alarm"]:
        found.append(f"{told['with_alarm']} of {told['runs']} runs raised an alarm")
    if told["different_results"] <= told["runs"] / 3:
        found.append("settings that move no bit prove nothing")
    return found


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    then, now = ((d or {}).get("summary", {}) for d in (before, after))
    yield from counts(then, now, ("runs", "with_alarm", "comparisons", "not_run", "different_results"))
    for gate, ratio in now["worst_of_budget"].items():
        old = then.get("worst_of_budget", {}).get(gate)
        if old != ratio:
            yield f"{gate}: worst error {'none' if old is None else f'{old:.3g}'} -> {ratio:.3g} of its budget"
