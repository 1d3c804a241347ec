"""Bugs that are no known fault: nothing may recognise them, however near a known one is."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import Fault

__all__ = ["NEW", "NEW_7B"]


def _new(name: str, target: Any, make: Any, **options: Any) -> Fault:
    return Fault(f"new.{name}", "New.", (target,), make, **options)


def _only(use: str, **change: Any) -> Any:
    """Attention with another option, for self or cross-attention."""

    def make(original: Any) -> Any:
        def attend(call: Any) -> Any:
            own = "self" if call.q_pos_BT is not None else "cross"
            new = {name: value(call) for name, value in change.items()}
            return original(dataclasses.replace(call, **new) if own == use else call)

        return attend

    return make


EAGER, RMS, PROJECTOR = "vidi.attention.eager.attend", "vidi.bridge.norm.rms", "vidi.bridge.projector.Projector.forward"
LAYER = "vidi.decoder.layer.DecoderLayer."
SHARED = [
    _new("projector_gelu_sigmoid", PROJECTOR, lambda o: lambda self, x: self.fc2(_quick(self.fc1(x)))),
    _new("projector_mish", PROJECTOR, lambda o: lambda self, x: self.fc2(nnf.mish(self.fc1(x)))),
    _new("rms_of_mean_magnitude", RMS, lambda o: lambda x: x / (x.abs().mean(-1, keepdim=True) + 1e-5)),
    _new("cross_scale_three_percent", EAGER, _only("cross", scale=lambda call: call.scale * 1.03)),
    _new("self_scale_two_percent", EAGER, _only("self", scale=lambda call: call.scale * 0.98)),
    _new("window_two_long", "vidi.attention.mask.sees", lambda o: lambda q, k, w=None: o(q, k, w and w + 2)),
    _new("theta", "vidi.attention.rope.inverse_frequencies", lambda o: lambda head, theta, dtype: o(head, 5e5, dtype)),
    _new("one_channel_lost", "model.decoder.norm.weight", lambda o: torch.cat([o[:-1], -torch.ones_like(o[-1:])])),
    _new("bias_halved", "model.bridge.image_projector.fc2.bias", lambda o: o / 2),
    _new(
        "half_of_the_table",
        "model.decoder.embed.weight",
        lambda o: torch.cat([o[: len(o) // 2], o[len(o) // 2 :] * 1.01]),
    ),
    _new("streams_halved", LAYER + "update_stream", lambda o: lambda self, x, *r: x + (o(self, x, *r) - x) / 2),
    _new("last_frame_first", "vidi.bridge.position.add[t]", lambda o: lambda x, embed: o(x, embed.flip(0))),
    _new("trimmed_by_two", "vidi.bridge.audio.trim", lambda o: lambda t, p, n: o(t, p, n).roll(2, 1)),
]
NEW = [
    *SHARED,
    _new("pad_by_reflecting", "vidi.bridge.fold.pad", lambda o: lambda x, pool=2: _reflected(o(x, pool))),
    _new("softcap_of_49", EAGER, _only("cross", softcap=lambda call: 49.0)),
    _new("softcap_of_45_in_text", EAGER, _only("self", softcap=lambda call: 45.0)),
    _new("head_softcap_of_31", "vidi.decoder.decoder.softcap", lambda o: lambda x, cap: o(x, 31.0)),
]
NEW_7B = [dataclasses.replace(fault, name=f"{fault.name}_7b", case="small-7b/base") for fault in SHARED]


def _quick(x: Any) -> Any:
    return x * torch.sigmoid(1.702 * x)


def _reflected(grid: Any) -> Any:
    grid = grid.clone()
    grid[..., -1, :], grid[..., :, -1] = grid[..., -3, :], grid[..., :, -3]
    return grid
