"""Edits of the model's source for the study of mutants: where one can be made, what it makes, and a sample of them by seed.

Drawn from the syntax trees of `SOURCES`: operators, comparisons, constants, conditions, arguments, slices, returned tuples,
statements, twin functions such as sin and cos. Left alone is what can change no result on a CPU: docstrings, annotations,
imports, `__all__`, error texts, types with a name, bounds on memory (`KNOBS`), invariants (``strict=True``), places of tensors
(``device=``), what a CUDA device alone runs, numbers of the tiny models that tests make (`MADE_UP`), and arguments whose order
is nothing (`SYMMETRIC`): such edits are none.

The sample are the edits of lowest rank, and a rank is a hash of seed and key. A key holds the file, the function, and the edited
piece as text: no line number, and nothing of any other function. So a change of one function reshuffles no other's edits.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from tools.studies import ROOT

__all__ = ["SOURCES", "Mutant", "collect", "edits", "made", "rank", "sample", "sources", "walk"]

FOLDERS = ("bridge", "towers", "attention", "decoder", "fast", "inputs")
FILES = (
    *("cache", "checkpoint/names", "config", "generate", "loss", "model", "official", "official_7b", "precision", "release"),
    *("retrieval", "stream", "tap"),
)  # fmt: skip
#: what a CPU run does not enter (flash, flex, what times a GPU; `fast/kernels` is a folder of its own), words for people, and
#: what runs in a process of its own, which reads the file as it stands on the disk
LEFT_OUT = ("__init__.py", "flash.py", "flex.py", "limits.py", "measure.py", "template_child.py")
CUDA_ONLY = ("_captured",)  #: functions
#: names of bounds on memory and of shares of work: values that no result depends on, which tests vary
KNOBS = ("_chunk", "_batch", "max_bytes", "max_kept", "many_keys", "programs")
#: arguments that change no value on a CPU, invariants, and what only shows
PLACES = ("device", "non_blocking", "pin_memory", "strict", "repr", "indent")
SAME_VALUES = ("contiguous", "cpu", "cuda")  #: methods
SYMMETRIC = ("max", "maximum", "min", "minimum", "swapaxes", "transpose")  #: functions of two: the same in any order
MADE_UP = (
    "tiny",
    "tiny_files",
    "tiny_tokenizer",
)  #: functions: any number in them will do that differs from the others


def sources() -> tuple[str, ...]:
    """Every file that is edited."""
    found = [path for folder in FOLDERS for path in sorted((ROOT / "vidi" / folder).glob("*.py"))]
    found += [ROOT / "vidi" / f"{name}.py" for name in FILES]
    return tuple(path.relative_to(ROOT).as_posix() for path in found if path.name not in LEFT_OUT)


SOURCES = sources()

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
    """One edit. `before` and `after` are the edited piece; `place` the function around it; `occurrence` counts equal edits of
    that function."""

    file: str
    line: int
    kind: str
    place: str
    before: str
    after: str
    occurrence: int = 1

    @property
    def key(self) -> str:
        """Names the edit, whatever else changes."""
        again = f" #{self.occurrence}" if self.occurrence > 1 else ""
        return f"{self.file} {self.place} [{self.kind}] {self.before} -> {self.after}{again}"


Path_ = tuple[tuple[str, int | None], ...]  #: fields and list places that lead to a node
Edit = Callable[[Any], ast.AST]
Place = tuple[Path_, int]  #: of an edit: the node, and its number there


def collect(file: str, source: str | None = None) -> list[tuple[Mutant, Place]]:
    """Every edit of a file (or of another text in its place), in the order of the text."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8") if source is None else source)
    found: list[tuple[Mutant, Place]] = []
    seen: Counter[tuple[str, ...]] = Counter()
    for path, node, place in walk(tree):
        for index, (kind, _) in enumerate(edits(node)):
            twin = copy.deepcopy(node)
            texts = kind, place, _text(node), _text(list(edits(twin))[index][1](twin))
            seen[texts] += 1
            found.append((Mutant(file, node.lineno, *texts, seen[texts]), (path, index)))
    return found


def rank(mutant: Mutant, seed: int) -> str:
    """Its place in line; the sample takes the lowest."""
    return hashlib.sha256(f"{seed} {mutant.key}".encode()).hexdigest()


def sample(count: int, seed: int) -> list[tuple[Mutant, str]]:
    """The ``count`` edits of lowest rank, each with the source after it. A smaller count is the start of a greater."""
    everything = [pair for file in SOURCES for pair in collect(file)]
    everything.sort(key=lambda pair: rank(pair[0], seed))
    trees = {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in SOURCES}
    seen = {(file, ast.unparse(tree)) for file, tree in trees.items()}
    drawn: list[tuple[Mutant, str]] = []
    for mutant, place in everything:
        if len(drawn) == count:
            break
        source = made(trees[mutant.file], place)
        if source is not None and (mutant.file, source) not in seen:
            seen.add((mutant.file, source))
            drawn.append((mutant, source))
    return drawn


def made(tree: ast.AST, place: Place) -> str | None:
    """The source of a file after one edit; None where the outcome is no program."""
    path, index = place
    twin = copy.deepcopy(tree)
    target = _at(twin, path)
    new = list(edits(target))[index][1](target)
    if new is not target:
        _put(twin, path, new)
    ast.fix_missing_locations(twin)
    try:
        source = ast.unparse(twin)
        compile(source, "mutant", "exec")
    except (SyntaxError, ValueError):
        return None
    return source


def _text(node: ast.AST) -> str:
    """The edited piece; of a condition without what depends on it."""
    if isinstance(node, ast.If | ast.While):
        node = ast.fix_missing_locations(type(node)(node.test, [ast.Pass()], []))
    text = " ".join(ast.unparse(node).split()).removesuffix(" pass")
    return text if len(text) < 110 else text[:107] + "…"


def walk(tree: ast.AST) -> Iterator[tuple[Path_, Any, str]]:
    """(path, node, place) of every node that may be edited."""

    def visit(node: ast.AST, path: Path_, place: str) -> Iterator[tuple[Path_, Any, str]]:
        if path and hasattr(node, "lineno"):
            yield path, node, place
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            place = f"{place}.{node.name}".lstrip(".")
        knobs = _knob_defaults(node) if isinstance(node, ast.arguments) else []
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params", "ctx", "op", "ops"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else ((None, value),):
                if isinstance(child, ast.AST) and not _words(child) and child not in knobs:
                    yield from visit(child, (*path, (name, index)), place)

    yield from visit(tree, (), "")


def _words(node: ast.AST) -> bool:
    """What no edit may touch: words for people, names for tools, types, bounds on memory, what a CUDA device alone runs."""
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Raise | ast.JoinedStr | ast.Assert):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True
    if isinstance(node, ast.FunctionDef) and node.name in (*CUDA_ONLY, *MADE_UP):
        return True
    if isinstance(node, ast.If):
        return "cuda" in (test := ast.unparse(node.test)) or test == "TYPE_CHECKING"
    if isinstance(node, ast.keyword):
        return node.arg in PLACES or (_knob(node.arg or "") and isinstance(node.value, ast.Constant))
    if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign):
        return _left_alone(node)
    return False


def _left_alone(node: ast.Assign | ast.AugAssign | ast.AnnAssign) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [x.attr if isinstance(x, ast.Attribute) else getattr(x, "id", "") for x in targets]
    if "__all__" in names or "cuda" in ast.unparse(node):
        return True
    if isinstance(node.value, ast.Subscript | ast.BinOp) and names[0].rstrip("_").istitle():
        return True  # a type with a name
    constant = node.value is not None and not any(isinstance(x, ast.Name | ast.Call) for x in ast.walk(node.value))
    return constant and any(map(_knob, names))


def _knob_defaults(node: ast.arguments) -> list[ast.AST]:
    plain = [*node.posonlyargs, *node.args]
    with_default = plain[len(plain) - len(node.defaults) :]
    pairs = zip([*with_default, *node.kwonlyargs], [*node.defaults, *node.kw_defaults], strict=True)
    return [default for argument, default in pairs if default is not None and _knob(argument.arg)]


def _knob(name: str) -> bool:
    return name.lower().endswith(KNOBS)


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
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    for index, keyword in enumerate(node.keywords):
        if keyword.arg and keyword.arg not in PLACES:
            yield "argument", partial(_without_keyword, index=index)
    if len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args):
        yield "argument", lambda n: _set(n, "args", n.args[:-1])
        if name not in SYMMETRIC or len(node.args) > 2:
            yield "swap", lambda n: _set(n, "args", [n.args[1], n.args[0], *n.args[2:]])
    if TWINS.get(name, name) != name:
        if isinstance(node.func, ast.Attribute):
            yield "twin", lambda n: _set(n, "func", _set(n.func, "attr", TWINS[n.func.attr]))
        else:
            yield "twin", lambda n: _set(n, "func", ast.Name(TWINS[n.func.id], ast.Load()))
    if name in SAME_VALUES:
        return
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
