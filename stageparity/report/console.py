"""Where a report's lines go: rich's console, or a plain one where rich is not installed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["console"]


def console(*, stderr: bool = False) -> Any:
    """A rich console; without rich an object with what reports ask of one, in one colour.

    FORCE_COLOR and its like mean colours: no cursor is moved but on a terminal.
    """
    try:
        from rich.console import Console
    except ImportError:
        return _Plain(stderr)
    found = Console(stderr=stderr)
    if not found.is_terminal or found.file.isatty():
        return found
    colours: Any = found.color_system
    return Console(stderr=stderr, force_terminal=False, color_system=colours)


class _Plain:
    def __init__(self, stderr: bool) -> None:
        self._file = sys.stderr if stderr else sys.stdout
        self.encoding, self.is_terminal = self._file.encoding or "ascii", self._file.isatty()
        self.width = shutil.get_terminal_size().columns

    def print(self, text: str = "", **style: Any) -> None:
        print(text, file=self._file, flush=True)

    @contextmanager
    def status(self, text: str) -> Iterator[_Plain]:
        self.update(text)
        yield self

    def update(self, text: str) -> None:
        if self.is_terminal:
            print(f"{text} …", file=self._file, flush=True)
