"""The ledger: every change of a golden or a tolerance, in `goldens/ledger.toml`. Entries are appended, never edited.

An entry ties a file or set to its hash: `subject` is `tolerances`, `baselines`, ... or the path of a golden set; the last
entry of a subject must equal what lies on disk.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from stageparity import atomic, strict

__all__ = ["append", "check_reason", "entries", "file_sha256", "latest", "stale"]

MAX_BYTES = 64 << 20  # of a file whose hash is entered
LARGEST = 1 << 20  # bytes of a ledger: what a reader of TOML takes
LONGEST_REASON = 2000  # characters: a line of the ledger
_KEYS = ("subject", "sha256", "why")
_HEAD = "# What changed, why, and the errors against the oracle before and after. Written by tools/, appended only.\n"


def file_sha256(path: Path) -> str:
    """sha256 of a text file's content."""
    return hashlib.sha256(strict.read_bytes(path, limit=MAX_BYTES)).hexdigest()


def entries(folder: Path) -> list[dict[str, Any]]:
    """All entries of a golden folder's ledger, oldest first. Raises Refused for a file of another form."""
    path = folder / "ledger.toml"
    try:
        found = strict.read_toml(path).get("entry", [])
    except strict.Missing:
        return []
    if not isinstance(found, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in _KEYS) for entry in found
    ):
        raise strict.Refused(f"tables of texts are needed: {', '.join(_KEYS)}", file=path, field="entry")
    return found


def latest(folder: Path, subject: str) -> dict[str, Any] | None:
    """The last entry about a subject, None when there is none."""
    return next((e for e in reversed(entries(folder)) if e["subject"] == subject), None)


def stale(folder: Path, subject: str, sha256: str) -> str | None:
    """Why the ledger does not cover what lies on disk, None when it does."""
    entry = latest(folder, subject)
    if entry is None:
        return f"{subject}: no ledger entry"
    if entry["sha256"] != sha256:
        return f"{subject}: changed since its last ledger entry ({entry['sha256'][:12]} there, {sha256[:12]} on disk)"
    return None


def append(folder: Path, subject: str, sha256: str, reason: str, changes: list[str] | None = None) -> None:
    """Append one entry, in one step.

    The caller holds the folder's lock (`writer.locked`, `writer.replaced`), or two writers lose an entry.

    changes: one line per tensor or number with its old and new value. Raises ValueError as `check_reason`, and for an entry with
    which the ledger could not be read again.
    """
    check_reason(reason)
    path = folder / "ledger.toml"
    text = strict.read_bytes(path, limit=MAX_BYTES).decode("utf-8") if path.exists() else _HEAD
    lines = ["", "[[entry]]", *(f"{k} = {_toml(v)}" for k, v in (("subject", subject), ("sha256", sha256)))]
    lines.append(f"why = {_toml(reason.strip())}")
    if changes:
        lines += ["changes = [", *(f"  {_toml(change)}," for change in changes), "]"]
    text += "\n".join(lines) + "\n"
    if len(text.encode("utf-8")) > LARGEST:
        raise ValueError(
            f"{path}: with this entry it is over {LARGEST:,} bytes, and would not be read again; begin a new one"
        )
    strict.parse_toml(text.encode("utf-8"), file=path)
    atomic.write_text(path, text)


def check_reason(reason: str) -> None:
    """Raises ValueError for a reason that cannot stand in a ledger: what it is for may take hours to measure."""
    if not reason.strip():
        raise ValueError('a ledger entry needs a reason: --reason "..."')
    if len(reason) > LONGEST_REASON:
        raise ValueError(f"--reason has {len(reason):,} characters; at most {LONGEST_REASON:,} stand in a ledger")


def _toml(text: str) -> str:
    """A basic string. JSON's lets DEL stand, and writes what lies beyond 16 bits as two halves: TOML refuses both."""
    plain = text.encode("utf-8", "backslashreplace").decode("utf-8")  # bytes of the command line that are no text
    return json.dumps(plain, ensure_ascii=False).replace("\x7f", "\\u007f")
