"""Faults of the bridge's norms (spec §3.5, §3.9, §4.4-4.5)."""

from __future__ import annotations

from typing import Any

import torch

from stageparity.faults.plant import plant


@plant("vidi.bridge.norm.EPS")
def rms_eps(original: float) -> float:
    """Epsilon 1e-6, the decoder's, in every norm of the bridge (1e-5)."""
    return 1e-6


@plant("vidi.bridge.norm.rms")
def rms_eps_outside(original: Any) -> Any:
    """Epsilon added to the root in place of to the mean square."""
    return lambda x: x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-5)


@plant("vidi.bridge.norm.rms")
def rms_centred(original: Any) -> Any:
    """The mean is subtracted, as in LayerNorm."""
    return lambda x: original(x - x.mean(-1, keepdim=True))


@plant("vidi.bridge.norm.rms")
def rms_as_l2(original: Any) -> Any:
    """The sum of squares in place of their mean."""
    return lambda x: original(x) / x.shape[-1] ** 0.5


@plant("vidi.bridge.norm.RMSNorm.forward")
def norm_weight_plus_one(original: Any) -> Any:
    """The bridge's weight taken as Gemma's, stored minus one."""
    return lambda self, x: original(self, x) * (1 + 1 / self.weight)


@plant("model.bridge.image_norm")
def image_norm_without_weight(original: Any) -> Any:
    """The weight of the image norm is not applied."""
    module = original.__self__
    return lambda x: original(x) / module.weight


@plant("model.bridge.image_norm")
def image_norm_is_audio_norm(original: Any, model: Any) -> Any:
    """Image features normed with the audio norm's weight."""
    return lambda x: model.bridge.audio_norm(x)


@plant("model.bridge.audio_norm")
def audio_norm_is_image_norm(original: Any, model: Any) -> Any:
    """Audio features normed with the image norm's weight."""
    return lambda x: model.bridge.image_norm(x)


@plant("model.bridge.llm_norm.weight")
def llm_norm_one_percent(original: Any) -> Any:
    """The last norm's weight one percent too large."""
    return original * 1.01


@plant("model.bridge.llm_norm.weight")
def llm_norm_initial(original: Any) -> Any:
    """The last norm at its initial value: its weight was not loaded."""
    return torch.full_like(original, 0.028976401314139366)


@plant("model.bridge.llm_norm")
def llm_norm_over_tokens(original: Any) -> Any:
    """The last norm takes its mean over tokens in place of channels."""
    module = original.__self__
    return lambda x: module.weight * x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5)


@plant("model.bridge.llm_norm", case="novideo")
def llm_norm_weight_twice(original: Any) -> Any:
    """The last norm's weight is applied twice; nothing but sound is there to show it."""
    module = original.__self__
    return lambda x: original(x) * module.weight
