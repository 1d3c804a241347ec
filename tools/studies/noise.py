"""Noise: the largest error of the model against its goldens over everything that must not change a result: threads, chunk
sizes, the order of keys, a sample's neighbours, attention kernels of the towers, instruction sets.

A setting that moves no bit counts as none. Shown for every stage and dtype side by side: noise, budget, and the weakest fault
that the budget must catch. A stage overlaps where its budget is no larger than its noise, or no smaller than that fault. A
stage in half precision whose budget passes a tenth of its own size is called blind: what it cannot see, the same stage fed
alone must.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from stageparity.evidence import Basis
from stageparity.faults import stored
from stageparity.store import list_cases
from tools.studies import LONG, runs, say
from tools.studies.runs import Server, Setting
from vidi.parity.budgets import Weakest, weakest
from vidi.parity.stages import STAGES

__all__ = ["blind", "moves", "overlaps", "settings", "table", "weakest"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
FEW = ("small/base", "small/absent", "small/decode", "small/pervideo", "official/batch", "official/single")
ALONE = (
    "small/base",
    "small/holes",
    "small/absent",
    "small/novideo",
)  # no shared token budget: neighbours may not matter
BLIND = 0.1  # of rms
COLUMNS = ("max", "rms", "ratio", "at", "noise", "tolerance")


def settings(cases: Iterable[str]) -> Iterator[Setting]:
    """Every setting of the study, the plain one of each dtype first; what long cases add, resizing, the small ones have too."""
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
    return tuple(name for name in names if dtype != "float64" or not name.startswith("official"))


def _settings(goldens: Path, only: str | None = None) -> list[Setting]:
    found = list(settings(f"{ref.set}/{ref.name}" for ref in list_cases(goldens)))
    return [setting for setting in found if only in (None, setting.dtype)]


# ---- the study ----------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="only settings of this dtype")


def part(args: argparse.Namespace) -> str:
    return f"--dtype {args.dtype}" if args.dtype else ""


def basis(goldens: Path) -> Basis:
    return runs.basis(goldens, _settings(goldens))


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Run every setting, those of one environment together."""
    gates: dict[str, Any] = {}
    plain: dict[tuple[str, str], str] = {}
    tried, blinds, device = [], dict[str, dict[str, float]](), ""
    todo = sorted(_settings(args.goldens, args.dtype), key=lambda s: [x or "" for x in (s.aten, s.onednn, s.mkl)])
    with Server(args.goldens) as server:
        for n, setting in enumerate(todo, 1):
            found = server.run(setting)
            machine = found["machine"]
            device = device or f"{machine['device']} {machine['cpu_capability']}"
            bits = found["bits"].items()
            moved = [name for name, value in bits if plain.setdefault((setting.dtype, name), value) != value]
            differs = runs.changed(setting)
            counts = not differs or setting.alone or bool(moved)
            tried.append(
                {
                    "dtype": setting.dtype,
                    **differs,
                    "cases": len(setting.cases),
                    "moved_bits": len(moved),
                    "counts": counts,
                }
            )
            say(f"{n}/{len(todo)} {setting.dtype} {differs or 'plain'}: {len(moved)} of {len(bits)} cases moved")
            if counts:
                _largest(gates, found["rows"])
            for row in found["rows"]:
                if row["budgets"].get("rms", 0.0) > BLIND:
                    key = f"{row['gate']} {row['kind']}"
                    blinds.setdefault(key, {})[f"{row['case']} {row['stage']}"] = row["budgets"]["rms"]
    return _rounded(
        {
            "device": device,
            "unit": "multiples of the golden's rms; ratio: of the tolerance at the same place",
            "settings": tried,
            "blind": blinds,
            "noise_by_stage": _by_dtype(gates),
            "columns": COLUMNS,
            "gates": {
                gate: {
                    kind: {template: [own[key] for key in COLUMNS] for template, own in stages.items()}
                    for kind, stages in kinds.items()
                }
                for gate, kinds in gates.items()
            },
        }
    )


def _largest(table: dict[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Into gate -> kind -> template: the largest errors, and the error nearest to its budget with that budget."""
    for row in rows:
        if row["exact"]:
            continue
        kinds = table.setdefault(row["gate"], {}).setdefault(row["kind"], {})
        own = kinds.setdefault(STAGES.template_of(row["stage"]), {"max": 0.0, "rms": 0.0, "ratio": -1.0})
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


def _by_dtype(gates: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """dtype -> template -> the largest share of its budget that noise takes; reports show it beside an error."""
    found: dict[str, dict[str, float]] = {}
    for gate, kinds in gates.items():
        for stages in kinds.values():
            for template, own in stages.items():
                worst = found.setdefault(gate.split("-")[0], {})
                worst[template] = max(worst.get(template, 0.0), own["ratio"])
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.3g}") if math.isfinite(value) else None
    return value


# ---- beside budgets and faults ------------------------------------------------------------------------------------------


def figures(noise: Mapping[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(gate, kind, template, figures by name) of every stage; a tolerance of None has no bound."""
    for gate, kinds in noise["gates"].items():
        for kind, stages in kinds.items():
            for template, own in stages.items():
                named = dict(zip(noise["columns"], own, strict=True))
                yield (
                    gate,
                    kind,
                    template,
                    named | {"tolerance": math.inf if named["tolerance"] is None else named["tolerance"]},
                )


def table(noise: Mapping[str, Any], faults: Weakest | None) -> Iterator[str]:
    """A line per gate, kind and stage: noise | budget, in multiples of rms at one place | the weakest fault, as a multiple of the
    budget in the pass that shows it most clearly."""
    title = None
    for gate, kind, template, own in figures(noise):
        if title != (title := f"\n{gate}, {kind}: noise | budget | weakest fault"):
            yield title
        margin, name = (faults or {}).get((gate, template), (None, ""))
        if faults is None:
            fault = "NOT KNOWN"
        elif margin is None:
            fault = "none planted"
        else:
            fault = "exact" if math.isinf(margin) else f"{margin:.3g}x ({name})"
        yield f"  {template:34} {own['noise']:.1e} | {own['tolerance']:.1e} | {fault}"


def overlaps(noise: Mapping[str, Any], faults: Weakest | None) -> list[str]:
    """Stages whose tolerance does not lie between noise and weakest fault."""
    found = [
        f"{gate} {kind} {template}: noise is {own['ratio']:.3g} of the tolerance, at {own['at']}"
        for gate, kind, template, own in figures(noise)
        if own["ratio"] is None or own["ratio"] >= 1
    ]
    for (gate, template), (margin, name) in (faults or {}).items():
        if margin <= 1:
            found.append(f"{gate} {template}: fault {name} reaches {margin:.3g} of the tolerance")
    return found


def blind(noise: Mapping[str, Any]) -> Iterator[str]:
    """Stages whose budget passes a tenth of their size, by name."""
    for key, stages in noise["blind"].items():
        worst = max(stages, key=lambda s: stages[s])
        yield f"blind, {key}: {len(stages)} stages, widest {worst} ({stages[worst]:.2g} of rms): {', '.join(stages)}"


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    yield from table(document, weakest(stored.read(goldens)))
    yield ""
    yield from blind(document)


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    return overlaps(document, weakest(stored.read(goldens)))


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """The share of its budget that noise takes: the largest now and then, and where it grew most, of each gate and kind."""
    old = {place: own["ratio"] for *place_, own in figures(before or {"gates": {}}) for place in [tuple(place_)]}
    kinds: dict[tuple[str, str], dict[str, float]] = {}
    for gate, kind, template, own in figures(after):
        kinds.setdefault((gate, kind), {})[template] = own["ratio"]
    for (gate, kind), new in kinds.items():
        top = max(new, key=lambda t: new[t])
        line = f"{gate} {kind}: noise at most {new[top]:.3g} of a budget ({top}"
        then = {t: old[gate, kind, t] for t in new if old.get((gate, kind, t))}
        if then:
            grew = max(then, key=lambda t: new[t] / then[t])
            line += f"; before {max(then.values()):.3g}; grew most at {grew}, {then[grew]:.3g} -> {new[grew]:.3g}"
        yield line + ")"
