"""Faults of pixels and towers (spec §2, §3.1, §4.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant


@plant("vidi.inputs.pixels.normalize")
def pixels_from_zero_to_one(original: Any) -> Any:
    """Pixels in [0, 1]: the mean is never subtracted."""
    return lambda frames, dtype, device: original(frames, dtype, device) / 2 + 0.5


@plant("vidi.inputs.pixels.normalize")
def pixels_over_256(original: Any) -> Any:
    """Pixel values divided by 256 in place of 255."""
    return lambda frames, dtype, device: ((original(frames, dtype, device) + 1) * (255 / 256)) - 1


@plant("vidi.inputs.pixels.normalize")
def pixels_imagenet_mean(original: Any) -> Any:
    """Normalised by ImageNet's means and deviations in place of 0.5."""

    def normalize(frames: Any, dtype: Any, device: Any) -> Any:
        mean, std = (
            torch.tensor(x, dtype=dtype)[:, None, None] for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        )
        return (original(frames, dtype, device) / 2 + 0.5 - mean) / std

    return normalize


@plant("vidi.inputs.pixels.normalize")
def channels_bgr(original: Any) -> Any:
    """Blue, green, red."""
    return lambda frames, dtype, device: original(frames, dtype, device).flip(1)


@plant("vidi.inputs.pixels.normalize")
def pixels_transposed(original: Any) -> Any:
    """Height and width of a frame exchanged."""
    return lambda frames, dtype, device: original(frames, dtype, device).transpose(-1, -2)


@plant("vidi.towers.siglip.VisionTower.forward")
def hidden_state_last(original: Any) -> Any:
    """Hidden state -1: the last layer runs too."""
    return lambda self, images, backend="eager": self.layers[-1](original(self, images, backend), backend)


@plant("vidi.towers.siglip.VisionTower.forward")
def hidden_state_minus_three(original: Any) -> Any:
    """Hidden state -3: a layer too few."""

    def forward(self: Any, images: Any, backend: str = "eager") -> Any:
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.position.weight
        for layer in self.layers[:-2]:
            x = layer(x, backend)
        return x

    return forward


@plant("vidi.towers.siglip.VisionTower.forward")
def post_norm_applied(original: Any) -> Any:
    """The tower's last norm, which the checkpoint holds and nothing reads, is applied."""
    return lambda self, images, backend="eager": self.unused.post_norm(original(self, images, backend))


@plant("model.vision_tower.position.weight")
def positions_transposed(original: Any) -> Any:
    """The tower's learned positions stand column by column."""
    side = int(len(original) ** 0.5)
    return original.view(side, side, -1).transpose(0, 1).reshape(original.shape).contiguous()


@plant("model.vision_tower.position.weight")
def positions_shifted(original: Any) -> Any:
    """Learned positions off by one patch, as with a class token in front."""
    return original.roll(1, 0)


@plant("model.vision_tower.layers.*.mlp.activation")
def siglip_gelu_erf(original: Any) -> Any:
    """Exact GELU in SigLIP, which uses the tanh form."""
    return nnf.gelu


@plant("model.vision_tower.layers.*.norm1.eps")
def siglip_eps(original: float) -> float:
    """LayerNorm epsilon of Whisper (1e-5) in SigLIP (1e-6)."""
    return 1e-5


@plant("model.vision_tower.layers.*.attention.scale")
def siglip_scale(original: float) -> float:
    """Tower attention scaled by the whole width, not by a head's."""
    return 8**-0.5


@plant("vidi.towers.layer.TowerLayer.forward")
def tower_post_norm(original: Any) -> Any:
    """LayerNorm after the residual in place of before the branch."""

    def forward(self: Any, x: Any, backend: str) -> Any:
        x = self.norm1(x + self.attention(x, backend))
        return self.norm2(x + self.mlp(x))

    return forward


@plant("vidi.towers.layer.TowerLayer.forward")
def tower_parallel(original: Any) -> Any:
    """Attention and MLP both read the layer's input."""
    return lambda self, x, backend: x + self.attention(self.norm1(x), backend) + self.mlp(self.norm2(x))


@plant("vidi.towers.layer.Attention.forward")
def tower_heads_interleaved(original: Any) -> Any:
    """Heads cut as (width, heads) in place of (heads, width)."""
    from vidi.attention import dispatch
    from vidi.attention.call import AttentionCall

    def forward(self: Any, x: Any, backend: str) -> Any:
        q, k, v = (p(x).unflatten(-1, (-1, self.num_heads)).transpose(-1, -2) for p in (self.q, self.k, self.v))
        return self.out(dispatch.attend(AttentionCall(q, k, v, self.scale), backend).flatten(-2))

    return forward


@plant("vidi.attention.sdpa.attend[tower]")
def tower_causal(original: Any) -> Any:
    """Tower attention causal."""

    def attend(call: Any) -> Any:
        places = torch.arange(call.q_BTNH.shape[1]).expand(len(call.q_BTNH), -1)
        return original(dataclasses.replace(call, q_pos_BT=places))

    return attend


@plant("model.audio_tower.norm")
def whisper_without_last_norm(original: Any) -> Any:
    """The encoder's output before its last LayerNorm."""
    return lambda x: x


@plant("model.audio_tower.norm.eps")
def whisper_eps(original: float) -> float:
    """LayerNorm epsilon of SigLIP (1e-6) in Whisper's last norm (1e-5)."""
    return 1e-6


@plant("model.audio_tower.position.weight")
def whisper_positions_reversed(original: Any) -> Any:
    """Positions from the end of the piece."""
    return original.flip(0)


@plant("model.audio_tower.layers.*.mlp.activation")
def whisper_gelu_tanh(original: Any) -> Any:
    """GELU in its tanh form in Whisper, which uses erf."""
    return lambda x: nnf.gelu(x, approximate="tanh")


@plant("model.audio_tower.conv2")
def whisper_conv_late(original: Any) -> Any:
    """The strided convolution starts one mel frame late."""
    return lambda x: original(x.roll(-1, -1))


@plant("vidi.towers.whisper.AudioTower.forward")
def whisper_stem_without_second_gelu(original: Any) -> Any:
    """No GELU behind the second convolution."""

    def forward(self: Any, mel: Any, backend: str = "eager") -> Any:
        x = self.conv2(nnf.gelu(self.conv1(mel))).transpose(1, 2) + self.position.weight
        for layer in self.layers:
            x = layer(x, backend)
        return self.norm(x)

    return forward


@plant("vidi.towers.whisper.AudioTower.forward")
def whisper_layer_short(original: Any) -> Any:
    """The encoder read at hidden state -2, as the vision tower is."""

    def forward(self: Any, mel: Any, backend: str = "eager") -> Any:
        x = nnf.gelu(self.conv2(nnf.gelu(self.conv1(mel)))).transpose(1, 2) + self.position.weight
        for layer in self.layers[:-1]:
            x = layer(x, backend)
        return self.norm(x)

    return forward
