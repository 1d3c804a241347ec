"""A table of stages as plain data, for where the model's own code cannot be imported: another interpreter, another language.

What is code in an entry (how a stage is run, whose code it is, rounding, machines) stays behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.golden import GoldenError
from stageparity.stage import Place, Stage, Stages, Ties

__all__ = ["load", "to_data"]

_CODE = ("run", "code", "wiring", "rounded", "spreads", "machine")


def to_data(stages: Stages, sections: Mapping[str, str]) -> dict[str, Any]:
    """Entries, places and the titles of the specification's sections; fields at their defaults are left out."""
    return {
        "places": {name: asdict(place) for name, place in stages.places.items()},
        "sections": dict(sections),
        "stages": [_entry(stage) for stage in stages],
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


def load(path: Path) -> tuple[Stages, dict[str, str]]:
    """(stages, sections) from a file of `to_data`. Raises GoldenError for one that is not of this form."""
    data = strict.read_json(path)
    try:
        places = {name: Place(**{**place, "values": tuple(place["values"])}) for name, place in data["places"].items()}
        return Stages([_stage(entry) for entry in data["stages"]], places), dict(data["sections"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GoldenError(f"{path}: no table of stages ({strict.reason(error)})") from None


def _stage(entry: Mapping[str, Any]) -> Stage:
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    if "tags" in given:
        given["tags"] = frozenset(given["tags"])
    if "ties" in given:
        given["ties"] = Ties(**given["ties"])
    return Stage(**given)
