"""Regenerate the small goldens from the oracle: what would change, and, only when told to, the change itself.

    python tools/regen_goldens.py [--case NAME ...] [--stage GLOB]     print what would change, per tensor
    python tools/regen_goldens.py --check                              the same for the gate: exit 1 if anything would
    python tools/regen_goldens.py --accept --reason "..."              write it, whole or not at all, and the ledger
    python tools/regen_goldens.py --accept-tolerances --reason "..."   enter changed tolerances, baselines, pos.freq
    python tools/regen_goldens.py --case NAME --candidate FILE [...]   values from a safetensors file, not the oracle

A tensor counts as changed above 1e-10 of its rms; with the spec's casts, above one float32 ulp at its scale. The tool
never loads the model or torch, never runs inside pytest when it writes, and refuses recordings of the official release,
values that are not finite, and values further from the oracle than the ones they replace.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from goldens import recipes  # noqa: E402
from goldens.oracle import forward, greedy, teacher_forced  # noqa: E402
from tools.made_from import made_from  # noqa: E402
from vidi.parity import ledger  # noqa: E402
from vidi.parity.golden import Golden, GoldenError, Whole, whole  # noqa: E402
from vidi.parity.ids import matching, sort_ids  # noqa: E402
from vidi.parity.manifest import set_sha256, weights_sha256  # noqa: E402
from vidi.parity.store import Case, list_cases, open_case, verify  # noqa: E402
from vidi.parity.writer import NewCase, replaced, write_case, write_weights  # noqa: E402

__all__ = ["Change", "check", "main", "oracle_case", "plan"]

SET = "small"
VARIANTS = ("none", "official")
WEIGHTS = "weights.safetensors"
CHANGED = 1e-10  # of rms, casts="none"
MODEL = ("torch", "vidi.model", "vidi.towers", "vidi.bridge", "vidi.attention", "vidi.decoder", "vidi.generate")
LISTED = 40  # changes written out in one ledger entry
LEDGER_FILES = {
    "tolerances": "tolerances.toml",
    "baselines": "baselines.json",
    "noise": "noise.json",
    "pos.freq": "pos_freq.safetensors",
}


@dataclass(frozen=True)
class Change:
    """One tensor (or input, config, weights) that would change. old_error, new_error: max|d|/rms against the oracle."""

    case: str
    place: str
    what: str
    old_error: float | None = None
    new_error: float | None = None

    def line(self) -> str:
        """How the change is printed and entered in the ledger."""
        errors = ""
        if self.old_error is not None and self.new_error is not None:
            errors = f"; max|d|/rms against the oracle: {self.old_error:.3g} -> {self.new_error:.3g}"
        return f"{self.case}/{self.place}: {self.what}{errors}"


def oracle_case(recipe: recipes.Recipe, weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """All tensors that the oracle computes for a recipe: variant -> stage id -> array."""
    table = recipes.POS_FREQ
    result = {}
    for casts in VARIANTS:
        result[casts] = forward(recipe.config, weights, recipe.inputs, casts=casts, pos_freq=table)
        if recipe.decode_steps:
            own = greedy(recipe.config, weights, recipe.inputs, recipe.decode_steps, casts=casts, pos_freq=table)
            forced = teacher_forced(recipe.config, weights, recipe.inputs, own.tokens_BS, casts=casts, pos_freq=table)
            result[casts] |= {
                f"{recipe.name}.tokens": own.tokens_BS,
                f"{recipe.name}.lengths": own.lengths_B,
                f"{recipe.name}.nocache.logits": forced,
            }
    return result


def plan(
    folder: Path,
    names: Iterable[str] | None = None,
    glob: str | None = None,
    candidate: Mapping[str, np.ndarray] | None = None,
) -> tuple[list[Change], dict[str, NewCase]]:
    """What would change in the golden set `folder`, and the cases to write for it.

    candidate: new values by stage id for the one named case and variant `none`, in place of the oracle's.
    """
    made, weights = recipes.cases(), recipes.weights()
    stored = {ref.name for ref in list_cases(folder)}
    wanted = set(made) | stored if names is None else set(names)
    unknown = wanted - set(made) - stored
    if unknown:
        raise GoldenError(f"no small case named {', '.join(sorted(unknown))}: there are {', '.join(sorted(made))}")
    changes: list[Change] = []
    cases: dict[str, NewCase] = {}
    weights_entry = {"file": WEIGHTS, "sha256": weights_sha256(weights)}
    for name in sorted(wanted):
        old = open_case(folder, name) if name in stored else None
        if old is not None and old.provenance["origin"] == "official":
            raise GoldenError(f"{name} is a recording of the official release: it is never regenerated, only imported")
        if name not in made:
            changes.append(Change(name, "", "gone: no recipe makes this case any more"))
            continue
        found, case = _compare_case(old, made[name], weights, weights_entry, glob, candidate)
        changes += found
        if found:
            cases[name] = case
    return changes, cases


def _compare_case(
    old: Case | None,
    recipe: recipes.Recipe,
    weights: Mapping[str, np.ndarray],
    weights_entry: Mapping[str, str],
    glob: str | None,
    candidate: Mapping[str, np.ndarray] | None,
) -> tuple[list[Change], NewCase]:
    oracle = oracle_case(recipe, weights)
    changes: list[Change] = []
    targets: dict[str, dict[str, Golden]] = {}
    for variant in VARIANTS:
        truth = oracle[variant]
        fresh = truth | dict(candidate) if candidate is not None and variant == "none" else truth
        before: Mapping[str, Golden] = old.variant(variant) if old is not None and variant in old.variants else {}
        after: dict[str, Golden] = dict(before.items())
        selected = set(matching({*fresh, *before}, glob))
        for stage in sort_ids(selected):
            if stage not in fresh:
                changes.append(Change(recipe.name, f"{variant}/{stage}", "gone: the oracle no longer has it"))
                del after[stage]
                continue
            change = _compare_tensor(recipe.name, variant, stage, before.get(stage), fresh[stage], truth.get(stage))
            if change is not None:
                changes.append(change)
                after[stage] = whole(fresh[stage])
        targets[variant] = after
    changes += _compare_rest(old, recipe, weights_entry)
    return changes, _new_case(recipe, targets, weights_entry)


def _compare_tensor(
    case: str, variant: str, stage: str, old: Golden | None, new: np.ndarray, truth: np.ndarray | None
) -> Change | None:
    place = f"{variant}/{stage}"
    if not np.isfinite(new).all():
        raise GoldenError(
            f"{case}/{place}: the new value holds NaN or Inf and is refused: mend the oracle or the input"
        )
    if old is None:
        return Change(case, place, f"new, {new.dtype.name} {list(new.shape)}")
    if not isinstance(old, Whole) or old.array.shape != new.shape or old.array.dtype != new.dtype:
        return Change(case, place, f"{old.dtype} {list(old.shape)} -> {new.dtype.name} {list(new.shape)}")
    was, now = old.array.astype(np.float64), new.astype(np.float64)
    difference = np.abs(now - was)
    rms = float(np.sqrt(np.square(was).mean()))
    one_ulp = float(np.finfo(np.float32).eps) * float(np.abs(was).max())
    allowed = 0.0 if old.array.dtype.kind in "bui" else (CHANGED * rms if variant == "none" else one_ulp)
    if difference.max() <= allowed:
        return None
    at = tuple(int(i) for i in np.unravel_index(difference.argmax(), difference.shape))
    what = f"{int((difference > allowed).sum())} of {was.size} values, at {list(at)} {was[at]:.9g} -> {now[at]:.9g}"
    if truth is None:
        return Change(case, place, what)
    errors = [float(np.abs(x - truth.astype(np.float64)).max()) / (rms or 1.0) for x in (was, now)]
    if errors[1] > errors[0]:
        raise GoldenError(
            f"{case}/{place}: the new value is further from the oracle ({errors[1]:.3g} of rms)"
            f" than the old one ({errors[0]:.3g}) and is refused"
        )
    return Change(case, place, what, *errors)


def _compare_rest(old: Case | None, recipe: recipes.Recipe, weights_entry: Mapping[str, str]) -> list[Change]:
    """Inputs, config, info and weights, which are compared exactly."""
    if old is None:
        return []
    changes = []
    stored = {stage: entry for stage, entry in old.manifest["inputs"].items()}
    for stage in sorted({*stored, *recipe.inputs}):
        if stage not in stored or stage not in recipe.inputs:
            changes.append(Change(recipe.name, f"inputs/{stage}", "gone" if stage in stored else "new"))
        elif not np.array_equal(old.inputs[stage], recipe.inputs[stage]):
            changes.append(Change(recipe.name, f"inputs/{stage}", "differs from the recipe's"))
    for place, was, now in (
        ("config", old.config, dict(recipe.config)),
        ("info", old.info, _info(recipe)),
        ("weights", old.manifest["weights"], dict(weights_entry)),
    ):
        if was != now:
            changes.append(Change(recipe.name, place, "differs from the recipe's"))
    return changes


def _info(recipe: recipes.Recipe) -> dict[str, Any]:
    info: dict[str, Any] = {"why": recipe.why}
    if recipe.decode_steps:
        window = recipe.config["sliding_window"]
        info["generate"] = {recipe.name: {"window": window, "steps": recipe.decode_steps}}
    return info


def _new_case(
    recipe: recipes.Recipe, targets: Mapping[str, Mapping[str, Golden]], weights_entry: Mapping[str, str]
) -> NewCase:
    loaded = ("numpy", "h5py", "safetensors", "vidi")
    return NewCase(
        name=recipe.name,
        provenance={
            "origin": "oracle",
            "dtype": "float64",
            "libraries": {name: sys.modules[name].__version__ for name in loaded if name in sys.modules},
            "device": "cpu",
            "seed": None,
            "commit": _commit(),
        },
        config=recipe.config,
        inputs=recipe.inputs,
        targets=targets,
        weights=weights_entry,
        info=_info(recipe),
    )


def _commit() -> str:
    """The commit of the tree, `unknown` outside a checkout."""
    asked = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def check(goldens: Path) -> list[str]:
    """Everything that the gate must not let pass: changes, broken or stale sets, files the ledger does not cover."""
    problems = []
    changes, _ = plan(goldens / SET)
    problems += [change.line() for change in changes]
    for folder in sorted({ref.folder for ref in list_cases(goldens)}):
        try:
            verify(folder)
            problems.append(ledger.stale(goldens, folder.name, set_sha256(folder)) or "")
        except GoldenError as error:
            problems.append(str(error))
    for subject, name in LEDGER_FILES.items():
        if (goldens / name).exists():
            problems.append(ledger.stale(goldens, subject, ledger.file_sha256(goldens / name)) or "")
    problems += _stale_baselines(goldens)
    return [problem for problem in problems if problem]


def _stale_baselines(goldens: Path) -> list[str]:
    """Cases whose baselines were measured with another oracle or against another golden, or not at all."""
    path = goldens / LEDGER_FILES["baselines"]
    if not path.exists():
        return []
    known, problems = json.loads(path.read_text())["made_from"], []
    for ref in list_cases(goldens):
        name = f"{ref.set}/{ref.name}"
        if known.pop(name, None) != made_from(open_case(ref.folder, ref.name)):
            problems.append(
                f"baselines of {name} were not measured from it and this oracle: tools/measure_baselines.py"
            )
    return [*problems, *(f"baselines of {name}: there is no such case" for name in known)]


def _write(goldens: Path, changes: list[Change], cases: Mapping[str, NewCase], reason: str, at: Callable) -> None:
    weights = recipes.weights()
    with replaced(goldens / SET, at) as draft:
        for change in changes:
            if change.what.startswith("gone: no recipe"):
                for suffix in (".json", ".h5"):
                    (draft / f"{change.case}{suffix}").unlink()
        write_weights(draft, WEIGHTS, weights)
        for case in cases.values():
            write_case(draft, case)
        verify(draft)
    lines = [change.line() for change in changes[:LISTED]]
    if len(changes) > LISTED:
        lines.append(f"and {len(changes) - LISTED} more")
    ledger.append(goldens, SET, set_sha256(goldens / SET), reason, lines)
    at("ledger")


def _refuse_where_unsafe() -> None:
    if "pytest" in sys.modules or "PYTEST_CURRENT_TEST" in os.environ:
        raise GoldenError("goldens are not written from within pytest: a test run must not turn itself green")
    loaded = sorted(name for name in sys.modules if name in MODEL or name.startswith(tuple(f"{m}." for m in MODEL)))
    if loaded:
        raise GoldenError(f"goldens are not written beside the model ({loaded[0]} is loaded): run the tool alone")


def main(arguments: list[str] | None = None, at: Callable[[str], None] = lambda point: None) -> int:
    """Command line. Exits 0; 1 when --check finds something; 2 for what is refused. at: see `writer.replaced`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--goldens", type=Path, default=ROOT / "goldens", help="golden folder (default: the repository's)"
    )
    parser.add_argument("--case", action="append", help="only this case (may be repeated)")
    parser.add_argument("--stage", metavar="GLOB", help="only stages that match")
    parser.add_argument("--candidate", type=Path, metavar="FILE", help="new values by stage id, for one --case")
    parser.add_argument("--check", action="store_true", help="exit 1 if anything would change or is not in the ledger")
    parser.add_argument("--accept", action="store_true", help="write the changes")
    parser.add_argument("--accept-tolerances", action="store_true", help="enter tolerances and baselines in the ledger")
    parser.add_argument("--reason", default="", help="why; needed for writing")
    args = parser.parse_args(arguments)
    try:
        if args.accept or args.accept_tolerances:
            _refuse_where_unsafe()
            if not args.reason.strip():
                raise GoldenError('writing needs --reason "..."')
        for name in args.case or ():
            _refuse_recording(args.goldens, name)
        if args.check:
            problems = check(args.goldens)
            print("\n".join(problems) or "goldens are as the oracle makes them, and the ledger covers them")
            return 1 if problems else 0
        if args.accept_tolerances:
            _accept_tolerances(args.goldens, args.reason)
            return 0
        if args.candidate and len(args.case or ()) != 1:
            raise GoldenError("--candidate holds the tensors of one case: name it with --case")
        candidate = load_file(args.candidate) if args.candidate else None
        changes, cases = plan(args.goldens / SET, args.case, args.stage, candidate)
        print("\n".join(change.line() for change in changes) or "nothing would change")
        if args.accept:
            missing = not changes and ledger.stale(args.goldens, SET, set_sha256(args.goldens / SET))
            if changes:
                _write(args.goldens, changes, cases, args.reason, at)
            elif missing:
                ledger.append(args.goldens, SET, set_sha256(args.goldens / SET), args.reason)
    except GoldenError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 2
    return 0


def _refuse_recording(goldens: Path, name: str) -> None:
    for ref in list_cases(goldens):
        if ref.name == name and ref.set != SET and name not in recipes.cases():
            raise GoldenError(f"{name} of {ref.set} is a recording of the official release: it is never regenerated")


def _accept_tolerances(goldens: Path, reason: str) -> None:
    for subject, name in LEDGER_FILES.items():
        path = goldens / name
        if path.exists() and ledger.stale(goldens, subject, ledger.file_sha256(path)):
            ledger.append(goldens, subject, ledger.file_sha256(path), reason)
            print(f"{name}: entered in the ledger")


if __name__ == "__main__":
    raise SystemExit(main())
