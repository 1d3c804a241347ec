"""A model under test, as far as the harness must know it: its stages, and for a golden case a run with a tap and a stage alone.

A *tap* is called with a stage id and its tensor, in the layout of the goldens, wherever a stage's result exists, and returns
the tensor to go on with. Repeated calls with one id hand over consecutive parts along axis 0. `tap.wants(id)` tells
whether the tensor is needed at all, for what is costly to make.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

from stageparity import tolerance
from stageparity.golden import Whole
from stageparity.stage import Stages
from stageparity.store import Case, Targets

__all__ = ["Bench", "Subject", "Tap", "fed", "reference_of", "unfit"]


class Tap(Protocol):
    def __call__(self, stage_id: str, x: Any) -> Any: ...

    def wants(self, stage_id: str) -> bool: ...


class Bench(Protocol):
    """One case on the bench: the model built for it, and the goldens that judge it."""

    @property
    def targets(self) -> Targets: ...

    def run(self, tap: Tap) -> None:
        """The whole case from its raw inputs, every stage through the tap."""

    def alone(self, stage_id: str) -> Any:
        """A stage from its golden inputs alone. Raises NotHeld where the case or the table cannot feed it."""

    def id(self, template: str, stage_id: str) -> str:
        """The id that a template of a stage's ``inputs`` stands for."""

    def rounded(self, stage_id: str) -> Any:
        """A stage in float32 arithmetic, rounded wherever the specification rounds, as `rounding.judge` takes it. Raises
        NotHeld where that is not known, or where this run's kernels may round elsewhere."""


class Subject(Protocol):
    """A model under test. `dtype` is the dtype of its runs. A subclass has the rest as it is here, where nothing else is said."""

    stages: Stages
    dtype: str
    about: Mapping[str, str] = {}  #: what else there is to say of its runs (backend, device, ...)
    forces: bool = True  #: does its run go on with what the tap returns? If not, it is judged chained alone
    sections: Mapping[str, str] = {}  #: title of each section of the specification

    def build(self, case: Case) -> Any:
        """The case's model with its weights. Raises NotHeld for a case that this subject cannot run, with the reason."""

    def bench(self, case: Case, model: Any, targets: Targets) -> Bench:
        """The model on the bench (`stageparity.bench` has one to build on)."""
        ...

    def setting(self, name: str) -> AbstractContextManager[None]:
        """A way of computing under which some faults act (`Fault.setting`); "" is the usual one."""
        return nullcontext()

    def scope(self) -> AbstractContextManager[None]:
        """What a whole run is done in: precision switches set, no gradients, ..."""
        return nullcontext()

    def fingerprint(self) -> Mapping[str, Any]:
        """What it runs on, as plain values."""
        system = f"{platform.system()} {platform.machine()}"
        return {"python": platform.python_version(), "libraries": {"numpy": np.__version__}, "system": system}


def reference_of(case: Case, dtype: str) -> tuple[str, str]:
    """(variant of the goldens, gate) that judge a run in ``dtype``: recordings, or an oracle, with casts below float64 if it
    has them."""
    variant = "recorded" if "none" not in case.variants else "none"
    if variant == "none" and dtype != "float64" and "cast" in case.variants:
        variant = "cast"
    return variant, tolerance.gate_name(dtype, variant)


def unfit(case: Case, variant: str, dtype: str) -> str | None:
    """Why a recording in one dtype cannot judge a run in another, None where it can."""
    recorded = case.provenance["dtype"]
    if variant != "recorded":
        return None
    if recorded in ("bfloat16", "float16"):
        return f"a {recorded} recording has noise of its own as large as a run's: it tells how large an error may be"
    if dtype == "float64" and recorded != "float64":
        # In float64 steps that a model does in float32 whatever its dtype vanish; the recording's did not.
        return f"a {recorded} recording holds float32 steps that a float64 run does not have"
    return None


def fed(bench: Bench, case: Case, stages: Stages, stage_id: str) -> bool:
    """Does a forced run give a stage nothing but raw inputs and goldens? Not where the case holds an input in part, or has
    left one out."""
    found = stages.find(stage_id)
    if found is None or found[0].own_chain or not found[0].inputs:
        return False
    names = [bench.id(template, stage_id) for template in found[0].inputs]
    return all(name not in case.left_out and isinstance(bench.targets.get(name, _ABSENT), Whole) for name in names)


_ABSENT = Whole(np.zeros(0), "")  # an input that this case does not have, such as that of an absent modality
