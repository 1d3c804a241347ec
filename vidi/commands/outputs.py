"""Files that a command writes at its end, checked at its start: an hour's run must not end in a wrong path."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stageparity import atomic
from stageparity.strict import one_line

__all__ = ["apart", "check", "check_folder", "write"]


def check(*names: str | Path | None) -> None:
    """Raises ValueError for a path that cannot become a file: a folder, or one whose folder is absent or read-only."""
    for name in names:
        if name is None:
            continue
        path = Path(name)
        if str(path) == "-":
            raise ValueError("- is no file; give a name, or /dev/stdout")
        if path.is_dir():
            raise ValueError(one_line(f"{path} is a folder; a file name is needed"))
        if atomic.is_stream(path):  # written into, wherever it lies
            if not os.access(path, os.W_OK):
                raise ValueError(one_line(f"{path} cannot be written to"))
            continue
        if not path.parent.is_dir():
            raise ValueError(one_line(f"{path}: there is no folder {path.parent}; make it first"))
        if not os.access(path.parent, os.W_OK):
            raise ValueError(one_line(f"{path}: the folder {path.parent} cannot be written to"))


def check_folder(name: str | Path | None) -> None:
    """Raises ValueError for a path that cannot become a folder: something else is there, or above it."""
    if name is not None:
        if str(name) == "-":
            raise ValueError("- is no folder; choose another name")
        there = next(path for path in (Path(name).absolute(), *Path(name).absolute().parents) if os.path.lexists(path))
        if not there.is_dir():
            raise ValueError(one_line(f"{name}: {there} is no folder; choose another place"))
        if not os.access(there, os.W_OK):
            raise ValueError(one_line(f"{name}: the folder {there} cannot be written to; choose another place"))


def apart(read: str | Path, *names: str | Path | None) -> None:
    """Raises ValueError for an output that is what is ``read`` or lies in that folder, and for two in one place."""
    places = [Path(name).resolve() for name in names if name is not None]
    for number, place in enumerate(places):
        if place.is_relative_to(Path(read).resolve()):
            raise ValueError(one_line(f"{place}: nothing is written into {read}, which is read; choose another place"))
        if place in places[:number] and not place.is_char_device():
            raise ValueError(one_line(f"{place} is named twice; one output would replace the other"))


def write(name: str | Path | None, text: Callable[[], str]) -> None:
    """Write a file whole or not at all; None is no file. Raises OSError."""
    if name is not None:
        atomic.write_text(name, text())
