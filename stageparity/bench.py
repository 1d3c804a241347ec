"""A bench for models whose cases hold plain arrays: stages are fed whole goldens, by the names in their entries.

Subclass `GoldenBench` with `run`; a stage's ``run`` gets a `Site` and asks it for its inputs by template.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stageparity.golden import Whole
from stageparity.stage import NotHeld, Stage, Stages, fill
from stageparity.store import Case, Targets
from stageparity.subject import Tap

__all__ = ["GoldenBench", "Site"]


class GoldenBench:
    """See `stageparity.subject.Bench`. model: whatever the subject builds."""

    def __init__(self, case: Case, model: Any, targets: Targets, stages: Stages) -> None:
        self.case, self.model, self.targets, self.stages = case, model, targets, stages

    def run(self, tap: Tap) -> None:
        """The whole case from its raw inputs (``self.case.inputs``), every stage through the tap."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its model runs")

    def places(self, places: Mapping[str, str]) -> Mapping[str, str]:
        """Derived places of a stage's inputs, such as the layer before, from those of its id."""
        return {}

    def convert(self, array: np.ndarray) -> Any:
        """A golden as the model takes it: in its dtype and library."""
        return array

    def alone(self, stage_id: str) -> Any:
        site = self._site(stage_id)
        if site.stage.run is None:
            raise NotHeld(f"no stage feeds {stage_id} alone")
        return site.stage.run(site)

    def id(self, template: str, stage_id: str) -> str:
        return self._site(stage_id).id(template)

    def rounded(self, stage_id: str) -> Any:
        raise NotHeld("nothing says where this rounds")

    def _site(self, stage_id: str) -> Site:
        found = self.stages.find(stage_id)
        if found is None:
            raise NotHeld(f"{stage_id} is no stage")
        return Site(self, *found)


@dataclass(frozen=True)
class Site:
    """One stage id on the bench: its places filled in, its inputs by template."""

    bench: GoldenBench
    stage: Stage
    places: Mapping[str, str]

    @property
    def model(self) -> Any:
        return self.bench.model

    def id(self, template: str) -> str:
        return fill(template, {**self.places, **self.bench.places(self.places)})

    def __getitem__(self, template: str) -> Any:
        """The golden, or raw input, that feeds the stage under a template. Raises NotHeld where the case has it not whole."""
        assert template in self.stage.inputs, f"{self.stage.template} reads {template} without declaring it"
        name = self.id(template)
        if name in self.bench.case.inputs:
            return self.bench.convert(self.bench.case.inputs[name])
        golden = self.bench.targets.get(name)
        if not isinstance(golden, Whole):
            raise NotHeld(f"{self.bench.case.name} does not hold {name} whole")
        return self.bench.convert(golden.array)
