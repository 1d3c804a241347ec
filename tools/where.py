"""Which stages, goldens, tests and faults belong to a line of the model.

    python tools/where.py vidi/bridge/fold.py:20    also a whole file, a dotted name or a stage id: bridge.fold.pad, vision.pad

Told from the one table of stages (`vidi/parity/stages/`), the manifests of the goldens and the table of faults. Exits 2 where
nothing belongs to it.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stageparity.code import Code, code
from stageparity.manifest import parse
from stageparity.stage import Stage
from stageparity.store import CaseRef, list_cases
from vidi import cli
from vidi.parity.faults import FAULTS
from vidi.parity.stages import STAGES

__all__ = ["at", "main"]

ROOT = Path(__file__).resolve().parents[1]


def at(place: str) -> str:
    """The dotted name of the innermost function or method at FILE:LINE; of the module where no line is given."""
    file, _, line = place.partition(":")
    path, module = ROOT / file, file.removesuffix(".py").replace("/", ".")
    if not path.is_file() or path.suffix != ".py" or not re.fullmatch(r"[0-9]{0,9}", line):
        raise ValueError(f"{place}: FILE.py[:LINE] of this repository is needed")
    node: ast.AST = ast.parse(path.read_text("utf-8"))
    names = [module]
    while line:
        inner = [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.FunctionDef | ast.ClassDef)
            and min([child.lineno, *(d.lineno for d in child.decorator_list)]) <= int(line) <= (child.end_lineno or 0)
        ]
        if not inner or isinstance(node, ast.FunctionDef):
            break
        node = inner[0]
        names.append(inner[0].name)
    return ".".join(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return cli.guarded(_run, arguments, name="where.py")


def _run(arguments: list[str]) -> None:
    parser = cli.parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", metavar="FILE[:LINE] | NAME | STAGE")
    try:
        lines = list(told(parser.parse_args(arguments).place))
    except LookupError as error:
        raise ValueError(error.args[0]) from None
    print("\n".join(lines))


def told(place: str) -> Iterator[str]:
    """What belongs to a place, a line each. Raises ValueError or LookupError where nothing does."""
    if found := STAGES.find(place):
        own, wired, names = [found[0]], [], found[0].code
    else:
        name = code(at(place) if "/" in place else place if place.startswith("vidi.") else f"vidi.{place}")
        own = [stage for stage in STAGES if any(meet(name, c) for c in stage.code)]
        wired = [stage for stage in STAGES if stage not in own and any(meet(name, c) for c in stage.wiring)]
        wired, names = handed_over(place, wired) or wired, (name,)
        yield f"code    {name}"
    faults = [f for f in FAULTS.values() if any(meet(n, t) for n in names for t in f.targets)]
    if not own and not wired and not faults:
        raise LookupError(f"{place} is no stage's own code and no fault is planted there; its callers' stages judge it")
    held = {f"{ref.set}/{ref.name}": ids_of(ref) for ref in list_cases(ROOT / "goldens")}
    for kind, stages in (("stage", own), ("wiring", wired)):
        for stage in stages:
            globs, fits = place if found else re.sub(r"\{\w+\}", "*", stage.name), matching(stage)
            yield f"{kind:7} {stage.name}  {stage.spec}  {stage.what}; its entry: {entry(stage)}"
            yield f"  goldens {', '.join(case for case, ids in held.items() if any(map(fits, ids))) or 'none'}"
            yield f"  tests   python -m pytest tests/parity -k '{' and '.join(filter(None, globs.split('*')))}'"
            yield f"  again   vidi parity --stage '{globs}'"
    yield from (f"fault   {fault.name}: {fault.what}" for fault in faults)
    files = {Path(c.file) for c in names if c.file}
    beside = {
        test: file for file in files for test in (ROOT / "tests/unit" / Path(*file.parts[1:-1])).glob("test_*.py")
    }
    named = (t for t, file in beside.items() if re.search(rf"\b{file.stem}\b", t.read_text("utf-8")))
    yield from (f"unit    {test.relative_to(ROOT)}" for test in sorted(named))


def handed_over(place: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that the line hands to the tap by name, of those that its function feeds."""
    file, _, line = place.partition(":")
    lines = (ROOT / file).read_text("utf-8").splitlines() if line else [""]
    if line and not 1 <= int(line) <= len(lines):
        raise ValueError(f"{file} has {len(lines)} lines, none of number {line}")
    text = lines[int(line) - 1] if line else ""
    ids = [
        re.sub(r"\{[^}]*\}", value, name) for name in re.findall(r'tap\(f?"([^"]+)"', text) for value in ("", "0", "v")
    ]
    return [stage for stage in stages if any(map(matching(stage), ids))]


def meet(one: Code, other: Code) -> bool:
    """Is one in the other, either way?"""
    return one.covers(other, {}) or other.covers(one, {})


def matching(stage: Stage) -> Callable[[str], bool]:
    return lambda stage_id: (found := STAGES.find(stage_id)) is not None and found[0] is stage


def entry(stage: Stage) -> str:
    """FILE:LINE of its entry in the table."""
    for path in sorted((ROOT / "vidi/parity/stages").glob("*.py")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            if f'"{stage.template}", ' in line and line.lstrip().startswith('"'):
                return f"{path.relative_to(ROOT)}:{number}"
    return "vidi/parity/stages"


def ids_of(ref: CaseRef) -> set[str]:
    body = parse(ref.folder / f"{ref.name}.json")
    return {stage for held in body["targets"].values() for stage in held}


if __name__ == "__main__":
    sys.exit(main())
