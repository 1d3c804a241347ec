"""What cannot run on this machine is reported by name, never passed over in silence."""

from __future__ import annotations

from stageparity.tiers import NotRun, not_run

__all__ = ["NotRun", "not_run"]
