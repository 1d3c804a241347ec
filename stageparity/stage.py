"""A stage is one entry of data, and a table of entries is everything that the harness knows of a model.

An id template stands for a family of ids: `layer.{i}.output` for every layer. What stands in braces is a *place*; the table
says what may stand there. `{i=0}` is a place with one value only. A stage id is the key in a golden file, the row in a
report and the word in a test id, so everything that those need is derived here from the entry: order, axes, classes.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stageparity.code import Code

__all__ = ["Axes", "NotHeld", "Place", "Stage", "Stages", "Ties", "fill"]


class NotHeld(LookupError):
    """What a stage needs to be run alone, or a case to be run at all, is not there; the text says what."""


@dataclass(frozen=True)
class Axes:
    """Which axes of a tensor tell rows apart, and which one counts heads. Every other axis is a row's content.

    rows: None means all but the last. least: a tensor of fewer axes is one row.
    """

    rows: tuple[int, ...] | None = None
    heads: int | None = None
    least: int = 0

    def of(self, ndim: int) -> tuple[tuple[int, ...], int | None]:
        """(rows, heads) of a tensor of `ndim` axes: a flattened twin loses the later ones."""
        if ndim < self.least:
            return (), None
        if self.rows is None:
            return tuple(range(ndim - 1 or ndim)), None
        heads = self.heads if self.heads is not None and self.heads < ndim else None
        return tuple(axis for axis in self.rows if axis < ndim), heads


@dataclass(frozen=True)
class Place:
    """What may stand in a place of a template.

    pattern: a regular expression without groups. loop: entries that follow each other and have this place are passed
    through once for each of its values, so ids are ordered by it before they are ordered by entry. values: the order of
    its values, where they are no numbers.
    """

    pattern: str = r"\d+"
    loop: bool = False
    values: tuple[str, ...] = ()

    def key(self, value: str) -> int:
        return self.values.index(value) if value in self.values else int(value) if value.isdigit() else 0


@dataclass(frozen=True)
class Ties:
    """Templates of what free decoding gives: the logits along the golden's tokens, (B, S, U), the tokens, (B, S), and how many of
    them each row has, (B,). Tokens that part from the golden's where two logits tie within the noise are no error."""

    logits: str
    tokens: str
    lengths: str


@dataclass(frozen=True)
class Stage:
    """One stage. A template of ``inputs`` may have derived places (`Bench.id` fills them in).

    what, shape: in words. spec: section of the specification. exact: compared bit for bit. rows, heads, least: see `Axes`.
    inputs: the golden tensors that feed it. run: computes it from them alone, given a site (None: nothing can).
    code: what is its own; a fault there shows when the stage runs alone. wiring: the code that feeds it and takes its
    result; a fault there shows when the run is forced. In both a use in brackets may stand.
    rounded: computes it in float32 with a rounding wherever the specification rounds, given a site and the rounding
    (`rounding.judge` says what it may give);
    spreads: the share of values that may have other bits than that, by dtype, where it is not the usual one.
    golden: the template whose golden judges it, where it has none of its own. ties: what decides whether other tokens than the
    golden's are a tie. machine: what this machine's libraries give in place of a stored constant.
    places: values of places that derived ones need and the template does not show.
    alone_only: no run hands it over; it is another way to compute what its golden holds, judged alone in every case whose
    targets this is true of.
    derived: told from other stages after the run; its shape follows from theirs. own_chain: reached from raw inputs whatever
    a forced run puts in the place of other tensors. tags: groups that tolerances may name.
    when: what a case must have for the stage to exist.
    """

    template: str
    what: str
    spec: str = ""
    shape: str = ""
    exact: bool = False
    rows: tuple[int, ...] | None = (0, 1)
    heads: int | None = None
    least: int = 0
    inputs: tuple[str, ...] = ()
    run: Callable[[Any], Any] | None = None
    code: tuple[Code, ...] = ()
    wiring: tuple[Code, ...] = ()
    rounded: Callable[[Any, Callable[[Any], Any]], Any] | None = None
    spreads: Mapping[str, float] = field(default_factory=dict)
    golden: str = ""
    alone_only: Callable[[Any], bool] | None = None
    ties: Ties | None = None
    machine: Callable[[Any], Any] | None = None
    places: Mapping[str, str] = field(default_factory=dict)
    derived: bool = False
    own_chain: bool = False
    tags: frozenset[str] = frozenset()
    when: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The template, fixed places filled in."""
        return re.sub(r"\{\w+=([^}]*)\}", r"\1", self.template)

    @property
    def axes(self) -> Axes:
        return Axes(self.rows, self.heads, self.least)

    @property
    def reads_raw(self) -> bool:
        """Only raw inputs feed it, so that alone, forced or chained it has the same error: its own."""
        return bool(self.inputs) and all(name.startswith("inputs.") for name in self.inputs)


class Stages:
    """All stages of a model, in pipeline order. Iterating gives the entries."""

    def __init__(self, entries: Iterable[Stage], places: Mapping[str, Place]) -> None:
        """Raises ValueError for a template that stands twice or has an unknown place."""
        self.entries, self.places = tuple(entries), places
        for entry in self.entries:
            if unknown := [name for name, _ in _places(entry.template) if name not in places]:
                raise ValueError(f"{entry.template}: no place is called {unknown[0]}; there are {', '.join(places)}")
        templates = [entry.template for entry in self.entries]
        if twice := {t for t in templates if templates.count(t) > 1}:
            raise ValueError(f"two entries are called {min(twice)}")
        self._known: dict[str, tuple[int, dict[str, str]] | None] = {}

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    # ---- from an id to its entry --------------------------------------------------------------------------------------

    def find(self, stage_id: str) -> tuple[Stage, dict[str, str]] | None:
        """The entry of an id, and its places filled in; None for an id that nobody knows."""
        found = self._found(stage_id)
        return (self.entries[found[0]], found[1]) if found else None

    def _found(self, stage_id: str) -> tuple[int, dict[str, str]] | None:
        if stage_id not in self._known:
            matches = ((n, pattern.match(stage_id)) for n, pattern in enumerate(self._patterns))
            self._known[stage_id] = next(
                ((n, m.groupdict() | dict(self.entries[n].places)) for n, m in matches if m), None
            )
        return self._known[stage_id]

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        def pattern(template: str) -> re.Pattern[str]:
            parts = re.split(r"(\{[^}]+\})", template)
            return re.compile("".join(map(self._part, parts)) + r"\Z")

        return [pattern(entry.template) for entry in self.entries]

    def _part(self, part: str) -> str:
        if not part.startswith("{"):
            return re.escape(part)
        name, _, value = part[1:-1].partition("=")
        return f"(?P<{name}>{re.escape(value) if value else self.places[name].pattern})"

    def judged_as(self, stage_id: str) -> str:
        """The id whose golden judges it: its own, or the one that it borrows from."""
        found = self.find(stage_id)
        return fill(found[0].golden, found[1]) if found and found[0].golden else stage_id

    def template_of(self, stage_id: str) -> str:
        """The family that an id belongs to; for what is no entry, its numbers as places."""
        found = self.find(stage_id)
        return found[0].name if found else re.sub(r"\.\d+(?=\.|\Z)", ".{i}", stage_id)

    # ---- order --------------------------------------------------------------------------------------------------------

    def order(self, stage_id: str) -> tuple[Any, ...]:
        """Sort key: the place of an id in the pipeline. Raw inputs come first, ids nobody knows last, by name."""
        found = self._found(stage_id)
        if found is None:
            return (-1 if stage_id.startswith("inputs.") else len(self.entries), stage_id)
        n, values = found
        number = {name: self.places[name].key(values[name].strip(".")) for name, _ in _places(self.entries[n].template)}
        loops = [x for name, start in self._loops[n] for x in (start, number.pop(name))]
        return (*loops, n, *number.values(), stage_id)

    @cached_property
    def _loops(self) -> list[list[tuple[str, int]]]:
        """For each entry the loops that it stands in, outermost first: (place, number of the loop's first entry)."""
        out: list[list[tuple[str, int]]] = []
        for n, entry in enumerate(self.entries):
            own = [name for name in self.places if self.places[name].loop and name in dict(_places(entry.template))]
            before = dict(out[-1]) if out else {}
            out.append([(name, before.get(name, n)) for name in own])
        return out

    def sort(self, stage_ids: Iterable[str]) -> list[str]:
        """Stage ids in pipeline order."""
        return sorted(stage_ids, key=self.order)

    def matching(self, stage_ids: Iterable[str], globs: str | None) -> list[str]:
        """The ids that match a shell pattern (`layer.*.output,logits`: any of them), in pipeline order; None is all."""
        parts = ["*"] if globs is None else [part.strip() for part in globs.split(",") if part.strip()]
        return self.sort({s for s in stage_ids if any(fnmatch.fnmatchcase(s, part) for part in parts)})

    # ---- classes ------------------------------------------------------------------------------------------------------

    def axes(self, stage_id: str) -> Axes:
        found = self.find(stage_id)
        return found[0].axes if found else Axes()

    def is_exact(self, stage_id: str) -> bool:
        """Compared bit for bit. Bool and integer tensors are so under any id; this is the class that an id promises."""
        found = self.find(stage_id)
        return found is not None and found[0].exact

    def derived(self, stage_id: str) -> bool:
        found = self.find(stage_id)
        return found is not None and found[0].derived

    def tagged(self, stage_id: str, tag: str) -> bool:
        found = self.find(stage_id)
        return found is not None and tag in found[0].tags

    # ---- from an entry to its ids -------------------------------------------------------------------------------------

    def expand(
        self, values: Mapping[str, Iterable[str]], given: Callable[[Stage, Mapping[str, str]], bool]
    ) -> list[str]:
        """All ids of a case, in pipeline order: every entry at every value of its places for which ``given`` is true. An
        entry with a place that ``values`` lacks has none."""
        out: list[str] = []
        for entry in self.entries:
            names = _places(entry.template)
            ways: list[dict[str, str]] = [{}]
            for name, fixed in names:
                ways = [{**way, name: v} for way in ways for v in ([fixed] if fixed else values.get(name, ()))]
            out += [fill(entry.template, way) for way in ways if given(entry, way)]
        return self.sort(dict.fromkeys(out))


def _places(template: str) -> list[tuple[str, str]]:
    """(name, fixed value or nothing) of each place of a template."""
    found = (inside.partition("=") for inside in re.findall(r"\{([^}]+)\}", template))
    return [(name, value) for name, _, value in found]


def fill(template: str, places: Mapping[str, str]) -> str:
    """The id that a template stands for."""
    return re.sub(r"\{(\w+)(=[^}]*)?\}", lambda m: places[m[1]], template)
