"""How the keys of a few text rows are split over programs, so that the whole device reads them at once.

A program handles one kv head and one run of keys of one branch (text, visual, audio); a second kernel joins the partial
results. The splits depend on capacities alone, never on how far the text has come: a captured graph stays valid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KEY_STEP", "Plan", "make"]

MANY_KEYS = 90_000
KEY_STEP = 64  # runs of keys start at multiples of this: one tile of the kernel


@dataclass(frozen=True)
class Plan:
    """Runs of keys of one sample.

    text_keys: keys of the text cache that may be seen. visual, audio: (first, stop) in the cross cache.
    runs_P3: (programs, 3) int32 on the device: branch, first key, stop. ends: programs up to the end of each branch.
    """

    text_keys: int
    visual: tuple[int, int]
    audio: tuple[int, int]
    runs_P3: Tensor
    ends: tuple[int, int, int]


def make(
    text_keys: int,
    visual: tuple[int, int],
    audio: tuple[int, int],
    device: torch.device,
    programs: int | None = None,
) -> Plan:
    """Split the keys into about ``programs`` runs of equal length, each branch by itself.

    With 8 kv heads the default is two programs for each of an H100's 132 processors, twice that for very many keys.
    """
    spans = ((0, text_keys), visual, audio)
    total = sum(stop - first for first, stop in spans)
    longest = _tiles(total, programs or (33 if total < MANY_KEYS else 66))
    runs, ends = [], []
    for branch, (first, stop) in enumerate(spans):
        if stop > first:
            # Even pieces: a short remainder would leave its program idle while others still read.
            size = _tiles(stop - first, -(-(stop - first) // longest))
            runs += [(branch, at, min(at + size, stop)) for at in range(first, stop, size)]
        ends.append(len(runs))
    table = torch.tensor(runs, dtype=torch.int32).to(device)
    return Plan(text_keys, visual, audio, table, (ends[0], ends[1], ends[2]))


def _tiles(keys: int, pieces: int) -> int:
    """Keys of one of ``pieces`` equal runs, rounded up to whole tiles."""
    size = max(1, -(-keys // pieces))
    return size + -size % KEY_STEP
