"""Where the goldens lie, and what is kept in them in another form than it is used in. No torch, no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from stageparity import manifest, store
from stageparity.store import Case, CaseRef
from stageparity.strict_safetensors import read_safetensors

__all__ = ["MODELS", "goldens_dir", "inputs_of", "of_model", "position_table", "synthetic_tower"]

MODELS = {"9b": "dattn_gemma2", "7b": "dattn_mistral"}  #: what a user calls a model -> model_type of its configuration


def goldens_dir(given: str | Path | None = None) -> Path:
    """The golden folder: the given one, the packaged `vidi/goldens`, or `goldens/` beside the package. Raises GoldenError."""
    package = Path(__file__).resolve().parents[1]
    return store.goldens_dir(*([given] if given is not None else [package / "goldens", package.parent / "goldens"]))


def of_model(refs: Iterable[CaseRef], model: str | None) -> list[CaseRef]:
    """The cases of one model (a key of MODELS; None: all). Raises ValueError where there is none."""
    refs = list(refs)
    if model is None:
        return refs
    configs = {ref: manifest.parse(ref.folder / f"{ref.name}.json")["config"] for ref in refs}
    found = [ref for ref in refs if configs[ref].get("model_type", MODELS["9b"]) == MODELS[model]]
    if not found:
        raise ValueError(f"--model {model}: none of the {len(refs)} cases chosen is of that model")
    return found


def position_table(width: int, goldens: Path | None = None) -> np.ndarray | None:
    """The stored table of position frequencies for decoder width ``width``, (width / 2,) float32; None where none is.

    One ulp of it is 6e-4 rad at the far end of time, and torch's exp differs between processors, so every run computes
    with the stored one (spec §5).
    """
    path = (goldens or goldens_dir()) / "pos_freq.safetensors"
    return read_safetensors(path).get(str(width)) if path.is_file() else None


def synthetic_tower(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Tower output (F, patches, C) float32 of a case without frames: feat_table[feat_index]/64 · feat_scale."""
    table, index, scale = (inputs[f"inputs.feat_{part}"] for part in ("table", "index", "scale"))
    return table[index].astype(np.float32) / np.float32(64.0) * scale[:, None, None].astype(np.float32)


def inputs_of(case: Case) -> dict[str, np.ndarray]:
    """Input arrays of a case by id. Frames kept as bytes only are given as `inputs.images.B` too (u8/127.5 - 1, float32)."""
    found = dict(case.inputs)
    for name in case.inputs:
        twin = name.replace("images_u8", "images")
        if twin not in found:
            found[twin] = found[name].astype(np.float32) / np.float32(127.5) - np.float32(1.0)
    return {name: found[name] for name in sorted(found)}
