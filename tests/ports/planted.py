"""Faults planted in somebody else's tree: in a copy of it, a line or two as a porter might have written them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Edit", "Planted", "together"]

Edit = tuple[str, str, str]  #: file, what stands in it once, what stands there now


@dataclass(frozen=True)
class Planted:
    """A fault of a foreign tree, and what a judge of it must say.

    guilty: stage (as in the table of stages) -> kind, of everything that is wrong by itself. known: the faults of our own list
    that make the same tensors; none for an error that nobody has listed.
    """

    name: str
    edits: tuple[Edit, ...]
    guilty: Mapping[str, str]
    known: frozenset[str] = field(default_factory=frozenset)
    case: str = "small/base"

    def plant(self, tree: Path) -> None:
        """Write the fault into ``tree``, which is a copy."""
        for file, old, new in self.edits:
            text = (tree / file).read_text("utf-8")
            assert text.count(old) == 1, f"{self.name}: {old!r} stands {text.count(old)} times in {file}"
            (tree / file).write_text(text.replace(old, new), "utf-8")


def together(first: Planted, second: Planted) -> Planted:
    """Both in one tree."""
    assert first.case == second.case
    return Planted(
        f"{first.name} and {second.name}",
        first.edits + second.edits,
        {**first.guilty, **second.guilty},
        first.known | second.known,
        first.case,
    )
