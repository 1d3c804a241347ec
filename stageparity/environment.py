"""Code or environment? The first wrong stage again on the same inputs under other circumstances, and what that tells."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["SETTINGS", "sentence"]

#: name -> what is changed
SETTINGS = {
    "float64": "in float64",
    "one thread": "with one thread",
    "plain": "with reduced precision and fused kernels off",
}
FALLS = 0.1  # an error that a circumstance makes: it falls to a tenth without it


def sentence(ratio: float, under: Mapping[str, float | None]) -> str:
    """The verdict on a stage that is ``ratio`` times its budget off. under: the same under each of SETTINGS, None where it did
    not run so."""
    ran = {name: r for name, r in under.items() if r is not None}
    if any(map(math.isfinite, ran.values())):
        told = ", ".join(f"{SETTINGS[name]} {_times(r)}" for name, r in ran.items())
    else:  # no budget helps here: exact values, padding
        told = "also " + ", ".join(SETTINGS[name] for name in ran)
    missing = [SETTINGS[name] for name in SETTINGS if name not in ran]
    rest = f" (NOT RUN {', '.join(missing)})" if missing else ""
    switched = [
        name for name in ("one thread", "plain") if name in ran and ran[name] <= FALLS * ratio and ran[name] <= 1
    ]
    if switched:
        return f"environment: {SETTINGS[switched[0]]} it is right; {told}{rest}"
    if "float64" in ran and ran["float64"] <= FALLS * ratio and ran["float64"] <= 1:
        return f"rounding: it falls with the precision; {told}{rest}"
    return f"code: it stays whatever it runs on; {told}{rest}" if ran else f"not told: nothing else ran{rest}"


def _times(ratio: float) -> str:
    return f"{ratio:.2g} of budget" if math.isfinite(ratio) else "beyond any budget"
