"""The official recordings as the oracle's tests read them: a folder beside the repository, or VIDI_RECORDINGS."""

import json
import math
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from tests.not_run import not_run

__all__ = ["differences", "load", "pos_freq", "sampled", "weights"]

FOLDER = Path(os.environ.get("VIDI_RECORDINGS") or Path(__file__).parents[3] / "shared" / "official")


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(config, tensors) of CASE.DTYPE; NOT RUN where the file is absent. The config is the official dict with the
    towers' configs inside."""
    if not (FOLDER / f"{name}.safetensors").is_file():
        not_run(f"recording {name} is not in {FOLDER}; set VIDI_RECORDINGS to the folder that holds it")
    about = json.loads((FOLDER / f"{name}.json").read_text())
    config = about["llm_config"] | {key: about[key] for key in ("vision_config", "audio_config")}
    return config, load_file(FOLDER / f"{name}.safetensors")


@cache
def weights() -> dict[str, np.ndarray]:
    """The recordings' checkpoint."""
    if not (FOLDER / "weights.safetensors").is_file():
        not_run(f"weights.safetensors is not in {FOLDER}; set VIDI_RECORDINGS")
    return load_file(FOLDER / "weights.safetensors")


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
