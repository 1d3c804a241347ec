"""What a stored result was measured on, in the same words in every file, and what has changed since.

    "measured_on": {"code": {file: hash}, "goldens": {case: hash}, "budgets": {name: hash}, "plan": {name: hash},
                    "libraries": {name: version}, "device": name, "date": day, "commit": id}

The first four are its *basis*: a result is stale where one of them is not what it was. code: the files that it ran, found by
following imports; comments, docstrings and layout do not count, for they change no number. goldens: all that a case is made
of. budgets: the tolerances, and a case's baselines. plan: what was asked for, such as the settings of its runs. The others
are for the reader.
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
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from stageparity import atomic
from stageparity.store import Case
from stageparity.tolerance import BASELINES, KINDS, read_baselines

__all__ = [
    "Basis", "budgets", "code", "code_of", "commit", "digest", "goldens", "measured_on", "read", "render", "stale", "write",
]  # fmt: skip

LINE = 500  #: characters up to which a value stays on one line of a stored file
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

    Raises ValueError for an entry that is not there.
    """
    found: dict[str, str] = {}
    waiting = list(entries)
    while waiting:
        name = waiting.pop()
        if not (root / name).is_file():
            raise ValueError(f"{name}: no such file in {root}; was it renamed?")
        if name not in found:
            shape, imports = _read(root, name, (root / name).stat().st_mtime_ns)
            found[name] = shape
            waiting += (file for file in imports if not any(fnmatch.fnmatchcase(file, glob) for glob in without))
    return dict(sorted(found.items()))


@cache
def _read(root: Path, name: str, changed: int) -> tuple[str, tuple[str, ...]]:
    """(hash, imported files) of one file; ``changed`` is its time of change, so that the cache notices an edit."""
    source = (root / name).read_text(encoding="utf-8")
    return digest(code_of(source)), tuple(dict.fromkeys(_imported(source, root, name)))


def _imported(source: str, root: Path, name: str) -> Iterator[str]:
    """Files below ``root`` that a source imports, or names in dotted text as references to code do (`stageparity.code`), and
    the packages above them."""
    package = name.split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*(package[: len(package) + 1 - node.level] if node.level else ()), *filter(None, [node.module])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value):
            names = [node.value]
        else:
            continue
        for dotted in names:
            parts = dotted.split(".")
            for depth in range(1, len(parts) + 1):
                stem = "/".join(parts[:depth])
                yield from (file for file in (f"{stem}.py", f"{stem}/__init__.py") if (root / file).is_file())


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
            value = [line for line in value if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
        if name not in ("ctx", "kind", "type_comment") and (value not in (None, []) or name == "value"):
            parts.append(f"{name}={_shape(value)}")
    return f"({' '.join(parts)})"


def goldens(cases: Iterable[Case]) -> dict[str, str]:
    """SET/CASE -> hash of its tensors, weights, configuration and what else it needs; not of where it comes from."""
    keys = ("inputs", "targets", "weights", "config", "info")
    return {f"{c.set}/{c.name}": digest(json.dumps({k: c.manifest[k] for k in keys}, sort_keys=True)) for c in cases}


def budgets(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Hashes of a golden folder's tolerances, their reasons left out, and of the baselines of cases (SET/CASE)."""
    tables = tomllib.loads((folder / "tolerances.toml").read_text("utf-8"))
    found = {"tolerances": digest(json.dumps(_without_why(tables), sort_keys=True))}
    stored = read_baselines(folder / BASELINES)
    for name in names:
        own = {f"{kind} {dtype}": cases[name] for kind in KINDS for dtype, cases in stored[kind].items() if name in cases}
        found[f"baselines of {name}"] = digest(json.dumps(own, sort_keys=True))
    return found


def _without_why(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_why(item) for key, item in value.items() if key != "why"}
    return [_without_why(item) for item in value] if isinstance(value, list) else value


def commit(root: Path) -> str:
    """The commit of the tree, `unknown` outside a checkout."""
    asked = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


# ---- files --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any] | None:
    """A stored result; None where there is no file. Raises ValueError naming a file that is no JSON object."""
    if not path.exists():
        return None
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path}: no JSON object")
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
