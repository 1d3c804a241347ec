"""The manifest of a golden case: one JSON file that says what the case holds, where it comes from, and its hashes.

A content hash is over dtype, shape and little-endian bytes of one tensor, never over a file: a golden that is repacked
stays the same golden. The data file's own sha256 is kept too, but only to notice a damaged file before HDF5 parses it
(that library is not made for hostile input). The manifest carries its own sha256, and its text must be exactly what
`render` writes, so that no byte of it can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import strict
from stageparity.golden import GoldenError
from stageparity.sketch import SketchSpec
from stageparity.strict import Refused

__all__ = [
    "FORMAT",
    "PARTS",
    "content_sha256",
    "describe",
    "parse",
    "render",
    "restore_hint",
    "set_sha256",
    "weights_sha256",
]

FORMAT = 2
MIGRATE = "python tools/migrate_goldens.py FOLDER brings it to today's names, content hashes unchanged"
_MAX_BYTES = 16 << 20
_KEYS: dict[str, type] = {
    "case": str, "provenance": dict, "config": dict, "info": dict, "weights": dict, "container": dict, "inputs": dict,
    "targets": dict, "left_out": dict,
}  # fmt: skip

# Arrays that a stored form other than `whole` consists of.
PARTS = {
    "rows": ("sample", "index", "row_sum", "row_sum_index", "stats"),
    "sketch": ("blocks", "block_max", "top_index", "top_value", "sample_value"),
}


def content_sha256(array: np.ndarray) -> str:
    """Hash of dtype, shape and little-endian content."""
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    head = f"{array.dtype.name} {list(array.shape)}\n".encode()
    return hashlib.sha256(head + np.ascontiguousarray(little).tobytes()).hexdigest()


def weights_sha256(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash of a set of named tensors, independent of their order in a file."""
    lines = (f"{name} {content_sha256(tensors[name])}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def describe(array: np.ndarray) -> dict[str, Any]:
    """The manifest entry of a stored array."""
    return {"dtype": array.dtype.name, "shape": list(array.shape), "sha256": content_sha256(array)}


def render(body: Mapping[str, Any]) -> bytes:
    """The manifest file of a body (which has no `sha256` of its own yet): canonical JSON, one entry a line."""
    own = {key: value for key, value in body.items() if key != "sha256"}
    canonical = json.dumps(own, sort_keys=True, separators=(",", ":"), allow_nan=False)
    own["sha256"] = hashlib.sha256(canonical.encode()).hexdigest()
    return (json.dumps(_Lines(own), sort_keys=True, allow_nan=False, cls=_Encoder) + "\n").encode()


def parse(path: Path, formats: tuple[int, ...] = (FORMAT,)) -> dict[str, Any]:
    """Read a manifest, whole and unaltered, or raise GoldenError that says what is wrong and what to do."""
    try:
        raw = strict.read_bytes(path, limit=_MAX_BYTES)
    except Refused as error:
        raise GoldenError(f"{path}: manifest cannot be read ({error.problem}): {restore_hint(path)}") from None
    try:
        body = strict.parse_json(raw)
        if not isinstance(body, dict):
            raise ValueError("not an object")
        same = render(body) == raw
    except (ValueError, RecursionError, TypeError):
        raise GoldenError(
            f"{path}: manifest is not readable JSON (truncated or altered): {restore_hint(path)}"
        ) from None
    if not same:
        raise GoldenError(f"{path}: manifest is altered, its own sha256 does not match: {restore_hint(path)}")
    lacking = [key for key, kind in _KEYS.items() if not isinstance(body.get(key), kind)]
    if not lacking:
        container = body["container"]
        lacking += ["container"] * (
            type(container.get("bytes")) is not int or not isinstance(container.get("sha256"), str)
        )
        lacking += ["provenance"] * (not isinstance(body["provenance"].get("dtype"), str))
        lacking += ["targets"] * (not body["targets"])
        lacking += ["left_out"] * (not all(isinstance(why, str) for why in body["left_out"].values()))
        lacking += ["weights"] * (not _are_weights(body["weights"]))
        lacking += ["a tensor's entry"] * (not all(_is_entry(entry) for entry in _entries(body)))
    if lacking and body.get("format") in formats:
        raise GoldenError(f"{path}: manifest lacks {', '.join(lacking)} or has it malformed: {restore_hint(path)}")
    if (found := body.get("format")) not in formats:
        remedy = MIGRATE if isinstance(found, int) and found < FORMAT else "update the package"
        raise GoldenError(f"{path}: manifest format {found!r}, this reader knows {FORMAT}: {remedy}")
    return body


def _are_weights(entry: dict[str, Any]) -> bool:
    """Nothing (generated weights), or a file beside the manifest and its content hash."""
    return not entry or (isinstance(entry.get("file"), str) and isinstance(entry.get("sha256"), str))


def _entries(body: Mapping[str, Any]) -> Iterator[Any]:
    """Every tensor entry of a manifest, and every stored array inside one."""
    for table in (body["inputs"], *body["targets"].values()):
        for entry in table.values() if isinstance(table, dict) else (None,):
            yield entry
            if isinstance(entry, dict) and "parts" in entry:
                yield from entry["parts"].values() if isinstance(entry["parts"], dict) else (None,)


def _is_entry(entry: Any) -> bool:
    """Whether an entry has what its form needs, of the right types."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape, form = entry.get("shape"), entry.get("form", "whole")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        return False
    if not isinstance(entry.get("as", ""), str) or not isinstance(form, str):
        return False
    if form == "whole":
        return isinstance(entry.get("sha256"), str)
    if form not in PARTS or not isinstance(entry.get("parts"), dict) or set(entry["parts"]) != set(PARTS[form]):
        return False
    if form == "rows":
        return type(entry.get("axis")) is int and 0 <= entry["axis"] < len(shape)
    spec = entry.get("spec")
    if not isinstance(spec, dict) or set(spec) != {f.name for f in fields(SketchSpec)}:
        return False
    counts = (*spec.values(), entry.get("rows"), entry.get("columns"))
    return all(type(n) is int and n >= 0 for n in counts) and isinstance(entry.get("sum_squares"), int | float)


def set_sha256(folder: Path) -> str:
    """Identity of a golden set for the ledger: all content hashes of its cases, no container, provenance or path."""
    lines = []
    for path in sorted(folder.glob("*.json")):
        body = parse(path)
        tensors = {"inputs": body["inputs"], "targets": body["targets"], "weights": body["weights"]}
        lines.append(
            f"{body['case']} {json.dumps(tensors, sort_keys=True)} {json.dumps(body['config'], sort_keys=True)}"
        )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def restore_hint(path: Path) -> str:
    """What to do about a golden file that is not as it was."""
    return f"restore it (git checkout -- {shlex.quote(path.name)}) or import / regenerate its case"


class _Lines(dict[str, Any]):
    """A dict that `_Encoder` writes with one entry of its tables a line, for readable diffs."""


class _Encoder(json.JSONEncoder):
    def encode(self, o: Any) -> str:
        return self._table(o, 1, 3 if isinstance(o, _Lines) else 0)

    def _table(self, o: Any, level: int, depth: int) -> str:
        if not isinstance(o, dict) or not o or level > depth or ("sha256" in o and level > 1):
            return json.dumps(o, sort_keys=True, separators=(",", ":"), allow_nan=False)
        pad = " " * level
        lines = (f"{pad}{json.dumps(key)}:{self._table(o[key], level + 1, depth)}" for key in sorted(o))
        return "{\n" + ",\n".join(lines) + "\n" + pad[1:] + "}"
