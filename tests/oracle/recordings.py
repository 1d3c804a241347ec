"""The official recordings as the oracle's tests read them: folders beside the repository, or VIDI_RECORDINGS (1.5 9B)
and VIDI_RECORDINGS_7B."""

import json
import math
import os
import re
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from tests.not_run import not_run

__all__ = [
    "FOLDER", "FOLDER_7B", "SILENT_FORM", "about", "differences", "hold", "load", "pos_freq", "sampled", "stages_of",
    "tables", "weights",
]  # fmt: skip

SHARED = Path(__file__).parents[3] / "shared"
FOLDER = Path(os.environ.get("VIDI_RECORDINGS") or SHARED / "official")
FOLDER_7B = Path(os.environ.get("VIDI_RECORDINGS_7B") or SHARED / "official-7b")
# The release marks a silent sample's keys kept and gates the result; a correct mask does not (spec §7).
SILENT_FORM = re.compile(r"xattn\.\d+\.[va]\.(kv_mask|unpad\.(k|v|cu_seqlens_k|max_seqlen))")


def about(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The json beside the tensors of CASE.DTYPE; NOT RUN where it is absent."""
    _there(folder, f"{name}.json")
    return json.loads((folder / f"{name}.json").read_text())


def load(name: str, folder: Path = FOLDER) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config, tensors) of CASE.DTYPE; NOT RUN where the file is absent. The config is the official dict with the
    towers' configs inside, and what the json says of the case alone."""
    _there(folder, f"{name}.safetensors")
    said = about(name, folder)
    config = said["llm_config"] | {key: said[key] for key in ("vision_config", "audio_config")}
    config |= {key: said["info"][key] for key in ("sliding_window",) if key in said["info"]}
    return config, load_file(folder / f"{name}.safetensors")


@cache
def weights(folder: Path = FOLDER) -> dict[str, np.ndarray]:
    """The recordings' checkpoint."""
    _there(folder, "weights.safetensors")
    return load_file(folder / "weights.safetensors")


def tables(folder: Path) -> dict[str, np.ndarray]:
    """Tables that the release made, where they are recorded: the 7B's."""
    _there(folder, "tables.safetensors")
    return load_file(folder / "tables.safetensors")


def _there(folder: Path, name: str) -> None:
    if not (folder / name).is_file():
        variable = "VIDI_RECORDINGS_7B" if folder == FOLDER_7B else "VIDI_RECORDINGS"
        not_run(f"recording {name} is not in {folder}; set {variable} to the folder that holds it")


def stages_of(recorded: dict[str, np.ndarray]) -> set[str]:
    """Recorded stage ids, without inputs and gradients, and with .sample and its like taken off."""
    names = {re.sub(r"\.(sample|sample_index|row_sum|stats)$", "", name) for name in recorded}
    return {name for name in names if not name.startswith(("inputs.", "grad."))}


def hold(
    got: dict[str, np.ndarray],
    recorded: dict[str, np.ndarray],
    stages: Collection[str],
    allowed: Callable[[str], tuple[float, float]],
) -> str:
    """Hold every stage against the recording: exact ones equal, the others within allowed(stage) = (RMS, max) of the
    stage's RMS. Fails with all that are off; returns the worst of the rest in words."""
    wrong: list[str] = []
    worst = (0.0, 0.0, "")
    for stage in sorted(stages):
        if got[stage].dtype.kind in "bi":
            if not np.array_equal(got[stage], recorded[stage]):
                wrong.append(f"{stage}: not equal")
            continue
        limits = allowed(stage)
        for what, (rms, peak) in sampled(stage, got[stage], recorded).items():
            worst = max(worst, (peak, rms, what))
            if rms > limits[0] or peak > limits[1]:
                wrong.append(f"{what}: RMS {rms:.1e} (allowed {limits[0]:.0e}), max {peak:.1e} ({limits[1]:.0e})")
    assert not wrong, "\n".join(wrong)
    return f"{len(stages)} stages, worst {worst[2]}: max {worst[0]:.2e}, RMS {worst[1]:.2e} of rms"


def pos_freq(width: int) -> np.ndarray:
    """The table w of spec §5 for that decoder width, as torch makes it on the CPU."""
    return torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width)).numpy()


def sampled(stage: str, value: np.ndarray, recorded: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """{what: (RMS, max) of the difference over the stage's RMS} of a recorded stage, whole or as sample, row_sum and
    stats. A row's sum is divided by the root of its length: independent noise then counts as in one entry, an error
    common to the row's entries counts root-length times. Sums over everything count as the mean entry: over millions
    of entries the release's own float32 rounding is no longer independent (weights of a resize, say)."""
    if stage in recorded:
        return {stage: differences(value, recorded[stage])}
    sample, index = recorded[f"{stage}.sample"], recorded[f"{stage}.sample_index"]
    axis = next(i for i, (full, part) in enumerate(zip(value.shape, sample.shape, strict=True)) if full != part)
    row_sum, stats = recorded[f"{stage}.row_sum"], recorded[f"{stage}.stats"]
    rms = float(np.sqrt(stats[2] / value.size))
    sums = value.sum(axis=tuple(i for i in range(value.ndim) if i != axis), dtype=np.float64)
    sums = sums[index] if len(row_sum) < len(sums) else sums
    root_row, size = math.sqrt(value.size / value.shape[axis]), value.size
    own = np.array([value.sum(), np.abs(value).sum(), np.square(value).sum(), value.min(), value.max()])
    units = np.array([size, size, size * rms, 1.0, 1.0])
    return {
        f"{stage}.sample": differences(np.take(value, index, axis=axis), sample, rms),
        f"{stage}.row_sum": differences(sums / root_row, row_sum / root_row, rms),
        f"{stage}.stats": differences(own / units, stats / units, rms),
    }


def differences(got: np.ndarray, wanted: np.ndarray, rms: float | None = None) -> tuple[float, float]:
    """(RMS, max) of the difference over `rms`, by default that of `wanted`. Equal shapes only; a NaN gives inf."""
    assert got.shape == wanted.shape, f"shape {got.shape}, recorded {wanted.shape}"
    wanted = wanted.astype(np.float64)
    difference = np.abs(got.astype(np.float64) - wanted)
    if not np.isfinite(difference).all():
        return math.inf, math.inf
    scale = (float(np.sqrt(np.mean(wanted**2))) if rms is None else rms) or 1.0
    return float(np.sqrt(np.mean(difference**2))) / scale, float(difference.max()) / scale
