"""How a fault gets into a model: a patch of one named piece of code or one part of the model, undone afterwards.

A target is a reference (`stageparity.code`), checked where it is written. The stage that must report the fault first is looked
up in the table by the same reference (`Stage.code`, `Stage.wiring`), never written down here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stageparity.code import Code, code, resolve
from stageparity.stage import Stages

__all__ = ["Fault", "expected", "other_uses", "own_stages", "plant", "planted"]

Make = Callable[..., Any]  #: the original (and the model, if it takes two) -> what stands in its place


@dataclass(frozen=True)
class Fault:
    """One wrong step. targets: `Code`, or dotted names of it. case: SET/NAME, or a case of the set `small`, that sees it.
    dtype: float64 for wrong mathematics, the dtype whose casts it misplaces otherwise. rebuild: acts when the model is built.
    setting: the way of computing in which it acts (`Subject.setting`). needs: the device that it needs."""

    name: str
    what: str
    targets: tuple[Code, ...]
    make: Make
    case: str = "base"
    dtype: str = "float64"
    rebuild: bool = False
    setting: str = ""
    needs: str = ""

    def __post_init__(self) -> None:
        targets = tuple(t if isinstance(t, Code) else code(t) for t in self.targets)
        object.__setattr__(self, "targets", targets)

    @property
    def area(self) -> str:
        return self.name.split(".")[0]

    @property
    def place(self) -> str:
        """SET/NAME of its case."""
        return self.case if "/" in self.case else f"small/{self.case}"


def plant(*targets: Any, **options: Any) -> Callable[[Make], Fault]:
    """Makes a fault of a function that takes the original and returns its faulty twin. Its name is `area.function`, area
    being the module that defines it, its `what` the docstring. Raises LookupError for a target that is no code."""

    def decorate(make: Make) -> Fault:
        area = make.__module__.rsplit(".", 1)[-1]
        what = " ".join((make.__doc__ or "").split())
        return Fault(f"{area}.{make.__name__}", what, targets, make, **options)

    return decorate


# ---- planting -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(fault: Fault, model: Any) -> Iterator[None]:
    """The fault acts inside. ``model`` None: only code can be patched (`rebuild`)."""
    with contextlib.ExitStack() as undo:
        for target in fault.targets:
            for owner, name in _places(target, model):
                undo.enter_context(_replaced(owner, name, fault.make, model))
        yield


def _places(target: Code, model: Any) -> list[tuple[Any, str]]:
    if not target.name.startswith("model."):
        module, path = resolve(target.name)
        return [(functools.reduce(getattr, path[:-1], module), path[-1])]
    assert model is not None, f"{target} is a part of a model, and none is given"
    owners: list[Any] = [model]
    *steps, last = target.name.split(".")[1:]
    for step in steps:
        owners = [child for owner in owners for child in (owner if step == "*" else [_child(owner, step)])]
    return [(owner, last) for owner in owners]


def _child(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdigit() else getattr(owner, name)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Make, model: Any) -> Iterator[None]:
    def made(original: Any) -> Any:
        return make(original, model) if len(inspect.signature(make).parameters) == 2 else make(original)

    nn = getattr(sys.modules.get("torch"), "nn", None)
    value = _child(owner, name) if nn and isinstance(owner, nn.Module) else inspect.getattr_static(owner, name)
    if nn and isinstance(value, nn.Module):
        owner, name, value = value, "forward", value.forward
        own = "forward" in vars(owner)
        owner.forward = made(value)
        try:
            yield
        finally:
            if own:
                owner.forward = value
            else:
                del owner.forward
        return
    if nn and isinstance(value, nn.Parameter):
        data = value.data
        value.data = made(data.clone())
        try:
            yield
        finally:
            value.data = data
        return
    new: Any
    if isinstance(value, functools.cached_property):
        new = functools.cached_property(made(value.func))
        new.__set_name__(owner, name)
    elif isinstance(value, classmethod):
        new = classmethod(made(value.__func__))
    else:
        new = made(value)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, value)


# ---- where it must show ---------------------------------------------------------------------------------------------------


def own_stages(fault: Fault, stages: Stages, stage_ids: Iterable[str], entry: str = "code") -> list[str]:
    """Those of ``stage_ids`` whose ``code`` (or ``wiring``) names what the fault patches. Wiring serves many stages: one is
    meant where the fault names the same use."""
    own = []
    for stage_id in stage_ids:
        found = stages.find(stage_id)
        if found is None:
            continue
        places = {name: value.strip(".") for name, value in found[1].items()}
        named = ((site, target) for site in getattr(found[0], entry) for target in fault.targets)
        if any(site.covers(target, places) and (entry == "code" or site.use == target.use) for site, target in named):
            own.append(stage_id)
    return own


def other_uses(fault: Fault, stages: Stages, stage_ids: Sequence[str]) -> list[str]:
    """Those of ``stage_ids`` that run the code which the fault patches, for a purpose that its brackets leave out."""
    bare = replace(fault, targets=tuple(target.bare for target in fault.targets))
    own = set(own_stages(fault, stages, stage_ids))
    return [stage_id for stage_id in own_stages(bare, stages, stage_ids) if stage_id not in own]


def expected(fault: Fault, stages: Stages, stage_ids: Sequence[str]) -> tuple[str, str] | None:
    """(stage, kind) that must report the fault: the first of ``stage_ids`` (in pipeline order) whose code it is, as `stage`
    (`chained` where the stage is reached from raw inputs alone), or whose wiring, as `wiring`. None where no entry names it."""
    own = own_stages(fault, stages, stage_ids)
    fed = own_stages(fault, stages, stage_ids, "wiring")
    if fed and (not own or stages.order(fed[0]) < stages.order(own[0])):
        return fed[0], "wiring"
    if not own:
        return None
    found = stages.find(own[0])
    return own[0], "chained" if found is not None and found[0].own_chain else "stage"
