"""The full-size case at another size: goldens as sketches, what its stages may err by, and the checkpoint that they are of.

`python tests/ports/large.py OUT` makes one of medium size, on which the cost of sketching is measured.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from stageparity import writer
from vidi.checkpoint import synthetic
from vidi.config import VidiConfig
from vidi.parity import full
from vidi.parity.goldens import goldens_dir

__all__ = ["CASE", "Small", "make", "medium"]

CASE = "full/frames60"
FRAMES = 20


@dataclass(frozen=True)
class Small:
    """goldens: a folder for --goldens; checkpoint: one for --checkpoint."""

    goldens: Path
    checkpoint: Path


def medium() -> VidiConfig:
    """About 0.1 billion parameters; a frame is the released 27 × 27 patches, so 14 × 14 tokens."""
    tiny = VidiConfig.tiny()
    vision = replace(
        tiny.vision, image_size=378, patch_size=14, hidden_size=384, num_layers=6, num_heads=6, intermediate_size=1536
    )
    audio = replace(tiny.audio, hidden_size=384, num_layers=4, num_heads=6, intermediate_size=1536)
    decoder = replace(
        tiny.decoder, vocab_size=16_000, hidden_size=1024, intermediate_size=4096, num_layers=6, num_heads=8, num_kv_heads=4,
        head_dim=128, query_pre_attn_scalar=128, sliding_window=4096,
    )  # fmt: skip
    return replace(tiny, vision=vision, audio=audio, decoder=decoder, visual_token_budget=60_000)


def make(folder: Path, config: VidiConfig | None = None) -> Small:
    """Writes both under ``folder``. config: tiny where none is given. What a stage may err by is what the plain path errs on this
    machine."""
    goldens, checkpoint = folder / "goldens", folder / "checkpoint"
    config = config or VidiConfig.tiny()
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


if __name__ == "__main__":
    print(make(Path(sys.argv[1]), medium()))
