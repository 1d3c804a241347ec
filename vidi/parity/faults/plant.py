"""How a fault gets into the model: a patch of one named piece of code or one part of the model, undone afterwards.

A target is a dotted name. `vidi.bridge.fold.pad` is a function, `vidi.attention.unpad.Rows.indices` a property,
`model.bridge.llm_norm` a module of the model at hand (its forward is replaced), `model.decoder.layers.*.input_norm.eps` an
attribute or parameter of every layer. A name in brackets says for which purpose only the code is wrong, such as
`vidi.bridge.position.add[w]`: the addition along the width. The stage that must report the fault first is looked up in
the registry by the same name (`sites`), never written down here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vidi.model import VidiModel
from vidi.parity import stages

__all__ = ["Fault", "expected_stage", "other_uses", "own_stages", "plant", "planted", "same"]

Make = Callable[..., Any]  #: the original (and the model, if it takes two) -> what stands in its place


@dataclass(frozen=True)
class Fault:
    """One wrong step. `case`: a small case that sees it (SET/NAME for others). `dtype`: float64 for wrong mathematics, the
    dtype whose casts it misplaces otherwise. `rebuild`: acts when the model is built. `unpadded`: acts where attention
    runs on unpadded rows. `cuda`: exists on a GPU alone."""

    name: str
    what: str
    targets: tuple[str, ...]
    make: Make
    case: str = "base"
    dtype: str = "float64"
    rebuild: bool = False
    unpadded: bool = False
    cuda: bool = False

    @property
    def area(self) -> str:
        return self.name.split(".")[0]


def plant(*targets: str, **options: Any) -> Callable[[Make], Fault]:
    """Makes a fault of a function that takes the original and returns its faulty twin. Its name is `area.function`, area
    being the module that defines it, its `what` the docstring."""

    def decorate(make: Make) -> Fault:
        area = make.__module__.rsplit(".", 1)[-1]
        return Fault(f"{area}.{make.__name__}", " ".join((make.__doc__ or "").split()), targets, make, **options)

    return decorate


@contextlib.contextmanager
def planted(fault: Fault, model: VidiModel | None) -> Iterator[None]:
    """The fault acts inside. ``model`` None: only code can be patched (`rebuild`)."""
    with contextlib.ExitStack() as undo:
        for target in fault.targets:
            for owner, name in _places(target, model):
                undo.enter_context(_replaced(owner, name, fault.make, model))
        yield


def _split(target: str) -> tuple[str, str | None]:
    match = re.fullmatch(r"(.+?)\.?(?:\[(.+)\])?", target)
    assert match is not None
    return match[1], match[2]


def _places(target: str, model: VidiModel | None) -> list[tuple[Any, str]]:
    parts = _split(target)[0].split(".")
    if parts[0] == "model":
        assert model is not None, f"{target} is a part of a model, and none is given"
        owners: list[Any] = [model]
        for part in parts[1:-1]:
            owners = [child for owner in owners for child in (owner if part == "*" else [_child(owner, part)])]
        return [(owner, parts[-1]) for owner in owners]
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        return [(functools.reduce(getattr, parts[cut:-1], owner), parts[-1])]
    raise LookupError(f"{target} names no code")


def _child(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdigit() else getattr(owner, name)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, make: Make, model: VidiModel | None) -> Iterator[None]:
    def made(original: Any) -> Any:
        return make(original, model) if len(inspect.signature(make).parameters) == 2 else make(original)

    value = _child(owner, name) if isinstance(owner, nn.Module) else inspect.getattr_static(owner, name)
    if isinstance(value, nn.Module):
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
    if isinstance(value, nn.Parameter):
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


def _is_at(site: str, target: str) -> bool:
    """Is the code of ``target`` at ``site``? A site covers what its name is a prefix of, part by part."""
    (site_name, site_use), (target_name, target_use) = _split(site), _split(target)
    if None not in (site_use, target_use) and site_use != target_use:
        return False
    wanted, given = site_name.split("."), target_name.split(".")
    return len(wanted) <= len(given) and all(map(fnmatch.fnmatchcase, wanted, given))


def own_stages(fault: Fault, stage_ids: Iterable[str]) -> list[str]:
    """Those of ``stage_ids`` whose registry entry names what the fault patches."""
    own = []
    for stage_id in stage_ids:
        found = stages.find(stage_id)
        if found is None:
            continue
        sites = [site.format(**{k: v or "" for k, v in found[1].items()}) for site in found[0].sites]
        if any(_is_at(site, target) for site in sites for target in fault.targets):
            own.append(stage_id)
    return own


def other_uses(fault: Fault, stage_ids: Iterable[str]) -> list[str]:
    """Those of ``stage_ids`` that run the code which the fault patches, for a purpose that its brackets leave out."""
    bare = replace(fault, targets=tuple(_split(target)[0] for target in fault.targets))
    own = set(own_stages(fault, stage_ids))
    return [stage_id for stage_id in own_stages(bare, stage_ids) if stage_id not in own]


def expected_stage(fault: Fault, stage_ids: Iterable[str]) -> str | None:
    """The first of ``stage_ids`` (in pipeline order) that the fault must be reported at; None where no entry names it."""
    return next(iter(own_stages(fault, stage_ids)), None)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding in double precision."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = a.double(), b.double()
    return bool((x - y).abs().max() <= 1e-11 * y.abs().max().clamp(min=1e-300)) if x.numel() else True
