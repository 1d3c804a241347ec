"""References to code that are checked where they are written: a stage's own code, what a fault patches.

    norm = code("my_model.norm")
    norm.rms                a function of that module; raises LookupError at once where there is none
    norm.rms["final"]       the same code as far as it has that use
    norm.rms(x)             calls it

Checking reads source text; the module is imported when something is called, so that a table of stages costs no tensor
library. A reference may name a function, a class, a member of one, a module (all that is in it), or a part of a model
(`part("norm")`, `part("layers.{i}.mlp")`).
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import importlib
import importlib.util
import re
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Code", "code", "part", "resolve"]

MODEL = "model"


class Code:
    """name: dotted, of a module or a member of one, or beginning with `model.`; use: None means any."""

    __slots__ = ("name", "use")

    def __init__(self, name: str, use: str | None = None) -> None:
        self.name, self.use = name, use
        if not name.startswith(f"{MODEL}."):
            _check(name)

    def __getattr__(self, member: str) -> Code:
        if member.startswith("__"):
            raise AttributeError(member)
        return Code(f"{self.name}.{member}")

    def __getitem__(self, use: str) -> Code:
        return Code(self.name, use)

    def __call__(self, *given: Any, **options: Any) -> Any:
        module, path = resolve(self.name)
        found: Any = functools.reduce(getattr, path, module)
        return found(*given, **options)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Code) and (self.name, self.use) == (other.name, other.use)

    def __hash__(self) -> int:
        return hash((self.name, self.use))

    def __str__(self) -> str:
        return self.name if self.use is None else f"{self.name}[{self.use}]"

    __repr__ = __str__

    @property
    def bare(self) -> Code:
        """The code for every use."""
        return Code(self.name)

    @property
    def file(self) -> str:
        """The file that holds it, from its package on; nothing for a part of a model."""
        return "" if self.name.startswith(f"{MODEL}.") else _module_of(self.name)[0].replace(".", "/") + ".py"

    def covers(self, other: Code, places: Mapping[str, str]) -> bool:
        """Is the other's code in this? A name covers what it is a prefix of, part by part."""
        if None not in (self.use, other.use) and self.use != other.use:
            return False
        wanted = re.sub(r"\{(\w+)\}", lambda m: places.get(m[1]) or "*", self.name).split(".")
        given = other.name.split(".")
        return len(wanted) <= len(given) and all(map(fnmatch.fnmatchcase, wanted, given))


def code(name: str) -> Code:
    """A reference by dotted name, a use in brackets behind it. Raises LookupError where there is no such code."""
    found = re.fullmatch(r"(.+?)\.?(?:\[(.+)\])?", name)
    assert found is not None
    return Code(found[1], found[2])


def part(path: str) -> Code:
    """A part of the model at hand: a module, parameter or attribute under its dotted path."""
    return Code(f"{MODEL}.{path}")


def resolve(name: str) -> tuple[types.ModuleType, tuple[str, ...]]:
    """(module, path of members in it) of a dotted name; imports the module. Raises LookupError where there is none."""
    module, path = _module_of(name)
    return importlib.import_module(module), path


@functools.cache
def _module_of(name: str) -> tuple[str, tuple[str, ...]]:
    """The longest part of a dotted name that is a module, and what follows it; imports packages on the way, not the module."""
    parts, cut = name.split("."), 0
    while cut < len(parts):
        spec = importlib.util.find_spec(".".join(parts[: cut + 1]))
        if spec is None:
            break
        cut += 1
        if spec.submodule_search_locations is None:
            break
    if not cut:
        raise LookupError(f"{name} names no code")
    return ".".join(parts[:cut]), tuple(parts[cut:])


@functools.cache
def _check(name: str) -> None:
    module, path = _module_of(name)
    if not path:
        return
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin and spec.origin.endswith(".py"):
        known = _names(spec.origin)
        if ".".join(path) in known:
            return
    found: Any = importlib.import_module(module)  # inherited members, names bound in other ways
    for step in path:
        if not hasattr(found, step):
            raise LookupError(f"{name}: {module} has no {'.'.join(path)}; was it renamed?")
        found = getattr(found, step)


@functools.cache
def _names(file: str) -> frozenset[str]:
    """What a source file defines: its functions, classes and constants, and the members of its classes."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from walk(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))

    return frozenset(walk(ast.parse(Path(file).read_text(encoding="utf-8")).body, ""))
