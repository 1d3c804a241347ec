"""What a stored result was measured on, in the same words in every file, and what has changed since.

    "measured_on": {"code": {file: hash}, "goldens": {case: hash}, "budgets": {name: hash}, "plan": {name: hash},
                    "libraries": {name: version}, "device": name, "date": day, "commit": id}

The first four are its *basis*: a result is stale where one of them is not what it was. code: the files that it ran, found by
following imports; comments, docstrings and layout do not count, for they change no number. goldens: all that a case is made
of. budgets: the tolerances, and a case's baselines and margins. plan: what was asked for, such as the settings of its runs.
The others are for the reader.
"""

from __future__ import annotations

import ast
import fnmatch
import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from stageparity import atomic, strict
from stageparity.manifest import parse
from stageparity.store import CaseRef
from stageparity.tolerance import BASELINES, MARGINS, read_baselines, read_margins

__all__ = [
    "ASIDE", "Basis", "budgets", "code", "code_of", "commit", "digest", "goldens", "measured_on", "read", "render", "stale",
    "write",
]  # fmt: skip

ASIDE = ("stageparity/evidence.py", "stageparity/atomic.py")  #: writes a result down, and computes none of it
LINE = 500  #: characters up to which a value stays on one line of a stored file
MAX_BYTES = 64 << 20  #: of a stored result
NAMED = 8  #: changed files that a line names
LIBRARIES = ("torch", "numpy", "h5py", "safetensors", "triton", "flash_attn")


@dataclass(frozen=True)
class Basis:
    """What a result depends on: hashes by name."""

    code: Mapping[str, str]
    goldens: Mapping[str, str] = field(default_factory=dict)
    budgets: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, str] = field(default_factory=dict)


def measured_on(basis: Basis, root: Path, device: str = "") -> dict[str, Any]:
    """The entry of a result that is measured now, in the checkout at ``root``."""
    return {
        **{part: dict(sorted(hashes.items())) for part, hashes in asdict(basis).items() if hashes},
        "libraries": {n: getattr(sys.modules[n], "__version__", "?") for n in LIBRARIES if n in sys.modules},
        "device": device or platform.processor() or platform.machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(root),
    }


def stale(document: Mapping[str, Any] | None, basis: Basis, again: str) -> list[str]:
    """What has changed since a stored result was measured, a line for each part of its basis; each ends with ``again``, the
    command that measures anew. None stands for a file that is missing."""
    if document is None:
        return [f"missing: {again}"]
    if "measured_on" not in document:
        return [f"does not say what it was measured on: {again}"]
    lines = []
    for part, now in asdict(basis).items():
        then = document["measured_on"].get(part, {})
        changed = sorted(name for name in {*then, *now} if then.get(name) != now.get(name))
        if changed:
            more = f" and {len(changed) - NAMED} more" if len(changed) > NAMED else ""
            lines.append(f"other {part} than it was measured on: {', '.join(changed[:NAMED])}{more}: {again}")
    return lines


# ---- hashes -------------------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    """12 hex digits of a sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code(entries: Iterable[str], root: Path, without: Iterable[str] = ()) -> dict[str, str]:
    """File -> hash of its code, of the ``entries`` (paths from ``root``) and of every file of the checkout that they import, at
    whatever place. without: patterns of files that this result never enters.

    An installed package is known by its version: nothing where ``root`` is no checkout. Raises ValueError for an entry that is
    not there.
    """
    if not (root / "pyproject.toml").is_file():
        return {}
    found: dict[str, str] = {}
    named, waiting = set[str](), list(entries)
    while waiting:
        name = waiting.pop()
        if not (root / name).is_file():
            raise ValueError(f"{name}: no such file in {root}; was it renamed?")
        if name not in found:
            found[name], names = _source(root / name, _age(root / name))
            new = {_absolute(name, dotted) for dotted in names} - named
            named |= new
            files = {file for dotted in new for file in _files(root, dotted)}
            waiting += (file for file in files if not any(fnmatch.fnmatchcase(file, glob) for glob in without))
    return dict(sorted(found.items()))


def _age(path: Path) -> int:
    """Time of its last change: a cache that has it among its keys notices an edit."""
    return path.stat().st_mtime_ns


@cache
def _source(path: Path, age: int) -> tuple[str, frozenset[str]]:
    """(hash, dotted names that it imports, or names in text as references to code do (`stageparity.code`))."""
    tree, names = ast.parse(path.read_text("utf-8")), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names |= {base, *(f"{base}{'.' * bool(node.module)}{alias.name}" for alias in node.names)}
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value)
        ):
            names.add(node.value)
    return digest(_shape(tree)), frozenset(names)


def _absolute(importer: str, dotted: str) -> str:
    """`..store` as the file that imports it means it."""
    steps = dotted.lstrip(".")
    package = importer.split("/")[: len(steps) - len(dotted)] if steps != dotted else []
    return ".".join([*package, steps]).strip(".")


def _files(root: Path, dotted: str) -> Iterator[str]:
    """Files of the checkout that a dotted name stands for: a module, and the packages above it."""
    stem = ""
    for part in dotted.split("."):
        stem = f"{stem}/{part}".strip("/")
        if (root / f"{stem}.py").is_file():
            yield f"{stem}.py"
        if not (root / stem).is_dir():
            return
        if (root / stem / "__init__.py").is_file():
            yield f"{stem}/__init__.py"


def code_of(source: str) -> str:
    """Python source as what it does: its syntax tree without docstrings, the same text in every version of Python."""
    return _shape(ast.parse(source))


def _shape(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_shape, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            value = [
                line for line in value if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            ]
        if name not in ("ctx", "kind", "type_comment") and (value not in (None, []) or name == "value"):
            parts.append(f"{name}={_shape(value)}")
    return f"({' '.join(parts)})"


def goldens(refs: Iterable[CaseRef]) -> dict[str, str]:
    """SET/CASE -> hash of its tensors, weights, configuration and what else it needs; not of where it comes from."""
    paths = {f"{ref.set}/{ref.name}": ref.folder / f"{ref.name}.json" for ref in refs}
    return {name: _golden(path, _age(path)) for name, path in paths.items()}


@cache
def _golden(path: Path, age: int) -> str:
    body = parse(path)
    return digest(
        json.dumps({key: body[key] for key in ("inputs", "targets", "weights", "config", "info")}, sort_keys=True)
    )


def budgets(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hashes of a golden folder's tolerances, their reasons left out, and of cases' (SET/CASE) baselines and margins."""
    tables = strict.read_toml(folder / "tolerances.toml")
    found = {"tolerances": digest(json.dumps(_without_why(tables), sort_keys=True))}
    path = folder / BASELINES
    stored = _baselines(path, _age(path)) if path.exists() else {}
    found |= {f"baselines of {name}": stored.get(name, "none") for name in names}
    margins = read_margins(folder / MARGINS)
    return found | {f"margins of {name}": digest(repr(margins[name])) for name in names if name in margins}


@cache
def _baselines(path: Path, age: int) -> dict[str, str]:
    """SET/CASE -> hash of its baselines."""
    of_case: dict[str, dict[str, Any]] = {}
    for kind, dtypes in read_baselines(path).items():
        for dtype, cases in dtypes.items():
            for name, own in cases.items():
                of_case.setdefault(name, {})[f"{kind} {dtype}"] = own
    return {name: digest(json.dumps(own, sort_keys=True)) for name, own in of_case.items()}


def _without_why(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_why(item) for key, item in value.items() if key != "why"}
    return [_without_why(item) for item in value] if isinstance(value, list) else value


def commit(root: Path) -> str:
    """The commit of the tree, `unknown` outside a checkout."""
    try:
        asked = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:  # no git here
        return "unknown"
    return asked.stdout.strip() or "unknown"


# ---- files --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """A stored result; None where there is no file. Raises Refused naming a file that is none, or cannot be read."""
    try:
        document = strict.read_json(path, limit=MAX_BYTES)
    except strict.Missing:
        return None
    on = document.get("measured_on", {})
    if not isinstance(on, dict) or not all(isinstance(on.get(part.name, {}), dict) for part in fields(Basis)):
        raise strict.Refused("tables are needed", file=path, field="measured_on")
    return document


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, render(document))


def render(value: Any) -> str:
    """JSON in little room, one entry a line wherever a value is too long for one."""
    return "".join(_lines(value)) + "\n"


def _lines(value: Any) -> Iterator[str]:
    flat = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    if len(flat) <= LINE or not isinstance(value, dict | list):
        yield flat
        return
    named = value.items() if isinstance(value, dict) else (("", item) for item in value)
    yield "{" if isinstance(value, dict) else "["
    for n, (key, item) in enumerate(named):
        yield ",\n" if n else "\n"
        yield f"{json.dumps(key, ensure_ascii=False)}:" if isinstance(value, dict) else ""
        yield from _lines(item)
    yield "\n}" if isinstance(value, dict) else "\n]"
