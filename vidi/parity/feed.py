"""From a golden case to what the model takes: weights loaded by name, arrays as a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stageparity import store
from stageparity.golden import Whole
from stageparity.store import Case
from vidi import precision
from vidi.bridge import position
from vidi.bridge.conv_pool import ConvPool
from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.fast import accelerate
from vidi.fast.model import FastModel
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity.goldens import position_table

__all__ = [
    "DTYPES",
    "Runner",
    "batch_of",
    "install_table",
    "load_model",
    "machine_table",
    "noise_of",
    "to_torch",
    "with_window",
]

Runner = VidiModel | FastModel

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", backend: str = "eager") -> VidiModel:
    """The case's model with the case's weights and the stored position table, cast as the specification says.

    Raises ValueError naming tensors that do not fit.
    """
    config, weights = VidiConfig.from_official(case.config), case.weights()
    _check_fit(case, config, weights)
    _check_info(case, config)
    model = VidiModel(config, backend=backend)
    ours = {names.our_name(official, config): torch.from_numpy(array) for official, array in weights.items()}
    model.load_state_dict({name: x for name, x in ours.items() if name is not None}, strict=True)
    install_table(model, table_of(case))
    if isinstance(model.bridge.image_grid, ConvPool):
        model.bridge.image_grid.everywhere = True
    return precision.cast_model(model, dtype).to(device)


def _check_fit(case: Case, config: VidiConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Before a model is built: a configuration can name any size, its weights cannot."""
    wanted = names.expected(config)
    for name in sorted({*wanted, *weights} - ({names.HEAD} - set(wanted))):
        if name not in wanted:
            raise ValueError(f"{case.name}: the weights hold {name}, which no part of the model reads")
        if name not in weights:
            raise ValueError(f"{case.name}: the weights do not fit the configuration: {name} is missing")
        if (found := weights[name].shape) != (shape := wanted[name].shape) or weights[name].dtype.kind != "f":
            said = f"{name} is {weights[name].dtype.name} {list(found)}, real numbers of shape {list(shape)} are needed"
            raise ValueError(f"{case.name}: the weights do not fit the configuration: {said}")


def _check_info(case: Case, config: VidiConfig) -> None:
    """What a manifest says beside tensors: loss thresholds by name, and decoding runs with their windows."""
    thresholds, runs = case.info.get("loss_thresholds", {}), case.info.get("generate", {})
    if not isinstance(thresholds, dict) or not all(x is None or type(x) in (int, float) for x in thresholds.values()):
        raise ValueError(f"{case.name}: info: loss_thresholds must be numbers, or null, by name")
    named = runs.values() if isinstance(runs, dict) else [None]
    windows = [run.get("window", 0) if isinstance(run, dict) else 0 for run in named]
    may_lack = config.decoder.kind == "mistral"  # null is no window
    if not all((type(x) is int and 0 < x < 1 << 31) or (x is None and may_lack) for x in windows):
        raise ValueError(f"{case.name}: info: generate must name decoding runs, each with a window above 0")


def table_of(case: Case) -> np.ndarray | None:
    """The stored table of position frequencies that a case was made with: its own, the embedded one of its width, or that
    of another case of its set (a recording of decoding alone holds none)."""
    width = case.config["hidden_size"]
    if (own := _own_table(case)) is not None:
        return own
    if (embedded := position_table(width)) is not None:
        return embedded
    others = (store.open_case(ref.folder, ref.name) for ref in store.list_cases(case.folder) if ref.name != case.name)
    return next((t for c in others if c.config["hidden_size"] == width and (t := _own_table(c)) is not None), None)


def _own_table(case: Case) -> np.ndarray | None:
    found = (case.one(variant, "pos.freq") for variant in case.variants)
    table = next((golden.array for golden in found if isinstance(golden, Whole)), None)
    if table is not None and (table.shape, table.dtype) != ((case.config["hidden_size"] // 2,), np.float32):
        raise ValueError(
            f"{case.name}: pos.freq is {table.dtype.name} {list(table.shape)}, half the decoder's width is needed"
        )
    return table


def install_table(model: VidiModel, table_K: np.ndarray | None) -> None:
    """Compute with a stored table of position frequencies. The model's own must be this machine's `frequencies`, which
    is a stage of its own (`pos.freq`); ``None`` keeps it."""
    for module in (model.bridge.pos_h, model.bridge.pos_w, model.bridge.pos_t):
        assert torch.equal(module.freq_K, position.frequencies(2 * len(module.freq_K)))
        if table_K is not None:
            module.freq_K = torch.from_numpy(table_K.copy())


def machine_table(width: int) -> Tensor:
    """What `pos.freq` is on this machine, by the definition of spec §5, (width / 2,) float32."""
    return torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))


def with_window(model: Runner, window: int | None) -> Runner:
    """The same weights under another sliding window (the recordings hold a decoding run with a wider one)."""
    if window == model.config.decoder.sliding_window:
        return model
    plain = model.plain if isinstance(model, FastModel) else model
    decoder = dataclasses.replace(model.config.decoder, sliding_window=window)
    with torch.device("meta"):
        twin = VidiModel(dataclasses.replace(model.config, decoder=decoder), backend=plain.backend)
    twin.load_state_dict(plain.state_dict(), assign=True)
    for axis in ("pos_h", "pos_w", "pos_t"):
        getattr(twin.bridge, axis).freq_K = getattr(plain.bridge, axis).freq_K
    return accelerate(twin) if isinstance(model, FastModel) else twin


def batch_of(inputs: Mapping[str, np.ndarray], ids: str = "inputs.input_ids") -> Batch:
    """The arrays of a case as a batch; ``ids`` names the prompt (a decoding case holds several, without a mask each)."""
    input_ids_BT = torch.from_numpy(inputs[ids])
    samples = range(len(input_ids_BT))
    own_mask = ids == "inputs.input_ids"
    audios = _per_sample(inputs, "inputs.audios", samples)
    sizes = inputs.get("inputs.audio_sizes")
    return Batch(
        input_ids_BT,
        keep_BT=_optional(inputs, "inputs.attention_mask") if own_mask else None,
        images=_per_sample(inputs, "inputs.images", samples),
        audios=audios,
        audio_sizes=tuple(int(size) for size in sizes) if audios is not None and sizes is not None else None,
        labels_BT=_optional(inputs, "inputs.labels") if own_mask else None,
    )


def noise_of(inputs: Mapping[str, np.ndarray]) -> Mapping[str, Tensor]:
    """Training noise that a case gives, by axis ("h", "w", "t_v.b", "t_a.b"); empty for evaluation."""
    prefix = "inputs.pos_noise."
    return {name.removeprefix(prefix): torch.from_numpy(x) for name, x in inputs.items() if name.startswith(prefix)}


def to_torch(array: np.ndarray, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """A golden array as a tensor, real values in ``dtype``."""
    tensor = torch.from_numpy(array.copy()).to(device)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _optional(inputs: Mapping[str, np.ndarray], name: str) -> Tensor | None:
    return torch.from_numpy(inputs[name]) if name in inputs else None


def _per_sample(inputs: Mapping[str, np.ndarray], prefix: str, samples: range) -> tuple[Tensor, ...] | None:
    """One tensor a sample, empty where a sample has none; None where no sample has any."""
    found = {b: torch.from_numpy(inputs[f"{prefix}.{b}"]) for b in samples if f"{prefix}.{b}" in inputs}
    if not found:
        return None
    nothing = next(iter(found.values()))[:0]
    return tuple(found.get(b, nothing) for b in samples)
