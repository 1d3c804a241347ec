"""The model's own code at the released sizes, fed what the oracle is fed: built by `VidiConfig.full()`, less the layers that
repeat and most of the vocabulary. The plain path, and the fast one by its twins."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.full_width import truth, weights
from vidi.attention.unpad import Rows
from vidi.bridge import audio, fold, visual
from vidi.bridge.bridge import Bridge
from vidi.cache import LayerTextCache
from vidi.checkpoint import names
from vidi.config import VidiConfig
from vidi.decoder.layer import DecoderLayer
from vidi.fast import accelerate
from vidi.fast.bridge import accelerated
from vidi.fast.towers import FastAudioTower, FastVisionTower
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.stream import Stream
from vidi.tap import Tap

__all__ = ["DTYPES", "FAST", "PARTS", "Model", "build", "forget", "released", "run", "window_of"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Found = dict[str, Tensor]


def released() -> VidiConfig:
    """The released configuration; all 42 layers count in part "window" alone."""
    full = VidiConfig.full()
    return dataclasses.replace(
        full,
        vision=dataclasses.replace(full.vision, num_layers=2),  # the last one is never computed
        audio=dataclasses.replace(full.audio, num_layers=1),
        decoder=dataclasses.replace(full.decoder, num_layers=2, vocab_size=weights.VOCABULARY),
    )


@cache
def _cast(dtype: str) -> Mapping[str, Tensor]:
    """The oracle's own tensors under the model's names; position MLPs stay float32 (§5)."""
    return {_ours(name): _in(name, array, dtype) for name, array in truth.held("all").items()}


@cache
def _weights(part: str, dtype: str) -> Mapping[str, Tensor]:
    """As `_cast`, with what is another tensor in this part."""
    known, own = truth.held("all"), truth.held(part)
    return {**_cast(dtype), **{_ours(n): _in(n, own[n], dtype) for n in own if own[n] is not known[n]}}


def _ours(official: str) -> str:
    name = names.our_name(official)
    assert name is not None, official
    return name


def _in(official: str, array: np.ndarray, dtype: str) -> Tensor:
    value = torch.from_numpy(array)
    return value if "mm_rand_pos_" in official else value.to(DTYPES[dtype])


def build(part: str, dtype: str, config: VidiConfig | None = None) -> VidiModel:
    """A model of ``config`` (the released one) over a part's one copy of the weights in ``dtype``. What is never computed (the
    vision tower's last layer and head) stays without memory."""
    with torch.device("meta"):
        model = VidiModel(config or released())
    wrong = model.load_state_dict(dict(_weights(part, dtype)), strict=False, assign=True)
    assert not wrong.unexpected_keys
    assert all(name.startswith(("vision_tower.unused.", "vision_tower.layers.1.")) for name in wrong.missing_keys)
    return model.requires_grad_(False)


def forget() -> None:
    """Gives the memory back."""
    _cast.cache_clear()
    _weights.cache_clear()


def _collect(found: dict[str, list[Tensor]]) -> Tap:
    def tap(stage: str, value: Tensor) -> Tensor:
        found.setdefault(stage, []).append(value.detach().clone())
        return value

    return tap


def _joined(found: Mapping[str, list[Tensor]]) -> Found:
    return {stage: parts[0] if len(parts) == 1 else torch.cat(parts) for stage, parts in found.items()}


def _tower(tower: Any, path: str, pieces: Tensor) -> Found:
    seen: Found = {}
    first = tower.layers[0]
    hooks = [
        first.register_forward_pre_hook(lambda _, args: seen.update({f"{path}.embedding": args[0].clone()})),
        first.attention.register_forward_hook(lambda _, __, out: seen.update({f"{path}.attention": out.clone()})),
    ]
    seen[f"{path}.tower"] = tower(pieces, "sdpa")
    for hook in hooks:
        hook.remove()
    return seen


def _visual(model: VidiModel, given: Mapping[str, Tensor], bridge: Bridge | None = None) -> Found:
    found: dict[str, list[Tensor]] = {}
    features, signal = given["tower"], torch.ones(1, dtype=torch.bool)
    visual.encode(bridge or model.bridge, [features], [len(features)], signal, model.config, tap=_collect(found))
    return _joined(found)


def _resized(model: VidiModel, given: Mapping[str, Tensor]) -> Found:
    (group,) = visual.groups([1000], model.config)
    grid = fold.resize(fold.pad(given["tower"], model.config.image_pool_size), group.side)
    return {"vision.resize": grid, "vision.space_to_depth": fold.space_to_depth(grid, model.config.image_pool_size)}


def _sound(model: VidiModel, given: Mapping[str, Tensor], bridge: Bridge | None = None) -> Found:
    found: dict[str, list[Tensor]] = {}
    size, signal = int(given["size"]), torch.ones(1, dtype=torch.bool)
    audio.encode(bridge or model.bridge, given["tower"], [1], [size], signal, model.config, tap=_collect(found))
    return _joined(found)


def _decoder(model: VidiModel, given: Mapping[str, Tensor]) -> Found:
    found: dict[str, list[Tensor]] = {}
    streams = {m: Stream(given[name], given[f"keep.{name}"]) for m, name in (("v", "image"), ("a", "audio"))}
    rows = Rows(given["keep.text"])
    embeds = model.decoder.embed_tokens(given["ids"], rows.keep_BL)
    found["text.embeds"] = [embeds]
    normed = model.decoder(embeds, rows, streams, last_stream=True, tap=_collect(found))
    found["logits"] = [model.decoder.logits(normed)]
    return _joined({stage: parts for stage, parts in found.items() if not stage.startswith("xattn")})


def _fast_decoder(model: VidiModel, given: Mapping[str, Tensor]) -> Found:
    found: dict[str, list[Tensor]] = {}
    streams = {m: Stream(given[name], given[f"keep.{name}"]) for m, name in (("v", "image"), ("a", "audio"))}
    batch = Batch(given["ids"], given["keep.text"])
    accelerate(model).decode_text(batch, streams, last_stream=True, tap=_collect(found))
    return _joined({stage: parts for stage, parts in found.items() if not stage.startswith("xattn")})


def window_of(model: VidiModel, given: Mapping[str, Tensor], layers: Iterable[int]) -> Found:
    """Three rows beside a filled text cache, through `text_to_text` of layers of the released decoder: layer i computes
    with the weights of layer i % 2."""
    found: Found = {}
    config, past = dataclasses.replace(model.config.decoder, num_layers=42), given["k"].shape[1]
    length = past + given["n"].shape[1]
    text = model.decoder.text_rows(torch.arange(past, length)[None], None, "eager", given["n"].dtype)
    whole = model.decoder.text_rows(torch.arange(length)[None], None, "eager", given["n"].dtype)
    found["rope.cos"], found["rope.sin"] = whole.cos_BTH, whole.sin_BTH
    for i in layers:
        with torch.device("meta"):
            layer = DecoderLayer(config, i)
        layer.load_state_dict(model.decoder.layers[i % 2].state_dict(), assign=True)
        held = LayerTextCache(*(torch.cat([given[name], torch.zeros_like(given[name][:, :3])], 1) for name in "kv"))
        found[f"layer.{i}.t2t"] = layer.text_to_text(given["n"], text, held)
    return found


Model = Callable[[VidiModel, Mapping[str, Tensor]], Found]
PARTS: Mapping[str, Model] = {
    "vision": lambda model, given: _tower(model.vision_tower, "vision", given["frames"]),
    "audio": lambda model, given: _tower(model.audio_tower, "audio", given["mel"]),
    "visual": _visual,
    "resized": _resized,
    "sound": _sound,
    "decoder": _decoder,
    "window": lambda model, given: window_of(model, given, (0, 1)),
}
FAST: Mapping[str, Model] = {
    "vision": lambda model, given: {"vision.tower": FastVisionTower(model.vision_tower)(given["frames"])},
    "audio": lambda model, given: {"audio.tower": FastAudioTower(model.audio_tower)(given["mel"])},
    "visual": lambda model, given: _visual(model, given, accelerated(model.bridge)),
    "sound": lambda model, given: _sound(model, given, accelerated(model.bridge)),
    "decoder": _fast_decoder,
}


@torch.no_grad()
def run(part: str, dtype: str, model: VidiModel, compute: Model) -> Found:
    """A part's stages, as ``compute`` (an entry of PARTS or FAST) gets them of the model, in ``dtype``."""
    given = {name: torch.from_numpy(copy.copy(x)) for name, x in truth.fed(part).items()}
    given = {name: x.to(DTYPES[dtype]) if x.is_floating_point() else x for name, x in given.items()}
    return compute(model, given)
