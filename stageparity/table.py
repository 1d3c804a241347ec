"""A table of stages as plain data, for where the model's own code cannot be imported: another interpreter, another language.

What is code in an entry (how a stage is run, whose code it is, rounding, machines) stays behind, and so do stages that no
run hands over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.golden import GoldenError
from stageparity.stage import Place, Stage, Stages, Ties

__all__ = ["Table", "load", "to_data"]

_CODE = ("run", "code", "wiring", "rounded", "spreads", "machine", "alone_only")


@dataclass(frozen=True)
class Table:
    """sections: titles of the specification's. weights: template -> patterns of the names of the weights that are its own."""

    stages: Stages
    sections: Mapping[str, str]
    weights: Mapping[str, tuple[str, ...]]


def to_data(stages: Stages, sections: Mapping[str, str], weights: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    """A `Table` as JSON holds it; fields of entries at their defaults are left out."""
    return {
        "weights": {template: list(names) for template, names in weights.items()},
        "places": {name: asdict(place) for name, place in stages.places.items()},
        "sections": dict(sections),
        "stages": [_entry(stage) for stage in stages if stage.alone_only is None],
    }


def _entry(stage: Stage) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in fields(Stage):
        value = getattr(stage, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if f.name not in _CODE and value != default:
            found[f.name] = (
                sorted(value) if isinstance(value, frozenset) else asdict(value) if isinstance(value, Ties) else value
            )
    return found


def load(path: Path) -> Table:
    """From a file of `to_data`. Raises GoldenError for one that is not of this form."""
    data = strict.read_json(path)
    try:
        places = {name: Place(**{**place, "values": tuple(place["values"])}) for name, place in data["places"].items()}
        stages = Stages([_stage(entry) for entry in data["stages"]], places)
        return Table(stages, dict(data["sections"]), {name: tuple(found) for name, found in data["weights"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GoldenError(f"{path}: no table of stages ({strict.reason(error)})") from None


def _stage(entry: Mapping[str, Any]) -> Stage:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if "tags" in given:
        given["tags"] = frozenset(given["tags"])
    if "ties" in given:
        given["ties"] = Ties(**given["ties"])
    return Stage(**given)
