"""The golden cases and stages that a command line names."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from stageparity import manifest, store
from stageparity.golden import GoldenError
from stageparity.strict import one_line
from vidi.parser import meant

__all__ = ["check_stages", "select"]


def select(goldens: Path, globs: Sequence[str]) -> list[store.CaseRef]:
    """`store.select`; where a name matches nothing, the GoldenError begins with the case that was probably meant."""
    try:
        return store.select(goldens, globs)
    except GoldenError as error:
        names = {name for ref in store.list_cases(goldens) for name in (ref.name, ref.set, f"{ref.set}/{ref.name}")}
        near = [meant(glob, names).strip(" ()") for glob in globs if glob not in names]
        raise GoldenError(f"{' '.join(near)} {error}".strip()) from None


def check_stages(globs: str, refs: Sequence[store.CaseRef], what: str) -> None:
    """Raises ValueError for a pattern that no stage of these cases matches: a minute later the table is empty.

    what: how the line names the patterns.
    """
    bodies = (manifest.parse(ref.folder / f"{ref.name}.json") for ref in refs)
    known = {stage for body in bodies for stages in body["targets"].values() for stage in stages}
    known |= {stage.replace(".nocache.", ".cached.") for stage in known}
    for glob in (part.strip() for part in globs.split(",")):
        if not any(fnmatch.fnmatchcase(stage, glob) for stage in known):
            none = f"{what} {glob!r} matches none of the {len(known)} stages of these {len(refs)} cases"
            raise ValueError(one_line(none + meant(glob, known)))
