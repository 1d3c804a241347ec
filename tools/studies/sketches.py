"""Sketches: what every known fault makes of the tensors of its own case and of plain recordings, in little room, so that a port's
can be told from them (`stageparity/port/sketches.py` says what is kept). The numbers lie beside the document, in
measured/fault_sketches.h5.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py

from stageparity import evidence
from stageparity.arrays import to_numpy
from stageparity.evidence import Basis
from stageparity.golden import GoldenError, whole
from stageparity.port import sketches as store
from stageparity.port.sketches import COLUMNS, NUMBERS, PASSES, Difference, Known, Sketches, Table
from stageparity.store import list_cases
from tools.studies import CPU, ROOT, say

__all__ = ["PLAIN", "made"]

#: recordings that a port of either model can run, where every fault is planted beside its own case
PLAIN = {"9b": ("official/single", "official/batch"), "7b": ("official-7b/single", "official-7b/batch")}
LEAST = 0.01  #: of a budget: what a fault must change
SKETCHED = 12  #: stages of a fault in a case that are kept with their sketch, and the last one; of the others the rms
MOST = 3_000_000  #: bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fault", metavar="GLOB", help="only faults that match, such as 'masks.*'")


def part(args: argparse.Namespace) -> str:
    return f"--fault {args.fault}" if args.fault else ""


def basis(goldens: Path) -> Basis:
    used = {place for _, places in _planted() for place in places}
    entries = ["tools/studies/sketches.py", "vidi/parity/faults/__init__.py", "stageparity/faults/tensors.py"]
    return Basis(
        evidence.code(entries, ROOT, CPU),
        evidence.goldens(ref for ref in list_cases(goldens) if f"{ref.set}/{ref.name}" in used),
        evidence.budgets(goldens, sorted(used)),
    )


def _planted(glob: str | None = None) -> list[tuple[Any, list[str]]]:
    """(fault, cases that it is planted in) of every fault that a CPU can show."""
    from vidi.parity.faults import FAULTS, FAULTS_7B

    both = [(fault, PLAIN[model]) for model, known in (("9b", FAULTS), ("7b", FAULTS_7B)) for fault in known.values()]
    return [
        (fault, list(dict.fromkeys((fault.place, *plain))))
        for fault, plain in both
        if not fault.needs and fnmatch.fnmatchcase(fault.name, glob or "*")
    ]


def measure(args: argparse.Namespace, before: dict[str, Any] | None) -> dict[str, Any]:
    """Plant them all. ``files`` holds the numbers."""
    import torch

    from stageparity import fingerprint

    torch.set_num_threads(1)
    chosen = _planted(args.fault)
    if not chosen:
        raise GoldenError(f"no fault matches {args.fault!r}: vidi faults --list names them")
    found, refused = made(args.goldens, chosen)
    raw = _container(found)
    machine = fingerprint.fingerprint()
    cases: dict[str, Any] = {}
    for (place, passes), table in found.tables.items():
        own = {"golden": found.goldens[place], "refused": refused.get(place, {}), "passes": {}}
        case = cases.setdefault(place, own)
        units = {stage: float(f"{unit:.12g}") for stage, unit in zip(table.stages, table.units, strict=True)}
        case["passes"][passes] = {"rows": len(table.fault), "sketches": len(table.numbers), "units": units}
    return {
        "device": f"{machine['device']} {machine['cpu_capability']}",
        "beside": {NUMBERS: raw},
        "numbers": hashlib.sha256(raw).hexdigest(),
        "bytes": len(raw),
        "faults": {fault.name: [fault.what, fault.dtype] for fault in found.faults},
        "cases": cases,
    }


def made(goldens: Path, chosen: Iterable[tuple[Any, Iterable[str]]]) -> tuple[Sketches, dict[str, dict[str, str]]]:
    """Sketches of these faults in these cases, each in float32 or its own lower dtype; and SET/CASE -> fault -> why it does
    not run there."""
    from stageparity.faults.tensors import tensors
    from stageparity.fingerprint import ieee
    from stageparity.subject import reference_of
    from vidi.parity import faults

    start, bench, chosen = time.perf_counter(), faults.bench(goldens), list(chosen)
    stages, known = bench.tolerances.stages, [_known(fault) for fault, _ in chosen]
    clean: dict[tuple[str, str, str], Any] = {}
    judged: dict[str, Any] = {}
    found: dict[tuple[str, str], dict[tuple[int, str], Difference]] = {}
    refused: dict[str, dict[str, str]] = {}

    def references(place: str) -> Any:
        variant, gate = reference_of(bench.case(place), "float32")
        targets = store.goldens(bench.case(place).variant(variant), stages)
        units = {p: store.units(targets, bench.tolerances, stages, gate, place, p) for p in PASSES}
        return targets, units

    with ieee():
        for n, (fault, places) in enumerate(chosen):
            dtype = known[n].dtype
            for place in places:
                if dtype != "float32" and "none" not in bench.case(place).variants:
                    continue  # recordings judge one dtype each
                judged[place] = judged.get(place) or references(place)
                plain = (place, dtype, fault.setting)
                clean[plain] = clean.get(plain) or tensors(bench, place, dtype, setting=fault.setting)
                try:
                    faulty = tensors(bench, place, dtype, fault, setting=fault.setting)
                except Exception as error:  # a fault may break anything
                    refused.setdefault(place, {})[fault.name] = f"{type(error).__name__}: {error}"[:200]
                    continue
                for p in PASSES:
                    new = _changes(faulty[p], clean[plain][p], judged[place][0], judged[place][1][p])
                    found.setdefault((place, p), {}).update({(n, stage): d for stage, d in new})
            if not (n + 1) % 50 or n + 1 == len(chosen):
                say(f"{n + 1} of {len(chosen)} faults, {time.perf_counter() - start:.0f} s")
    tables = {}
    for (place, p), differences in found.items():
        units = judged[place][1][p]
        tables[place, p] = Table.of(differences, {stage: units[stage] for stage in stages.sort(units)}, SKETCHED)
    return Sketches(tuple(known), tables, {place: bench.case(place).identity for place in judged}), refused


def _known(fault: Any) -> Known:
    return Known(fault.name, fault.what, fault.dtype if fault.dtype in ("bfloat16", "float16") else "float32")


def _changes(
    faulty: Mapping[str, Any], clean: Mapping[str, Any], goldens: Mapping[str, Any], units: Mapping[str, float]
) -> Iterator[tuple[str, Difference]]:
    """(stage, difference to the golden) of what is not as without the fault: by more than LEAST, or at all where it is exact."""
    for stage, x in faulty.items():
        if stage not in units:
            continue
        if stage in clean and store.difference(x, whole(to_numpy(clean[stage])[0]), units[stage]).rms <= LEAST:
            continue
        yield stage, store.difference(x, goldens[stage], units[stage])


def _container(found: Sketches) -> bytes:
    """The numbers of all tables as an HDF5 file whose bytes depend on them alone."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, NUMBERS.name)
        with h5py.File(path, "w", libver=("v110", "v110"), track_order=False) as file:
            for (place, passes), table in sorted(found.tables.items()):
                for name in COLUMNS:
                    array = getattr(table, name)
                    packed: dict[str, Any] = {"chunks": array.shape, "shuffle": True, "fletcher32": True}
                    packed |= {"compression": "gzip", "compression_opts": 9}
                    file.create_dataset(
                        f"{place}/{passes}/{name}", data=array, track_times=False, **(packed if array.size else {})
                    )
        return path.read_bytes()


def moves(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Iterator[str]:
    """Faults that came or went, and tables whose number of rows changed."""
    old = before or {"faults": after["faults"], "cases": {}}
    yield from (f"+ {name}" for name in after["faults"] if name not in old["faults"])
    yield from (f"- {name}" for name in old["faults"] if name not in after["faults"])
    for place, case in after["cases"].items():
        for passes, table in case["passes"].items():
            then = old["cases"].get(place, {}).get("passes", {}).get(passes, {}).get("rows")
            if then != table["rows"]:
                yield f"{place} {passes}: {then} -> {table['rows']} rows"


def show(document: Mapping[str, Any], goldens: Path) -> Iterator[str]:
    yield f"{len(document['faults'])} faults in {len(document['cases'])} cases, {document['bytes'] / 1e6:.2f} MB"
    for place, case in document["cases"].items():
        sizes = ", ".join(
            f"{p} {table['rows']:,} rows ({table['sketches']:,} sketches)" for p, table in case["passes"].items()
        )
        yield f"{place}: {sizes}; {len(case['refused'])} faults do not run here"


def problems(document: Mapping[str, Any], goldens: Path) -> list[str]:
    return [f"{document['bytes']:,} bytes; at most {MOST:,} are kept in a repository"] * (document["bytes"] > MOST)
