"""The full-size case at tiny size: goldens as sketches, what its stages may err by, and the checkpoint that they are of."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from stageparity import writer
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.parity import full
from vidi.parity.goldens import goldens_dir

__all__ = ["CASE", "Small", "make"]

CASE = "full/frames60"
FRAMES = 20


@dataclass(frozen=True)
class Small:
    """goldens: a folder for --goldens; checkpoint: one for --checkpoint."""

    goldens: Path
    checkpoint: Path


def make(folder: Path) -> Small:
    """Writes both under ``folder``. What a stage may err by is what the plain path errs on this machine."""
    goldens, checkpoint = folder / "goldens", folder / "checkpoint"
    config = VidiConfig.tiny()
    made = full.make(config, device="cpu", num_frames=FRAMES)
    (goldens / "full").mkdir(parents=True)
    writer.write_case(goldens / "full", made)
    case = full.FullCase(device="cpu", folder=goldens / "full")
    rows = full.judge(case.golden, *case.passes(case.build()), case.limits, {})
    (goldens / "measured").mkdir()
    (goldens / full.NOISE).write_text(json.dumps({"stages": {row.stage: dict(row.plain) for row in rows if row.plain}}))
    shutil.copyfile(goldens_dir() / "tolerances.toml", goldens / "tolerances.toml")
    synthetic.synth(checkpoint, config, full.SEED, dtype=torch.bfloat16)
    return Small(goldens, checkpoint)
