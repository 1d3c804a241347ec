"""The first wrong stage in a folder that needs nothing of ours: its tensors, its budget, and a check of twenty lines.

`capsule.npz` holds `golden`, `candidate`, `input:ID` of each golden that feeds the stage, `weight:NAME` of its slice of the
weights; `capsule.json` what it is, what judged it, what it ran on.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stageparity import atomic, strict
from stageparity.result import Result
from stageparity.stage import Axes

__all__ = ["check", "write"]

_FILES = {"capsule.npz", "capsule.json", "check.py"}

CHECK = '''"""Holds the stage of this folder against its golden: python check.py [your.npy]. Needs NumPy alone."""
import json
import sys

import numpy as np

about, held = json.load(open("capsule.json", encoding="utf-8")), np.load("capsule.npz")
golden = held["golden"].astype(np.float64)
mine = (np.load(sys.argv[1]) if len(sys.argv) > 1 else held["candidate"]).astype(np.float64)
if mine.shape != golden.shape:
    sys.exit(f"DIFFERENT: shape {mine.shape}, the golden has {golden.shape}")
error, scale = np.abs(mine - golden), np.sqrt((golden**2).mean()) or 1.0
content = tuple(axis for axis in range(error.ndim) if axis not in about["row_axes"])
found = {"max": error.max() / scale, "rms": np.sqrt((error**2).mean()) / scale}
found["row"] = np.sqrt((error**2).mean(axis=content)).max() / scale
over = [key for key, budget in about["budgets"].items() if key in found and found[key] > budget]
wrong = bool(over) or (about["exact"] and bool(error.any()))
print(about["stage"], "DIFFERENT" if wrong else "equal", {key: float(x) for key, x in found.items()})
sys.exit(int(wrong))
'''


def write(
    folder: Path,
    result: Result,
    candidate: np.ndarray,
    golden: np.ndarray,
    axes: Axes,
    inputs: Mapping[str, np.ndarray],
    weights: Mapping[str, np.ndarray],
    about: Mapping[str, Any],
) -> None:
    """One stage, whole or not at all; an older capsule is replaced. Raises ValueError where the folder holds something
    else, OSError."""
    arrays = {"golden": golden, "candidate": candidate}
    arrays |= {f"input:{name}": x for name, x in inputs.items()} | {f"weight:{name}": x for name, x in weights.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    exact = golden.dtype.kind in "bui"
    said = {
        **about,
        "stage": result.stage,
        "exact": exact,
        "row_axes": list(axes.of(golden.ndim)[0]),
        "budgets": {} if exact else dict(result.budgets),
        "errors": {key: float(value) for key, value in result.errors.items()},
        "rule": {"name": result.rule.name, "why": result.rule.why},
        "text": result.text(),
    }
    about_text = json.dumps(said, indent=1, allow_nan=True) + "\n"
    files = {"capsule.npz": buffer.getvalue(), "capsule.json": about_text.encode(), "check.py": CHECK.encode()}
    with atomic.replacing(folder, check) as draft:
        for name, data in files.items():
            atomic.write_bytes(draft / name, data)


def check(folder: Path) -> None:
    """Raises ValueError for a folder that is there and holds anything but a capsule, which is three files. A name
    proves nothing: its capsule.json must speak of a stage."""
    if folder.is_symlink():
        raise ValueError(strict.one_line(f"{folder} is a link; give the folder itself for the capsule"))
    places = list(folder.iterdir()) if folder.is_dir() else []
    if not places:
        return
    try:
        said = strict.read_json(folder / "capsule.json")
    except strict.Refused:
        said = {}
    strangers = [path.name for path in places if path.name not in _FILES or path.is_symlink() or not path.is_file()]
    if strangers or not {"stage", "row_axes", "budgets"} <= set(said):
        raise ValueError(strict.one_line(f"{folder} holds more than a capsule; give a new folder for the capsule"))
