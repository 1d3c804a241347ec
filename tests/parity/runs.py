"""Where the goldens lie."""

from __future__ import annotations

from pathlib import Path

__all__ = ["GOLDENS"]

GOLDENS = Path(__file__).parents[2] / "goldens"
