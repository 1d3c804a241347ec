"""Both towers in NumPy float32 with a rounding wherever the specification rounds (§3.1, §4.1), step by step: what enters the
first layer, each layer, Whisper's last norm.

Every step is fed what the model itself had there. From raw inputs on, one bit of one value that rounds apart would move every
later value of its frame, and nothing could be said of a misplaced cast.

Of the attention kernels the one that keeps softmax weights in float32 is asked for: others round them before the values.

Dims: F frames or pieces, L tokens of a tower, K values that one of them is made from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from stageparity.rounding import Step
from stageparity.stage import NotHeld
from vidi.inputs import pixels
from vidi.parity.bench import Site
from vidi.parity.stages.rounded_steps import (
    Array,
    Round,
    as_numpy,
    attend,
    gelu_erf,
    gelu_tanh,
    layer_norm,
    linear,
)

__all__ = ["audio", "vision"]


def vision(s: Site, to: Round) -> list[Step]:
    tower = s.model.vision_tower
    if s.bench.batch.images is None:
        raise NotHeld("the case gives the tower's output in place of frames")
    frames = torch.cat([pixels.normalize(x, s.model.dtype, s.model.device) for x in s.bench.batch.images])
    calls = _calls(s, tower, frames, tower.layers)
    patches_FLK = as_numpy(nn.functional.unfold(frames, tower.config.patch_size, stride=tower.config.patch_size).mT)
    entered = to(linear(patches_FLK, tower.patch_embed, to) + as_numpy(tower.position.weight))
    return [Step("patch embedding and positions", calls[0][1], entered), *_layers(calls, gelu_tanh, to)]


def audio(s: Site, to: Round) -> list[Step]:
    tower = s.model.audio_tower
    if s.bench.batch.audios is None:
        raise NotHeld("the case gives the tower's output in place of sound")
    mel = torch.cat(s.bench.batch.audios).to(s.model.device, s.model.dtype)
    second, *calls, last = _calls(s, tower, mel, (tower.conv2, *tower.layers, tower.norm))
    first = to(gelu_erf(linear(_windows(as_numpy(mel), 1), tower.conv1, to)))
    entered = to(gelu_erf(linear(_windows(as_numpy(second[1]), 2), tower.conv2, to)))
    return [
        Step("first convolution", second[1].mT, first),
        Step("second convolution and positions", calls[0][1], to(entered + as_numpy(tower.position.weight))),
        *_layers(calls, gelu_erf, to),
        Step("last norm", last[2], layer_norm(as_numpy(last[1]), tower.norm, to)),
    ]


def _calls(s: Site, tower: nn.Module, x: Tensor, modules: Iterable[nn.Module]) -> list[tuple[Any, Tensor, Tensor]]:
    """(module, what it was given, what it gave) of each call of ``modules`` in a run of the tower."""
    calls: list[tuple[Any, Tensor, Tensor]] = []
    with contextlib.ExitStack() as undo, torch.no_grad():
        for module in modules:
            kept = module.register_forward_hook(lambda module, given, out: calls.append((module, given[0], out)))
            undo.callback(kept.remove)
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        tower(x, s.model.tower_backend)
    return calls


def _layers(calls: list[tuple[Any, Tensor, Tensor]], activation: Callable[[Array], Array], to: Round) -> list[Step]:
    return [
        Step(f"layer {i}", out, _layer(as_numpy(x), layer, activation, to)) for i, (layer, x, out) in enumerate(calls)
    ]


def _layer(x_FLC: Array, layer: Any, activation: Callable[[Array], Array], to: Round) -> Array:
    attention, n_FLC = layer.attention, layer_norm(x_FLC, layer.norm1, to)
    q, k, v = (
        linear(n_FLC, p, to).reshape(*n_FLC.shape[:2], attention.num_heads, -1)
        for p in (attention.q, attention.k, attention.v)
    )
    heads = attend(q, k, v, to, attention.scale, None)
    x_FLC = to(x_FLC + linear(heads.reshape(x_FLC.shape), attention.out, to))
    hidden = to(activation(linear(layer_norm(x_FLC, layer.norm2, to), layer.mlp.fc1, to)))
    return to(x_FLC + linear(hidden, layer.mlp.fc2, to))


def _windows(x_FCL: Array, stride: int) -> Array:
    """What each place of a convolution of kernel 3 and zero padding 1 is made from, (F, L, C·3)."""
    padded = np.pad(x_FCL, ((0, 0), (0, 0), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3, axis=-1)[:, :, ::stride]
    return np.ascontiguousarray(windows.transpose(0, 2, 1, 3)).reshape(len(x_FCL), -1, 3 * x_FCL.shape[1])
