"""The one exception of this package."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CheckpointError", "printable"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: says which file, which tensor where one is meant, and what to do.

    Every broken or hostile folder ends in this exception and in no other.
    """

    def __init__(self, problem: str, *, file: str | Path | None = None, tensor: str | None = None) -> None:
        self.problem, self.file, self.tensor = problem, None if file is None else str(file), tensor
        where = [self.file or "", f"tensor {_short(tensor)}" if tensor is not None else ""]
        super().__init__(printable(": ".join([*filter(None, where), problem])))


def printable(text: str) -> str:
    """One line that a terminal can show: names come out of files, and control characters in them are escaped."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _short(name: str, limit: int = 200) -> str:
    return name if len(name) <= limit else f"{name[:limit]}… ({len(name)} characters)"
