"""What `measured/faults.json` of a golden folder holds of all faults: each in its own dtype, and how clearly
faults of wrong mathematics show in every other dtype.

    {"measured_on": {...}, "total", "killed", "localised", ..., "faults": [one of `judge.as_json`],
     "dtypes": {"bfloat16": {"killed": n, "localised": n, "elsewhere": {name: stage}, "invisible": {name: margin},
                             "margins": {name: margin}}}}

margins: of faults killed there, null without bound, at the stage that must report them but for those `elsewhere`. A fault may
leave `invisible`, never enter it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stageparity import strict
from stageparity.faults.judge import Verdict, as_json

__all__ = ["FAULTS", "LOWER", "by_dtype", "invisible", "read"]

FAULTS = Path("measured") / "faults.json"  # in a golden folder
LOWER = ("float32", "bfloat16", "float16")


def read(goldens: Path) -> dict[str, Any] | None:
    """The stored verdicts of a golden folder, None where there are none."""
    try:
        return strict.read_json(goldens / FAULTS, inside=goldens)
    except strict.Missing:
        return None


def invisible(document: Mapping[str, Any] | None, dtype: str | None) -> list[str]:
    """Faults that are known to lie below the noise of a dtype; none in the dtype that a fault was made for."""
    found: Any = document or {}
    for key in ("dtypes", dtype, "invisible"):
        found = found.get(key, {}) if isinstance(found, Mapping) else {}
    return [name for name in found if isinstance(name, str)] if isinstance(found, Mapping | list) else []


def by_dtype(verdicts: Iterable[Verdict]) -> dict[str, Any]:
    """The entry of one dtype, from verdicts of faults of wrong mathematics there."""
    ran = [v for v in verdicts if v.not_run is None and v.silent and v.fault.dtype == "float64"]
    shown = as_json(ran, 0)
    margins = {fault["name"]: fault["margin"] for fault in shown["faults"]}
    unseen = {v.fault.name for v in ran if not v.killed}
    return {
        "total": shown["total"],
        "killed": shown["killed"],
        "localised": shown["localised"],
        "elsewhere": {v.fault.name: v.stage for v in ran if v.killed and v.stage != v.expected_stage},
        "invisible": {name: margin for name, margin in margins.items() if name in unseen},
        "margins": {name: margin for name, margin in margins.items() if name not in unseen},
    }
