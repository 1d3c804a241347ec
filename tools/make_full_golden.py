"""Make the full-size case (`vidi.parity.full`), or say more about where the stored one comes from.

    python tools/make_full_golden.py                                what making it would change (a GPU of 80 GB, a minute)
    python tools/make_full_golden.py --accept --reason "..."        write it, whole or not at all, and the ledger
    python tools/make_full_golden.py --restate COMMIT [--accept --reason "..."]
                                                                    stored numbers, provenance written anew (any machine)
    python tools/make_full_golden.py --noise RUN.json [--accept --reason "..."]
                                                                    what `vidi parity --size full --json RUN.json` had of the
                                                                    plain path is the error that later runs are held to

This golden is our own model's, so it proves nothing about the mathematics; it is the one that loads the model.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from stageparity import evidence, ledger, store, strict
from stageparity.golden import Golden, GoldenError, Sketched, Whole
from stageparity.manifest import set_sha256
from stageparity.strict import printable
from stageparity.writer import NewCase, locked, replaced, write_case
from vidi import cli, device
from vidi.config import VidiConfig
from vidi.parity import full
from vidi.parity.stages import STAGES

__all__ = ["changes", "main", "restated"]

ROOT = Path(__file__).resolve().parents[1]
LISTED = 40  # changes written out in one ledger entry


def restated(case: store.Case, made_at: str) -> NewCase:
    """The stored case, tensor by tensor, under provenance with every field that a manifest must have."""
    old = case.provenance
    said = full.provenance(old["fingerprint"], old["seed"], made_at)
    return NewCase(
        name=case.name,
        provenance={**{key: value for key, value in old.items() if key != "source"}, **said},
        config=case.config,
        inputs=case.inputs,
        targets={variant: dict(case.variant(variant).items()) for variant in case.variants},
        weights=case.manifest["weights"],
        info=case.info,
        left_out=case.left_out,
    )


def changes(old: store.Case | None, new: NewCase) -> list[str]:
    """A line per tensor, config or field of provenance that would change."""
    if old is None:
        return [f"{new.name}: new, {len(new.targets[full.VARIANT])} tensors"]
    before: Mapping[str, Golden] = old.variant(full.VARIANT)
    after, lines = new.targets[full.VARIANT], []
    for stage in STAGES.sort({*before, *after}):
        if stage not in before or stage not in after:
            lines.append(f"{new.name}/{full.VARIANT}/{stage}: {'gone' if stage in before else 'new'}")
        elif moved := _moved(before[stage], after[stage]):
            lines.append(f"{new.name}/{full.VARIANT}/{stage}: {moved}")
    for place, was, now in (
        *((f"provenance/{k}", old.provenance.get(k), new.provenance.get(k)) for k in sorted({*old.provenance, *new.provenance})),
        ("config", old.config, dict(new.config)),
        ("info", old.info, dict(new.info)),
    ):  # fmt: skip
        if was != now:
            lines.append(f"{new.name}/{place}: {'differs' if isinstance(now, dict) else f'{was!r} -> {now!r}'}")
    return lines


def _moved(old: Golden, new: Golden) -> str:
    if isinstance(old, Whole) and isinstance(new, Whole) and old.shape == new.shape and old.dtype == new.dtype:
        return "" if np.array_equal(old.array, new.array) else "other values"
    if isinstance(old, Sketched) and isinstance(new, Sketched) and old.sketch.spec == new.sketch.spec:
        parts = ("blocks", "block_max", "top_index", "top_value", "sample_value", "sum_squares")
        same = all(np.array_equal(getattr(old.sketch, part), getattr(new.sketch, part)) for part in parts)
        return "" if same and old.shape == new.shape else "another sketch"
    return f"{old.dtype} {list(old.shape)} -> {new.dtype} {list(new.shape)}, or another form"


def main(arguments: list[str] | None = None) -> int:
    """Command line; exits 0, or 2 for what is refused."""
    return cli.guarded(_run, arguments, name="make_full_golden.py")


def _run(arguments: list[str]) -> int:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goldens", type=Path, default=ROOT / "goldens")
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--restate", metavar="COMMIT", help="keep the numbers, which COMMIT's code made")
    parser.add_argument("--noise", type=Path, metavar="RUN.json", help="store the plain path's errors of that run")
    parser.add_argument("--accept", action="store_true", help="write it")
    parser.add_argument("--reason", default="", help="why; needed for writing")
    args = parser.parse_args(arguments)
    folder = args.goldens / full.FOLDER
    if args.accept and ("pytest" in sys.modules or "PYTEST_CURRENT_TEST" in os.environ):
        raise GoldenError("goldens are not written from within pytest: a test run must not turn itself green")
    if args.accept and not args.reason.strip():
        raise GoldenError('writing needs --reason "..."')
    if args.accept:
        ledger.check_reason(args.reason)
    if args.noise:
        return _noise(args)
    old = store.open_case(folder, full.CASE) if (folder / f"{full.CASE}.json").exists() else None
    if args.restate and old is None:
        raise GoldenError(f"{folder}: no case to restate")
    if not args.restate:
        device.check(args.device)
    if args.restate and old is not None:
        new = restated(old, args.restate)
    else:
        new = full.make(getattr(VidiConfig, args.size)(), device=args.device, commit=evidence.commit(ROOT))
    lines = changes(old, new)
    print(printable("\n".join(lines), keep="\n") or "nothing would change")
    if args.accept and (lines or ledger.stale(args.goldens, full.FOLDER.as_posix(), set_sha256(folder))):
        write(args.goldens, new, args.reason, lines)
    return 0


def _noise(args: argparse.Namespace) -> int:
    body = strict.read_json(args.noise)
    try:
        errors = {stage: plain for stage, (_, plain) in body["figures"].items() if plain}
        new = {"measured_on": body["measured_on"], "stages": errors}
        before = full.stored_noise(args.goldens)
        moved = [
            f"{stage}: {own['rms']:.3g} of rms" + (f", before {before[stage]['rms']:.3g}" if stage in before else "")
            for stage, own in errors.items()
            if before.get(stage) != own
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise GoldenError(f"{args.noise}: not what `vidi parity --size full --json` writes") from None
    print(printable("\n".join(moved), keep="\n") or "nothing would change")
    if args.accept and moved:
        with locked(args.goldens):
            path = args.goldens / full.NOISE
            evidence.write(path, new)
            more = [f"and {len(moved) - LISTED} more"] if len(moved) > LISTED else []
            ledger.append(
                args.goldens, full.NOISE.as_posix(), ledger.file_sha256(path), args.reason, [*moved[:LISTED], *more]
            )
    return 0


def write(goldens: Path, new: NewCase, reason: str, lines: list[str]) -> None:
    """Exchange the set for the new one and enter it in the ledger, under one lock."""
    folder, more = goldens / full.FOLDER, [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []

    def record() -> None:
        ledger.append(goldens, full.FOLDER.as_posix(), set_sha256(folder), reason, [*lines[:LISTED], *more])

    with replaced(folder, goldens=goldens, record=record) as draft:
        write_case(draft, new)
        store.verify(draft)


if __name__ == "__main__":
    sys.exit(main())
