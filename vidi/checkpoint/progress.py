"""A progress bar for loading and writing, on the terminal's error stream."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["bar"]


@contextmanager
def bar(title: str, *, shown: bool | None = None) -> Iterator[Callable[[int, int, str], None] | None]:
    """Yields a callback (bytes done, bytes in all, tensor name), or None where no terminal is there to show it."""
    if shown is None:
        shown = sys.stderr.isatty()
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[name]}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, name="")
        yield lambda done, total, name: progress.update(task, completed=done, total=total, name=name)
