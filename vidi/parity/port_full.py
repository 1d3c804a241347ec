"""The full-size case for a foreign port: its inputs as files, how its tensors are to be sketched, and where weights come from.

21 GB of weights are not written with it: they are synthetic, and one command makes them. A port may have a copy of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from stageparity import atomic
from stageparity.golden import GoldenError
from stageparity.manifest import content_sha256
from stageparity.store import Case
from vidi.checkpoint.inspect import inspect_folder
from vidi.config import VidiConfig
from vidi.parity import full
from vidi.parity.goldens import position_table

__all__ = ["MAKE", "check_checkpoint", "inputs_of", "write_inputs"]

MAKE = "vidi synth CHECKPOINT --size full"


def check_checkpoint(case: Case, folder: Path | None) -> None:
    """Raises ValueError for a folder that does not hold the case's weights, as its headers tell; CheckpointError where there is
    no checkpoint in it."""
    if folder is None:
        return
    found = inspect_folder(folder, config=VidiConfig.from_official(case.config))
    wanted = f"version {case.info['weights']}, seed {case.provenance['seed']}"
    if not found.fits or found.synthetic != wanted:
        is_of = f"synthetic weights of {found.synthetic}" if found.synthetic else "no synthetic weights"
        said = is_of if found.fits else found.problems[0].text
        raise ValueError(
            f"{folder}: not the weights of {case.set}/{case.name} ({said}; {wanted} is needed): `{MAKE}` makes them"
        )


def inputs_of(case: Case) -> dict[str, np.ndarray]:
    """Its inputs by name, as those of any case. Frames stand there as bytes and as floats (u8/127.5 - 1), the sound rounded to
    bfloat16, as every run has it. Raises GoldenError where the generator no longer makes what the case was made from."""
    made = full.inputs(VidiConfig.from_official(case.config), case.info["num_frames"])
    for name, wanted in case.info["inputs_sha256"].items():
        if content_sha256(made[name]) != wanted:
            raise GoldenError(f"{case.name}: {name} is not what the case was made from: regenerate the case")
    found = {name.removeprefix("inputs."): x for name, x in made.items()}
    found["audios.0"] = _rounded(found["audios.0"])
    found["images.0"] = found["images_u8.0"].astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    if (freq := position_table(int(case.config["hidden_size"]))) is not None:
        found["pos_freq"] = freq
    return found


def _rounded(x: np.ndarray) -> np.ndarray:
    """float32 values rounded to bfloat16, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def write_inputs(
    case: Case, folder: Path, about: dict[str, Any], rule: dict[str, Any], checkpoint: Path | None
) -> None:
    """`case.json` and `inputs.safetensors`. about: what case.json says of any case; rule: of sketches (`sketched.rule_of`)."""
    said = about | {
        "sketch": rule,
        "weights": {
            "folder": None if checkpoint is None else str(checkpoint.resolve()),
            "missing": f"this case comes without weights: `{MAKE}` makes them (21 GB), --checkpoint CHECKPOINT hands them over; "
            "or let build() load a converted copy of its own",
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    data = save({name: np.ascontiguousarray(x) for name, x in inputs_of(case).items()})
    atomic.write_bytes(folder / "inputs.safetensors", data)
    atomic.write_text(folder / "case.json", json.dumps(said, indent=1) + "\n")
