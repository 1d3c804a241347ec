"""Tensors of a foreign model against goldens: what `vidi parity --candidate` and `vidi port run` share. Needs no torch."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stageparity import store, tolerance
from stageparity.golden import GoldenError, Whole
from stageparity.port import candidate, capsule, declared, sketched
from stageparity.port.candidate import Candidate, Unusable
from stageparity.port.explain import Explanation, explain_case
from stageparity.port.judge import Coverage, coverage, judge
from stageparity.port.sketches import STORE as SKETCHES
from stageparity.port.sketches import Sketches
from stageparity.report.verdict import Context, References, findings, whose
from stageparity.run import CaseRun, Row, Run
from stageparity.stage import fill
from stageparity.store import Case, CaseRef, Targets
from vidi.commands import arguments, outputs
from vidi.commands.cases import check_stages, for_ports
from vidi.parity import mixed, port
from vidi.parity.goldens import goldens_dir, inputs_of

__all__ = ["LACKING", "Judged", "budgets", "check", "check_globs", "find_case", "judged", "tell"]

LACKING = 4  # exit status: equal, and less was seen than --require asks for


@dataclass(frozen=True)
class Judged:
    """What came of a candidate: the run, the tensors that were judged, the golden cases, and how much was seen."""

    run: Run
    candidates: Mapping[str, Candidate]
    cases: Mapping[str, Case]
    coverage: Coverage
    tolerances: Any  #: what judged it

    def explained(self, goldens: Path) -> dict[str, list[Explanation]]:
        """SET/CASE -> which known faults make what differs there; empty without stored sketches."""
        sketches = Sketches.load(goldens if (goldens / SKETCHES).exists() else goldens_dir())
        found: dict[str, list[Explanation]] = {}
        if sketches is None:
            return found
        for name in (run.name for run in self.run.cases if run.first_divergence is not None):
            one = self.candidates[name]
            passes = {"chained": one.chained, "forced": one.forced}
            case, stages = self.cases[name], self.tolerances.stages
            feeds = partial(port.feeds, case, stages)
            said = explain_case(sketches, case, passes, self.tolerances, dtype=self.run.dtype, feeds=feeds)
            found[name] = mixed.named(said)
        return found

    def first(self) -> tuple[CaseRun, Row] | None:
        """What is wrong first by itself."""
        guilty = findings(self.run, port.load_table().stages)
        return guilty[0].first if guilty else None

    def targets(self, name: str) -> Targets:
        return self.cases[name].variant(sketched.reference(self.cases[name], self.run.dtype)[0])


def find_case(name: str, goldens: Path) -> Case:
    """SET/NAME of a golden folder. Raises GoldenError naming what there is."""
    found = for_ports(goldens, [name])
    if len(found) > 1:
        raise GoldenError(
            f"{name} is {len(found)} cases, one is needed: {', '.join(f'{r.set}/{r.name}' for r in found[:6])}"
        )
    case = store.open_case(found[0].folder, found[0].name)
    # No model reads this config here; who feeds whom, and which paths are gone through, follow from two of its numbers.
    numbers = {
        "num_hidden_layers": case.config.get("num_hidden_layers"),
        "sliding_window": case.config.get("sliding_window") or 1,
    }
    for field, value in numbers.items():
        if type(value) is not int or value < 1:
            raise GoldenError(f"{name}: its config has {field} = {value!r}; a whole number above 0 is needed")
    return case


def check(args: Any) -> None:
    """Raises ValueError for a --budget, --require or --capsule that cannot be used: a port may take an hour to run."""
    if args.capsule is not None:
        outputs.check_folder(args.capsule)
        capsule.check(Path(args.capsule))
    if args.budget:
        declared.load(Path(args.budget), tolerance.load(goldens_dir(), port.load_table().stages))
    if args.require:
        Coverage(1, 1, tuple(port.PATHS), ()).lacks(args.require)


def check_globs(folders: Iterable[Path], goldens: Path, globs: str) -> None:
    """Raises ValueError for a pattern that no stage of these dumps' cases matches."""
    cases = [find_case(candidate.header(folder)["case"], goldens) for folder in folders]
    refs = [CaseRef(case.folder, case.name) for case in cases]
    check_stages(globs, refs, port.load_table().stages, "--stage")


def budgets(goldens: Path) -> sketched.Stored:
    """What judges the cases of a golden folder: its own tolerances, else the embedded ones."""
    holds = goldens if (goldens / "tolerances.toml").exists() else goldens_dir()
    return sketched.Stored.load(goldens, tolerance.load(holds, port.load_table().stages))


def judged(
    folders: Iterable[Path],
    goldens: Path,
    *,
    globs: str | None = None,
    only: Sequence[str] = (),
    budget: str | None = None,
    dtype: str | None = None,
) -> Judged:
    """Dump folders, each of one case. only: globs of cases that count; budget: a file of declared budgets; dtype: what they
    must be in (default: what they say). Raises Unusable, GoldenError, ValueError for a budget that cannot be used."""
    stages = port.load_table().stages
    known = budgets(goldens)
    tolerances: Any = declared.load(Path(budget), known) if budget else known  # type: ignore[arg-type]
    chosen = {f"{r.set}/{r.name}" for r in for_ports(goldens, list(only))} if only else None
    runs: list[CaseRun] = []
    candidates: dict[str, Candidate] = {}
    cases: dict[str, Case] = {}
    dtypes: dict[str, Path] = {}
    for folder in folders:
        start = time.perf_counter()
        said = candidate.header(folder)
        case = find_case(said["case"], goldens)
        name = f"{case.set}/{case.name}"
        if chosen is not None and name not in chosen:
            continue
        if name in cases:
            raise Unusable(f"{folder}: {name} is judged twice, also from {candidates[name].folder}: keep one")
        if said["dtype"] not in arguments.DTYPES:
            raise Unusable(f"{folder}: dtype {said['dtype']!r}; choose {', '.join(arguments.DTYPES)}")
        if dtype is not None and said["dtype"] != dtype:
            raise Unusable(
                f"{folder}: its tensors were computed in {said['dtype']}, --dtype says {dtype}; leave it out"
            )
        known.check(case, said["dtype"])
        dtypes[said["dtype"]] = folder
        targets = case.variant(sketched.reference(case, said["dtype"])[0])
        found = candidate.read(folder, case.identity, targets, stages)
        done = judge(found, case, stages, tolerances, partial(port.feeds, case, stages), globs=globs)
        runs.append(replace(done, seconds=time.perf_counter() - start))
        candidates[name], cases[name] = found, case
    if not runs:
        raise Unusable("none of these dumps is of a case that was asked for")
    if len(dtypes) > 1:
        raise Unusable(f"dumps of several dtypes ({', '.join(dtypes)}): judge one at a time")
    fingerprint = {
        key: value for c in candidates.values() for key, value in c.about.items() if key in ("python", "adapter")
    }
    seen = coverage(runs, lambda run: port.paths(cases[run.name], run), port.PATHS)
    return Judged(Run(tuple(runs), next(iter(dtypes)), {}, fingerprint), candidates, cases, seen, tolerances)


def tell(
    found: Judged, args: Any, command: tuple[str, ...], options: tuple[str, ...], goldens: Path, *, failed: Sequence[Any] = (),
    lines: Sequence[str] = (),
) -> int:  # fmt: skip
    """Report in terminal, JSON and page; the exit status. failed: of cases that the port could not run, text and status.
    lines: more on what is wrong first."""
    from stageparity.report import console as consoles
    from stageparity.report import terminal

    to_stdout = args.json == "-"
    console = consoles.console(stderr=to_stdout)
    table = port.load_table()
    word = "within the declared budget, " if args.budget else "equal "
    seen = f"{word}as far as seen: {found.coverage.text()}"
    references = References.load(
        (goldens if (goldens / "measured").is_dir() else goldens_dir()) / "measured", found.run.dtype, table.stages
    )
    try:
        explained = found.explained(goldens)
    except ValueError as error:  # damaged sketches cost the likeness, not the verdict
        explained = {}
        terminal.say(console, f"NOTE known faults were not asked: {error}")
    context = Context(table.stages, table.sections, {}, references, command, options, seen, tuple(lines), explained)
    terminal.print_run(found.run, console, context, verbose=not args.quiet)
    if args.budget:
        for line in found.tolerances.idle(row.stage for run in found.run.cases for row in run.rows):
            terminal.say(console, f"NOTE {args.budget}: {line}")
        for name, one in found.candidates.items():
            run = next(run for run in found.run.cases if run.name == name)
            whole = {stage: x for stage, x in one.chained.items() if not isinstance(x, sketched.Shown)}
            for line in declared.effects(run, whole, found.targets(name), table.stages, "*logits"):
                terminal.say(console, f"{name}: {line}")
    if args.quiet and found.run.exit_code == 0:
        terminal.say(console, seen)
    if args.capsule and (guilty := found.first()):
        terminal.say(console, _encapsulate(Path(args.capsule), found, *guilty, table.weights))
    for one in failed:
        terminal.say(console, f"FAILED {one.text}", "red")
    # What differs outweighs what could not be judged.
    status = min((s for s in (found.run.exit_code, *(one.status for one in failed)) if s), default=0)
    if status == 0 and args.require and (lacks := found.coverage.lacks(args.require)):
        terminal.say(console, f"NOT ENOUGH SEEN: {lacks}", "red")
        status = LACKING
    if args.json:
        text = terminal.to_text(found.run, context)
        print(text, end="") if to_stdout else outputs.write(args.json, lambda: text)
    if args.html:
        from stageparity.report import page

        outputs.write(args.html, lambda: page.render(found.run, context))
    return status


def _encapsulate(folder: Path, found: Judged, run: CaseRun, row: Row, weights: Mapping[str, Sequence[str]]) -> str:
    """Writes the capsule of a stage, and says so; or says why there is none."""
    case, one, targets = found.cases[run.name], found.candidates[run.name], found.targets(run.name)
    golden, result = targets[row.stage], row.failed
    if not isinstance(golden, Whole) or result is None or isinstance(mine := _own(one, row), sketched.Shown):
        return f"NOTE --capsule: {row.stage} of {run.name} is not held whole: no capsule of it"
    table = port.load_table()
    entry = table.stages.find(row.stage)
    places = entry[1] if entry else {}
    feeds = port.feeds(case, table.stages, row.stage)
    inputs = {name: g.array for name in feeds if isinstance(g := targets.get(name), Whole)}
    inputs |= {
        name: x for name, x in inputs_of(case).items() if any(name == f or name.startswith(f + ".") for f in feeds)
    }
    patterns = [fill(p, places) for p in weights.get(entry[0].template if entry else "", ())]
    held = {name: x for name, x in case.weights().items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    about = {
        "case": run.name, "golden_hash": case.identity, "dtype": found.run.dtype, "kind": row.kind, "whose": whose(row),
        "config": case.config, "fingerprint": dict(found.run.fingerprint), "what": entry[0].what if entry else "",
        "section": entry[0].spec if entry else "",
    }  # fmt: skip
    capsule.write(folder, result, mine, golden.array, table.stages.axes(row.stage), inputs, held, about)
    return f"capsule: {folder}: python check.py there needs NumPy alone"


def _own(one: Candidate, row: Row) -> Any:
    """The tensor that a row was convicted by."""
    # Without a forced run, alone is chained.
    by_forced = row.forced is not None and any(row.failed is result for result in (row.forced, row.alone))
    return (one.forced if by_forced else one.chained)[row.stage]
