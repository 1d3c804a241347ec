"""Edits of the model's source for the study of mutants: where one can be made, what it makes, and a sample of them by seed.

Drawn from the syntax trees of `SOURCES`: operators, comparisons, constants, conditions, arguments, slices, returned tuples,
statements, twin functions such as sin and cos. Docstrings, annotations, imports, `__all__` and error texts are left alone.
"""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.studies import ROOT

__all__ = ["SOURCES", "Mutant", "collect", "edits", "made", "sample", "walk"]

LEFT_OUT = ("__init__.py", "flash.py", "flex.py", "limits.py")  # what a CPU run does not enter, words for people
SOURCES = (
    *(
        path.relative_to(ROOT).as_posix()
        for folder in ("bridge", "towers", "attention", "decoder")
        for path in sorted((ROOT / "vidi" / folder).glob("*.py"))
        if path.name not in LEFT_OUT
    ),
    *(f"vidi/{x}.py" for x in ("cache", "generate", "loss", "model", "inputs/batch", "inputs/pixels")),
)

OPERATORS: dict[type, tuple[type, ...]] = {
    getattr(ast, before): tuple(getattr(ast, name) for name in after.split())
    for before, after in (
        *(
            ("Add", "Sub"),
            ("Sub", "Add"),
            ("Mult", "Div Add"),
            ("Div", "Mult"),
            ("FloorDiv", "Mult Mod"),
            ("Mod", "FloorDiv"),
        ),
        *(("Pow", "Mult"), ("BitAnd", "BitOr"), ("BitOr", "BitAnd"), ("And", "Or"), ("Or", "And"), ("Lt", "LtE Gt")),
        *(("LtE", "Lt GtE"), ("Gt", "GtE Lt"), ("GtE", "Gt LtE"), ("Eq", "NotEq"), ("NotEq", "Eq")),
        *(("Is", "IsNot"), ("IsNot", "Is"), ("In", "NotIn"), ("NotIn", "In")),
    )
}
TWINS = {
    a: b
    for pair in ("sum mean", "any all", "sin cos", "amax amin", "ones zeros", "min max", "add sub", "tanh sigmoid")
    for a, b in (pair.split(), pair.split()[::-1])
} | {"masked_fill": "masked_fill", "maximum": "minimum", "cumsum": "cumprod", "exp": "expm1", "rsqrt": "sqrt"}


@dataclass(frozen=True)
class Mutant:
    """One edit. `before` and `after` are the edited piece; `place` the function around it."""

    file: str
    line: int
    column: int
    kind: str
    place: str
    before: str
    after: str

    @property
    def key(self) -> str:
        """Names the edit across other changes of the file."""
        return f"{self.file} {self.place} [{self.kind}] {self.before} -> {self.after}"

    @property
    def spot(self) -> str:
        """The edit at its place, for the log."""
        return f"{self.key} @{self.line}:{self.column}"


Path_ = tuple[tuple[str, int | None], ...]  #: fields and list places that lead to a node
Edit = Callable[[Any], ast.AST]


def collect(file: str) -> list[tuple[Path_, int, str]]:
    """Every place of a file that can be edited, with the number of the edit there, and the function around it."""
    return [
        (path, index, place)
        for path, node, place in walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        for index, _ in enumerate(edits(node))
    ]


def sample(count: int, seed: int) -> list[tuple[Mutant, str]]:
    """`count` of all edits, each with the source after it, drawn by seed without repetition."""
    everything = [(file, *edit) for file in SOURCES for edit in collect(file)]
    random.Random(seed).shuffle(everything)
    trees = {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in SOURCES}
    seen = {ast.unparse(tree) for tree in trees.values()}
    drawn: list[tuple[Mutant, str]] = []
    for file, path, index, place in everything:
        if len(drawn) == count:
            break
        new = made(file, trees[file], path, index, place)
        if new is not None and new[1] not in seen:
            seen.add(new[1])
            drawn.append(new)
    return drawn


def made(file: str, tree: ast.AST, path: Path_, index: int, place: str) -> tuple[Mutant, str] | None:
    """The mutant of one edit; None where the outcome is no program."""
    twin = copy.deepcopy(tree)
    target = _at(twin, path)
    kind, edit = list(edits(target))[index]
    before, line, column = _text(target), target.lineno, target.col_offset
    new = edit(target)
    if new is not target:
        _put(twin, path, new)
    ast.fix_missing_locations(twin)
    try:
        source = ast.unparse(twin)
        compile(source, file, "exec")
    except (SyntaxError, ValueError):
        return None
    return Mutant(file, line, column, kind, place, before, _text(new)), source


def _text(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) < 110 else text[:107] + "…"


def walk(tree: ast.AST) -> Iterator[tuple[Path_, Any, str]]:
    """(path, node, place) of every node that may be edited."""

    def visit(node: ast.AST, path: Path_, place: str) -> Iterator[tuple[Path_, Any, str]]:
        if path and hasattr(node, "lineno"):
            yield path, node, place
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place = f"{place}.{node.name}".lstrip(".")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params", "ctx", "op", "ops"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(child, ast.AST) and not _words(child):
                    yield from visit(child, (*path, (name, index)), place)

    yield from visit(tree, (), "")


def _words(node: ast.AST) -> bool:
    """Words for people, names for tools: docstrings, errors, messages, `__all__`, imports."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Assert):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [x.id for x in targets if isinstance(x, ast.Name)]
        return "__all__" in names or (
            isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript) and "Noise" in names
        )
    return False


def _at(tree: ast.AST, path: Path_) -> Any:
    node: Any = tree
    for name, index in path:
        node = getattr(node, name) if index is None else getattr(node, name)[index]
    return node


def _put(tree: ast.AST, path: Path_, new: ast.AST) -> None:
    owner, (name, index) = _at(tree, path[:-1]), path[-1]
    if index is None:
        setattr(owner, name, new)
    else:
        getattr(owner, name)[index] = new


def _to(name: str, value: Any) -> Edit:
    return lambda n: _set(n, name, value)


def _one_later(n: Any, bound: str) -> ast.AST:
    return _set(n, bound, ast.BinOp(getattr(n, bound), ast.Add(), ast.Constant(1)))


def _without_keyword(n: Any, index: int) -> ast.AST:
    return _set(n, "keywords", n.keywords[:index] + n.keywords[index + 1 :])


def edits(node: ast.AST) -> Iterator[tuple[str, Edit]]:
    if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign):
        for new in OPERATORS.get(type(node.op), ()):
            yield "operator", _to("op", new())
        if isinstance(node, ast.BinOp):
            yield "operand", lambda n: n.left
            if isinstance(node.op, ast.Sub | ast.Div | ast.FloorDiv | ast.Pow | ast.Mod):
                yield "swap", lambda n: _set(_set(n, "left", n.right, keep=True), "right", n.left)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for new in OPERATORS.get(type(node.ops[0]), ()):
            yield "comparison", _to("ops", [new()])
    elif isinstance(node, ast.UnaryOp):
        yield "operator", lambda n: n.operand
    elif isinstance(node, ast.Constant):
        yield from ((("constant"), lambda n, v=v: ast.Constant(v)) for v in _constants(node.value))
    elif isinstance(node, ast.IfExp):
        yield "condition", lambda n: _set(n, "test", ast.UnaryOp(ast.Not(), n.test))
        yield "condition", lambda n: n.body
        yield "condition", lambda n: n.orelse
    elif isinstance(node, ast.If | ast.While):
        yield "condition", lambda n: _set(n, "test", ast.UnaryOp(ast.Not(), n.test))
        if isinstance(node, ast.If):
            yield "condition", lambda n: _set(n, "test", ast.Constant(False))
    elif isinstance(node, ast.Call):
        yield from _call_edits(node)
    elif isinstance(node, ast.Slice):
        for bound in ("lower", "upper"):
            value = getattr(node, bound)
            if value is not None:
                yield "slice", _to(bound, None)
                yield "slice", partial(_one_later, bound=bound)
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1:
        yield "return", lambda n: _set(n, "value", _set(n.value, "elts", n.value.elts[::-1]))
    elif isinstance(node, ast.Tuple) and isinstance(node.ctx, ast.Store) and len(node.elts) > 1:
        yield "swap", lambda n: _set(n, "elts", n.elts[::-1])
    elif isinstance(node, ast.Expr) or (isinstance(node, ast.Assign | ast.AugAssign) and _reassigns(node)):
        yield "statement", lambda n: ast.Pass()


def _call_edits(node: ast.Call) -> Iterator[tuple[str, Edit]]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg:
            yield "argument", partial(_without_keyword, index=index)
    if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
        yield "argument", lambda n: _set(n, "args", n.args[:-1])
        yield "swap", lambda n: _set(n, "args", [n.args[1], n.args[0], *n.args[2:]])
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if TWINS.get(name, name) != name:
        if isinstance(node.func, ast.Attribute):
            yield "twin", lambda n: _set(n, "func", _set(n.func, "attr", TWINS[n.func.attr]))
        else:
            yield "twin", lambda n: _set(n, "func", ast.Name(TWINS[n.func.id], ast.Load()))
    if isinstance(node.func, ast.Attribute) and len(node.args) + len(node.keywords) <= 2:
        yield "call", lambda n: n.func.value  # x.f(…) -> x
    elif isinstance(node.func, ast.Name | ast.Attribute) and len(node.args) == 1 and not node.keywords:
        yield "call", lambda n: n.args[0]


def _reassigns(node: ast.Assign | ast.AugAssign) -> bool:
    """x = f(x): without it the name still exists."""
    if isinstance(node, ast.AugAssign):
        return True
    target = node.targets[0]
    if not isinstance(target, ast.Name):
        return not isinstance(target, ast.Tuple)
    return any(isinstance(n, ast.Name) and n.id == target.id for n in ast.walk(node.value))


def _constants(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value - 1, *((value * 2,) if abs(value) > 1 else ()))
    elif isinstance(value, float):
        yield from (value * 2, value * 10 if abs(value) < 1e-3 else value * 1.01)
    elif value in ("tanh", "bilinear"):
        yield {"tanh": "none", "bilinear": "bicubic"}[value]


def _set(node: Any, name: str, value: Any, keep: bool = False) -> Any:
    """The node with another field; a copy where the old value is still wanted."""
    if keep:
        node = copy.copy(node)
    setattr(node, name, value)
    return node
