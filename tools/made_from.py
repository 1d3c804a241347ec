"""What stored figures were measured from, as hashes: a case's baselines from the oracle's code and the golden's content
(comments, docstrings and white space do not count: they change no number), a run's verdict from all that judged it.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from stageparity.store import Case, open_case
from stageparity.tolerance import KINDS, read_baselines

__all__ = ["budgets_of", "code_of", "made_from", "model_code", "moved_code"]

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT / "goldens" / "oracle"
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING}
_LAYOUT = {tokenize.NEWLINE: ";", tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.ENDMARKER: ""}


def made_from(case: Case) -> str:
    """sha256 over the oracle's code and the case's tensors, weights, config and info."""
    body = {key: case.manifest[key] for key in ("inputs", "targets", "weights", "config", "info")}
    return hashlib.sha256(f"{_oracle()}\n{json.dumps(body, sort_keys=True)}".encode()).hexdigest()


def budgets_of(goldens: Path, cases: Iterable[str]) -> str:
    """16 hex digits over the tolerances, and the goldens and baselines of these cases (SET/CASE)."""
    digest = hashlib.sha256((goldens / "tolerances.toml").read_bytes())
    for name in sorted(cases):
        digest.update(_judges(goldens, name).encode())
    return digest.hexdigest()[:16]


@cache
def _judges(goldens: Path, name: str) -> str:
    folder, _, last = name.rpartition("/")
    targets = open_case(goldens / folder, last).manifest["targets"]
    return json.dumps([name, targets, {f"{kind} {dtype}": own for kind, dtype, own in _baselines(goldens, name)}])


def _baselines(goldens: Path, name: str) -> Iterator[tuple[str, str, Any]]:
    stored = _baselines_of(goldens / "baselines.json")
    for kind in KINDS:
        for dtype, cases in stored.get(kind, {}).items():
            if name in cases:
                yield kind, dtype, cases[name]


_baselines_of = cache(read_baselines)


@cache
def _oracle() -> str:
    return "\n".join(code_of(path.read_text(encoding="utf-8")) for path in sorted(ORACLE.glob("*.py")))


def model_code(root: Path = ROOT) -> dict[str, str]:
    """File -> 8 hex digits over its code, of all of the project's that a judged run loads (`tools/one_run.py`)."""
    found: dict[str, str] = {}
    waiting = ["tools/one_run.py"]
    while waiting:
        name = waiting.pop()
        source = (root / name).read_text(encoding="utf-8")
        found[name] = hashlib.sha256(code_of(source).encode()).hexdigest()[:8]
        waiting += {file for file in _imported(source, root) if file not in found and file not in waiting}
    return dict(sorted(found.items()))


def _imported(source: str, root: Path) -> Iterator[str]:
    """The project's files that a source imports anywhere, packages above them included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for depth in range(1, len(parts) + 1) if parts[0] in ("vidi", "tools") else ():
                stem = "/".join(parts[:depth])
                yield from (file for file in (f"{stem}.py", f"{stem}/__init__.py") if (root / file).is_file())


def moved_code(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Files that one of two `model_code` tables has otherwise, or not at all."""
    return sorted(file for file in {*was, *now} if was.get(file) != now.get(file))


def code_of(source: str) -> str:
    """Python source without comments, docstrings and white space within lines."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type not in _SILENT]
    kept, at_start = [], True
    for token, following in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        is_docstring = token.type == tokenize.STRING and at_start and following.type == tokenize.NEWLINE
        if not is_docstring:
            kept.append(_LAYOUT.get(token.type, "".join(token.string.split())))
        at_start = token.type in _LAYOUT
    return "".join(kept)
