"""300 parity runs of the unharmed model under settings that must not matter: how many raise an alarm?

    python tools/false_alarms.py                    print the stored result; exit 1 unless 300 runs raised none
    python tools/false_alarms.py --run [--jobs 2]   run what is missing; may be stopped and started again
    python tools/false_alarms.py --run --fresh      forget the stored runs first

Each run is a process of its own under one setting (dtype, threads, instruction sets, chunk sizes, order of keys, attention
kernel of the towers, cases), drawn from a fixed seed. The result, goldens/false_alarms.json, keeps every setting, how
many comparisons it made, each alarm with its text, and the worst error over budget of each gate. Runs made under other
tolerances, baselines or goldens do not count: they are made again. Runs of an older model do, because a model may be
edited between two studies; which files have changed since is said.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from stageparity.store import list_cases  # noqa: E402
from tools.made_from import budgets_of, model_code, moved_code  # noqa: E402
from tools.one_run import Server, Setting  # noqa: E402

__all__ = ["RUNS", "drawn", "main", "read", "summary"]

RUNS = 300
DTYPES = ("float64", "float32", "bfloat16", "float16")
LONG = ("longvideo", "verylong")
LONG_AT = (1, 102, 203)  # half a minute each: three runs, in float32, bfloat16 and float16
FIELDS = ("under", "setting", "comparisons", "alarms", "not_run", "worst", "bits", "seconds")
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


def drawn(names: Iterable[str], count: int = RUNS) -> Iterator[Setting]:
    """The settings, from a fixed seed: dtypes and levels in turn, so that each pair occurs; the rest by lot."""
    names = list(names)
    small = [n for n in names if n.startswith("small/")]
    recorded = [n for n in names if n.startswith("official/") and not n.endswith(LONG)]
    long = [n for n in names if n.endswith(LONG)]
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


def one(setting: Setting, server: Server) -> dict[str, Any]:
    """What the file keeps of one run."""
    found = server.run(setting)
    worst: dict[str, float] = {}
    for row in found["rows"]:
        gate = f"{row['gate']} {row['kind']}"
        if not row["exact"]:
            worst[gate] = max(worst.get(gate, 0.0), row["ratio"])
    alarms = [f"{r['case']} {r['stage']} {r['kind']}: {r['ratio']:.3g} of budget" for r in found["rows"] if not r["ok"]]
    return {
        "setting": _changed(setting),
        "comparisons": len(found["rows"]),
        "alarms": alarms,
        "not_run": found["not_run"],
        "worst": {gate: float(f"{ratio:.3g}") for gate, ratio in sorted(worst.items())},
        "bits": found["bits"],
        "seconds": found["seconds"],
        "machine": found["machine"],
    }


def _changed(setting: Setting) -> dict[str, Any]:
    """What differs from the plain setting, as JSON gives it back."""
    own = {key: value for key, value in asdict(setting).items() if value != getattr(Setting("", ()), key)}
    return own | {"cases": list(setting.cases)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over runs."""
    worst: dict[str, float] = {}
    for run in runs:
        for gate, ratio in run["worst"].items():
            worst[gate] = max(worst.get(gate, 0.0), ratio)
    bits: dict[str, set[str]] = {}
    for run in runs:
        for case, value in run["bits"].items():
            bits.setdefault(f"{run['setting']['dtype']} {case}", set()).add(value)
    return {
        "runs": len(runs),
        "with_alarm": sum(bool(run["alarms"]) for run in runs),
        "alarms": sum(len(run["alarms"]) for run in runs),
        "comparisons": sum(run["comparisons"] for run in runs),
        "not_run": sum(len(run["not_run"]) for run in runs),
        "different_results": sum(len(values) for values in bits.values()),
        "worst_of_budget": dict(sorted(worst.items())),
    }


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0 where RUNS runs under the present tolerances raised no alarm, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument("--fresh", action="store_true", help="make all runs again")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(arguments)
    path = args.goldens / "false_alarms.json"
    settings = list(drawn(f"{ref.set}/{ref.name}" for ref in list_cases(args.goldens)))
    under = [budgets_of(args.goldens, setting.cases) for setting in settings]
    document: dict[str, Any] = read(path) if path.exists() and not args.fresh else {}
    stored = dict(enumerate(document.get("runs", ())))
    # a run counts while its setting is still drawn and nothing that judged it has changed
    runs: list[dict[str, Any] | None] = [
        run if (run := stored.get(i)) and run["setting"] == _changed(s) and run["under"] == under[i] else None
        for i, s in enumerate(settings)
    ]
    # of the oldest run that counts: code that moved since any of them was made shows
    code = document["code"] if any(runs) else model_code()
    if args.run:
        for i, run in _runs(settings, [i for i, run in enumerate(runs) if run is None], args.goldens, args.jobs):
            machine = run.pop("machine")
            runs[i] = {"under": under[i], **run}
            head = {"machine": {k: machine[k] for k in ("device", "libraries", "python", "system")}, "code": code}
            _store(runs, head, path)
            print(f"{i + 1}/{RUNS} {run['seconds']} s, {len(run['alarms'])} alarms {run['alarms'][:2]}", flush=True)
    made = [run for run in runs if run is not None]
    shown = summary(made)
    print(json.dumps(shown, indent=1))
    for run in made:
        for alarm in run["alarms"]:
            print(f"{run['setting']}: {alarm}")
    if made and (other := moved_code(code, model_code())):
        print(f"NOT RUN with today's code: made from other code, {len(other)} files changed since: {', '.join(other)}")
    if len(made) < RUNS:
        print(
            f"NOT RUN: {RUNS - len(made)} of {RUNS} runs are missing or were judged by other numbers; --run makes them"
        )
    return int(not (len(made) == RUNS and shown["with_alarm"] == 0))


def _runs(settings: list[Setting], wanted: list[int], goldens: Path, jobs: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, run) as they are done; settings of one environment follow each other, so that a server serves many."""
    wanted.sort(key=lambda i: str(sorted(settings[i].environment().items())))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as pool:
        servers = [stack.enter_context(Server(goldens)) for _ in range(jobs)]
        free = queue.SimpleQueue[Server]()
        for server in servers:
            free.put(server)

        def task(i: int) -> tuple[int, dict[str, Any]]:
            server = free.get()
            try:
                return i, one(settings[i], server)
            finally:
                free.put(server)

        yield from pool.map(task, wanted)


def _store(runs: list[dict[str, Any] | None], head: Mapping[str, Any], path: Path) -> None:
    """One run a line, as lists: FIELDS, with `worst` in the order of the head's `gates` (null: not judged) and `bits` in that of
    the run's cases."""
    made = [run for run in runs if run is not None]
    gates = sorted({gate for run in made for gate in run["worst"]})

    def line(run: Mapping[str, Any] | None) -> str:
        if run is None:
            return "null"
        packed = {
            **run,
            "worst": [run["worst"].get(gate) for gate in gates],
            "bits": [run["bits"].get(case, "") for case in run["setting"]["cases"]],
        }
        return json.dumps([packed[field] for field in FIELDS], separators=(",", ":"))

    shown = {"summary": summary(made), **head, "gates": gates, "fields": FIELDS}
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in shown.items())
    draft = path.with_suffix(".json.tmp")
    draft.write_text("{\n" + lines + ',\n"runs": [\n' + ",\n".join(map(line, runs)) + "\n]}\n")
    os.replace(draft, path)


def read(path: Path) -> dict[str, Any]:
    """The stored result, its runs as `one` gives them; a run that is still missing is None."""
    document = json.loads(path.read_text())
    for i, packed in enumerate(document["runs"]):
        if packed is not None:
            run = dict(zip(document["fields"], packed, strict=True))
            run["worst"] = {g: w for g, w in zip(document["gates"], run["worst"], strict=True) if w is not None}
            run["bits"] = {c: b for c, b in zip(run["setting"]["cases"], run["bits"], strict=True) if b}
            document["runs"][i] = run
    return document


if __name__ == "__main__":
    raise SystemExit(main())
