"""Noise, tolerance and weakest fault of every stage, side by side; fails where they overlap.

    python tools/measure_noise.py                               print the stored figures, exit 1 where they overlap
    python tools/measure_noise.py --measure --reason "..."      measure the noise anew and enter it in the ledger

Noise is the largest error of the model against its goldens over everything that must not change a result: threads, chunk
sizes, the order of keys, a sample's neighbours, attention kernels of the towers, and instruction sets, each in a process
of its own. A setting that moves no bit counts as none. Faults are read from goldens/faults.json (`vidi faults --json`);
without it they are NOT KNOWN. A stage overlaps where its tolerance is no larger than its noise, or no smaller than the
weakest fault that it must catch. A stage in half precision whose budget passes a tenth of its own size is called
blind: what it cannot see, the same stage fed alone must.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from stageparity import ledger  # noqa: E402
from stageparity.golden import GoldenError  # noqa: E402
from stageparity.store import list_cases  # noqa: E402
from stageparity.writer import locked  # noqa: E402
from tools.made_from import budgets_of  # noqa: E402
from tools.one_run import Server, Setting  # noqa: E402
from vidi.parity.stages import template_of  # noqa: E402

__all__ = ["blind", "main", "overlaps", "read", "settings", "stale", "table"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
LONG = ("official/longvideo", "official/verylong")  # what they add, resizing, the small cases have too
FEW = ("small/base", "small/absent", "small/decode", "small/pervideo", "official/batch", "official/single")
ALONE = (
    "small/base",
    "small/holes",
    "small/absent",
    "small/novideo",
)  # no shared token budget: a neighbour may not matter
BLIND = 0.1  # of rms
COLUMNS = ("max", "rms", "ratio", "at", "noise", "tolerance")


def settings(cases: Iterable[str]) -> Iterator[Setting]:
    """Every setting of the study, the plain one of each dtype first."""
    names = tuple(name for name in cases if name not in LONG)
    few = tuple(name for name in FEW if name in names)
    for dtype in DTYPES:
        yield Setting(dtype, _judged(names, dtype))
        for change in (
            {"threads": 2},
            {"frame_chunk": 1, "key_chunk": 20, "stream_chunk": 50},
            {"key_order": 1},
            {"towers": "eager"},
            {"mkldnn": False},
            {"aten": "default"},
            {"aten": "avx2"},
            {"onednn": "SSE41"},
            {"mkl": "COMPATIBLE"},
        ):
            yield replace(Setting(dtype, _judged(few, dtype)), **change)
        yield Setting(dtype, tuple(name for name in ALONE if name in names), alone=True)


def _judged(names: tuple[str, ...], dtype: str) -> tuple[str, ...]:
    """float32 recordings do not judge float64."""
    return tuple(name for name in names if dtype != "float64" or not name.startswith("official/"))


def _largest(table: dict[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Into gate -> kind -> template: the largest errors, and the error nearest to its budget with that budget."""
    for row in rows:
        if row["exact"]:
            continue
        kinds = table.setdefault(row["gate"], {}).setdefault(row["kind"], {})
        own = kinds.setdefault(template_of(row["stage"]), {"max": 0.0, "rms": 0.0, "ratio": -1.0})
        for metric in ("max", "rms"):
            own[metric] = max(own[metric], row["errors"].get(metric, 0.0))
        if row["ratio"] > own["ratio"]:
            over = {m: row["errors"][m] / budget for m, budget in row["budgets"].items() if budget}
            metric = max(over, key=lambda m: over[m], default="max")
            own |= {
                "ratio": row["ratio"],
                "at": f"{row['case']} {row['stage']} {metric}",
                "noise": row["errors"].get(metric, 0.0),
                "tolerance": row["budgets"].get(metric, math.inf),
            }


def _runs(names: list[str], goldens: Path) -> Iterator[tuple[Setting, dict[str, Any]]]:
    with Server(goldens) as server:
        # plain settings first; then those of one environment together
        for setting in sorted(settings(names), key=lambda s: [x or "" for x in (s.aten, s.onednn, s.mkl)]):
            yield setting, server.run(setting)


def measure(goldens: Path) -> dict[str, Any]:
    """Run every setting; what noise.json holds."""
    names = [f"{ref.set}/{ref.name}" for ref in list_cases(goldens)]
    gates: dict[str, Any] = {}
    plain: dict[tuple[str, str], str] = {}
    tried: list[dict[str, Any]] = []
    blinds: dict[str, dict[str, float]] = {}
    machine: dict[str, Any] = {}
    for setting, found in _runs(names, goldens):
        machine = machine or found["machine"]
        new = {
            name: bits for name, bits in found["bits"].items() if plain.setdefault((setting.dtype, name), bits) != bits
        }
        changed = {
            k: v for k, v in asdict(setting).items() if k not in ("cases", "dtype") and v != getattr(Setting("", ()), k)
        }
        counts = not changed or setting.alone or bool(new)
        tried.append(
            {"dtype": setting.dtype, **changed, "cases": len(setting.cases), "moved_bits": len(new), "counts": counts}
        )
        print(f"{setting.dtype} {changed or 'plain'}: {len(new)} of {len(found['bits'])} cases moved", flush=True)
        if counts:
            _largest(gates, found["rows"])
        for row in found["rows"]:
            if row["budgets"].get("rms", 0.0) > BLIND:
                key = f"{row['gate']} {row['kind']}"
                blinds.setdefault(key, {})[f"{row['case']} {row['stage']}"] = row["budgets"]["rms"]
    by_dtype: dict[str, dict[str, float]] = {}
    for gate, kinds in gates.items():
        for stages in kinds.values():
            for template, own in stages.items():
                worst = by_dtype.setdefault(gate.split("-")[0], {})
                worst[template] = max(worst.get(template, 0.0), own["ratio"])
    return {
        "unit": "multiples of the golden's rms; ratio: of the tolerance at the same place",
        "measured_under": {name: budgets_of(goldens, [name]) for name in names if name not in LONG},
        "machine": machine,
        "settings": tried,
        "gates": gates,
        "blind": blinds,
        "noise_by_stage": by_dtype,
    }


def faults_of(goldens: Path) -> dict[tuple[str, str], tuple[float, str]] | None:
    """(gate, template) -> (margin, name) of the weakest fault that is expected there; None without faults.json."""
    path = goldens / "faults.json"
    if not path.exists():
        return None
    weakest: dict[tuple[str, str], tuple[float, str]] = {}
    for fault in json.loads(path.read_text())["faults"]:
        stage = fault.get("expected_stage")
        if stage is None or fault.get("crashed") or fault.get("loud") or fault.get("not_run"):
            continue
        dtype = fault.get("dtype", "float64")
        recorded = str(fault.get("case", "")).startswith("official/")
        reference = "recorded" if recorded else "none" if dtype == "float64" else "official"
        margin = math.inf if fault.get("margin") is None else float(fault["margin"])
        key = (f"{dtype}-{reference}", template_of(stage))
        weakest[key] = min(weakest.get(key, (math.inf, "")), (margin, fault["name"]))
    return weakest


def table(noise: Mapping[str, Any], faults: Mapping[tuple[str, str], tuple[float, str]] | None) -> Iterator[str]:
    """A line per gate, kind and stage: noise | tolerance | weakest fault, in multiples of rms at one place."""
    for gate, kinds in noise["gates"].items():
        for kind, stages in kinds.items():
            yield f"\n{gate}, {kind}: noise | tolerance | weakest fault (of rms)"
            for template, own in stages.items():
                margin, name = (faults or {}).get((gate, template), (None, ""))
                if faults is None:
                    fault = "NOT KNOWN"
                elif margin is None:
                    fault = "none planted"
                else:
                    fault = (
                        "exact" if math.isinf(margin) else f"{margin * own['tolerance']:.1e} ({name}, {margin:.3g}x)"
                    )
                yield f"  {template:34} {own['noise']:.1e} | {own['tolerance']:.1e} | {fault}"


def overlaps(noise: Mapping[str, Any], faults: Mapping[tuple[str, str], tuple[float, str]] | None) -> list[str]:
    """Stages whose tolerance does not lie between noise and weakest fault."""
    found = []
    for gate, kinds in noise["gates"].items():
        for kind, stages in kinds.items():
            for template, own in stages.items():
                if own["ratio"] >= 1:
                    found.append(
                        f"{gate} {kind} {template}: noise is {own['ratio']:.3g} of the tolerance, at {own['at']}"
                    )
    for (gate, template), (margin, name) in (faults or {}).items():
        if margin <= 1:
            found.append(f"{gate} {template}: fault {name} reaches {margin:.3g} of the tolerance")
    return found


def stale(noise: Mapping[str, Any], goldens: Path) -> list[str]:
    """Cases whose golden or budgets are others than when the noise was measured."""
    names = {f"{ref.set}/{ref.name}" for ref in list_cases(goldens)} - set(LONG)
    changed = {name for name in names if noise["measured_under"].get(name) != budgets_of(goldens, [name])}
    return [
        f"{name}: golden, tolerances or baselines have changed since the noise was measured" for name in sorted(changed)
    ]


def blind(noise: Mapping[str, Any]) -> Iterator[str]:
    """Stages whose budget passes a tenth of their size, by name."""
    for key, stages in noise["blind"].items():
        worst = max(stages, key=lambda s: stages[s])
        yield f"blind, {key}: {len(stages)} stages, widest {worst} ({stages[worst]:.2g} of rms): {', '.join(stages)}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, 1 where figures overlap, 2 for what is refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--measure", action="store_true", help="measure, write noise.json and enter it in the ledger")
    parser.add_argument("--reason", default="")
    args = parser.parse_args(arguments)
    path = args.goldens / "noise.json"
    try:
        if args.measure:
            if "pytest" in sys.modules or not args.reason.strip():
                raise GoldenError('noise is measured outside pytest and with --reason "..."')
            draft = path.with_suffix(".json.tmp")
            draft.write_text(_rendered(_rounded(measure(args.goldens))))
            with locked(args.goldens, wait=True):
                os.replace(draft, path)
                ledger.append(args.goldens, "noise", ledger.file_sha256(path), args.reason)
        if not path.exists():
            raise GoldenError(f"{path} does not exist: run with --measure")
    except GoldenError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    noise, faults = read(path), faults_of(args.goldens)
    print("\n".join(table(noise, faults)))
    print("\n".join(["", *blind(noise)]))
    found = overlaps(noise, faults)
    found += stale(noise, args.goldens)
    print(
        "\n".join(found) or "every tolerance lies above its noise" + ("" if faults is None else " and below its faults")
    )
    return int(bool(found))


def read(path: Path) -> dict[str, Any]:
    """noise.json as `measure` gives it: gate -> kind -> template -> figures by name. The file lists them, a stage a line."""
    noise = json.loads(path.read_text())
    for kinds in noise["gates"].values():
        for stages in kinds.values():
            for template, figures in stages.items():
                stages[template] = dict(zip(noise["columns"], figures, strict=True))
    return noise


def _rendered(noise: dict[str, Any]) -> str:
    def row(figures: Mapping[str, Any]) -> str:
        return json.dumps([figures[key] for key in COLUMNS], separators=(",", ":"), allow_nan=False)

    head = {key: value for key, value in noise.items() if key != "gates"} | {"columns": COLUMNS}
    gates = []
    for gate, kinds in noise["gates"].items():
        own = [
            f"{json.dumps(kind)}: {{\n" + ",\n".join(f"{json.dumps(s)}:{row(f)}" for s, f in stages.items()) + "\n}"
            for kind, stages in kinds.items()
        ]
        gates.append(f"{json.dumps(gate)}: {{\n" + ",\n".join(own) + "\n}")
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in head.items()]
    return "{\n" + ",\n".join([*lines, '"gates": {\n' + ",\n".join(gates) + "\n}"]) + "\n}\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    raise SystemExit(main())
