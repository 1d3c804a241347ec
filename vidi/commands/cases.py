"""The golden cases and stages that a command line names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from stageparity import manifest, store
from stageparity.golden import GoldenError
from stageparity.run import ids
from stageparity.stage import Stages
from stageparity.strict import one_line
from vidi.parser import meant

__all__ = ["check_stages", "for_ports", "select"]

LARGE = "large"  # in a golden folder: sets of cases that are known by sketches


def select(goldens: Path, globs: Sequence[str]) -> list[store.CaseRef]:
    """`store.select`; where a name matches nothing, the GoldenError begins with the case that was probably meant."""
    try:
        return store.select(goldens, globs)
    except GoldenError as error:
        names = {name for ref in store.list_cases(goldens) for name in (ref.name, ref.set, f"{ref.set}/{ref.name}")}
        near = [meant(glob, names).strip(" ()") for glob in globs if glob not in names]
        raise GoldenError(f"{' '.join(near)} {error}".strip()) from None


def for_ports(goldens: Path, globs: Sequence[str]) -> list[store.CaseRef]:
    """As `select`, and cases known by sketches (`full/frames60`), which stand apart: meant only where their set is named."""
    named = {glob: [ref for ref in store.list_cases(goldens / LARGE) if _of_set(ref, glob)] for glob in globs}
    others = [glob for glob, refs in named.items() if not refs]
    found = select(goldens, others) if others or not globs else []
    return [*found, *dict.fromkeys(ref for refs in named.values() for ref in refs)]


def _of_set(ref: store.CaseRef, glob: str) -> bool:
    case_set, _, name = glob.partition("/")
    return ref.set == case_set and fnmatch.fnmatchcase(ref.name, name)


def check_stages(globs: str, refs: Sequence[store.CaseRef], stages: Stages, what: str) -> None:
    """Raises ValueError for a pattern that no stage of these cases matches: a minute later the table is empty.

    what: how the line names the patterns.
    """
    cases = [store.Case(ref.folder, ref.name, manifest.parse(ref.folder / f"{ref.name}.json")) for ref in refs]
    known = {stage for case in cases for v in case.variants for stage in ids(case.variant(v), stages, alone=True)}
    for glob in (part.strip() for part in globs.split(",")):
        if not any(fnmatch.fnmatchcase(stage, glob) for stage in known):
            none = f"{what} {glob!r} matches none of the {len(known)} stages of these {len(refs)} cases"
            raise ValueError(one_line(none + meant(glob, known)))
