"""What an answer cost: seconds by phase, and the peak of memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["PHASES", "Costs"]

PHASES = ("loading", "reading", "encoding", "prefill", "decoding")


@dataclass
class Costs:
    """Reading and encoding overlap, and reading overlaps loading: none of them counts its waits for another."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))

    @contextmanager
    def spent(self, phase: str) -> Iterator[None]:
        """Add the time inside to ``phase``."""
        started = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - started

    @staticmethod
    def peak_gib() -> dict[str, float]:
        """The most memory held so far: by this process, and by tensors on the current GPU where one was used."""
        # Kilobytes on Linux, bytes on a Mac.
        unit = 2**30 if sys.platform == "darwin" else 2**20
        found = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        if torch.cuda.is_initialized():
            found["gpu"] = torch.cuda.max_memory_allocated() / 2**30
        return found

    def line(self, reading: str) -> str:
        """All of it on one line; ``reading`` says how the file was read."""
        phases = [f"{name} {value:.2f} s" for name, value in self.seconds.items()]
        phases[PHASES.index("reading")] += f" ({reading})"
        peaks = [f"{value:.2f} GiB ({place})" for place, value in self.peak_gib().items()]
        return f"{', '.join(phases)}; peak {', '.join(peaks)}"
