"""A subject to build on, for models whose cases hold plain arrays: stages are fed whole goldens, by the names in their entries.

    class Mine(GoldenSubject):
        stages = STAGES

        def build(self, case):                   # the model of a case
            return Model(case.weights())

        def run(self, model, inputs, tap):       # the whole case from its raw inputs, every stage through the tap
            model(inputs["inputs.ids"], tap)

A stage's ``run`` gets a `Site` and asks it for its inputs: ``run=lambda site: norm(site["layer.{i}.input"])``, or
``norm(*site.inputs)`` for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stageparity.golden import Whole
from stageparity.stage import NotHeld, Stage, fill
from stageparity.store import Case, Targets
from stageparity.subject import Subject, Tap

__all__ = ["GoldenBench", "GoldenSubject", "Site"]


class GoldenSubject(Subject):
    """A model under test in one dtype. Subclass it with `stages`, `build` and `run`."""

    def __init__(self, dtype: str = "float64") -> None:
        self.dtype = dtype

    def build(self, case: Case) -> Any:
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is built")

    def run(self, model: Any, inputs: Mapping[str, np.ndarray], tap: Tap) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not say how its model runs")

    def places(self, places: Mapping[str, str]) -> Mapping[str, str]:
        """Derived places of a stage's inputs, such as the layer before, from those of its id."""
        return {}

    def convert(self, array: np.ndarray) -> Any:
        """A golden or raw input as the model takes it; here a NumPy array, real numbers in the dtype of the run."""
        return array.astype(self.dtype) if array.dtype.kind == "f" else array

    def bench(self, case: Case, model: Any, targets: Targets) -> GoldenBench:
        return GoldenBench(self, case, model, targets)


class GoldenBench:
    """See `stageparity.subject.Bench`."""

    def __init__(self, subject: GoldenSubject, case: Case, model: Any, targets: Targets) -> None:
        self.subject, self.case, self.model, self.targets = subject, case, model, targets

    def run(self, tap: Tap) -> None:
        inputs = {name: self.subject.convert(x) for name, x in self.case.inputs.items()}
        self.subject.run(self.model, inputs, tap)

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
        found = self.subject.stages.find(stage_id)
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
        return fill(template, {**self.places, **self.bench.subject.places(self.places)})

    @property
    def inputs(self) -> list[Any]:
        """All that feeds the stage, in the order of its entry."""
        return [self[template] for template in self.stage.inputs]

    def __getitem__(self, template: str) -> Any:
        """The golden, or raw input, that feeds the stage under a template. Raises NotHeld where the case has it not whole."""
        assert template in self.stage.inputs, f"{self.stage.template} reads {template} without declaring it"
        name, case = self.id(template), self.bench.case
        golden = Whole(case.inputs[name], "") if name in case.inputs else self.bench.targets.get(name)
        if not isinstance(golden, Whole):
            raise NotHeld(f"{case.name} does not hold {name} whole")
        return self.bench.subject.convert(golden.array)
