"""How long a command takes, as processor time: the same on an idle machine, and no matter of what else runs beside it."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Sequence

__all__ = ["quickest"]


def quickest(command: Sequence[str], tries: int = 3) -> tuple[float, subprocess.CompletedProcess[str]]:
    """The least seconds of some tries, and the last one's result. Raises CalledProcessError where one fails."""
    seconds = []
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=240)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(seconds), done
