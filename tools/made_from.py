"""What a case's baselines were measured from: the oracle's code and the golden's content, as one hash.

Comments, docstrings and white space do not count: they change no number.
"""

from __future__ import annotations

import hashlib
import io
import json
import tokenize
from functools import cache
from pathlib import Path

from vidi.parity.store import Case

__all__ = ["code_of", "made_from"]

ORACLE = Path(__file__).resolve().parents[1] / "goldens" / "oracle"
_SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING}
_LAYOUT = {tokenize.NEWLINE: ";", tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.ENDMARKER: ""}


def made_from(case: Case) -> str:
    """sha256 over the oracle's code and the case's tensors, weights, config and info."""
    body = {key: case.manifest[key] for key in ("inputs", "targets", "weights", "config", "info")}
    return hashlib.sha256(f"{_oracle()}\n{json.dumps(body, sort_keys=True)}".encode()).hexdigest()


@cache
def _oracle() -> str:
    return "\n".join(code_of(path.read_text(encoding="utf-8")) for path in sorted(ORACLE.glob("*.py")))


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
