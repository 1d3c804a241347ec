"""The one exception of this package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CheckpointError"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, which tensor where one is meant, and what to do.

    Every broken or hostile folder ends in this exception and in no other.
    """

    def __init__(self, problem: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.problem, self.file, self.tensor = problem, None if file is None else str(file), tensor
        where = [self.file or "", f"tensor {_short(tensor)}" if tensor is not None else ""]
        super().__init__(": ".join([*filter(None, where), problem]))


def _short(name: str, limit: int = 200) -> str:
    """Names come out of files: bounded, and quoted where they hold anything unprintable."""
    name = name if len(name) <= limit else f"{name[:limit]}… ({len(name)} characters)"
    return name if name.isprintable() else ascii(name)
