"""Faults of position embeddings (spec §5, §3.6)."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant
from vidi.bridge import norm

TIME = 10000


@plant("vidi.bridge.position.frequencies", rebuild=True)
def frequencies_without_two(original: Any) -> Any:
    """w_k = exp(k·(-ln 10000/D)): the factor 2 is lost."""
    return lambda width: original(width).sqrt()


@plant("vidi.bridge.position.frequencies", rebuild=True)
def frequencies_to_the_end(original: Any) -> Any:
    """Frequencies reach 1/10000 exactly: divided by D - 2 in place of D."""
    return lambda width: torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / (width - 2)))


@plant("vidi.bridge.position.frequencies", rebuild=True)
def frequencies_in_float64(original: Any) -> Any:
    """The table from double precision, rounded once: an ulp here and there."""
    return lambda width: torch.exp(torch.arange(0, width, 2).double() * (-math.log(10000.0) / width)).float()


@plant("vidi.bridge.position.frequencies", rebuild=True)
def frequencies_by_power(original: Any) -> Any:
    """The table as 1 / 10000^(2k/D)."""
    return lambda width: 1.0 / 10000.0 ** (torch.arange(0, width, 2).float() / width)


@plant("vidi.bridge.position.positions[t]")
def time_in_frames(original: Any) -> Any:
    """Time counts frames 0, 1, 2, … in place of spanning 0 … 9999."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        return torch.arange(length, dtype=dtype) if extent == TIME else original(length, extent, dtype, noise)

    return positions


@plant("vidi.bridge.position.positions")
def extent_off_by_one(original: Any) -> Any:
    """Positions span 0 … P in place of 0 … P - 1."""
    return lambda length, extent, dtype, noise=None: original(length, extent + 1, dtype, noise)


@plant("vidi.bridge.position.positions")
def length_off_by_one(original: Any) -> Any:
    """Positions i/L in place of i/(L - 1): the last never reaches the end."""
    return lambda length, extent, dtype, noise=None: original(length, extent, dtype, noise) * ((length - 1) / length)


@plant("vidi.bridge.position.positions")
def positions_from_one(original: Any) -> Any:
    """Positions shifted by one."""
    return lambda length, extent, dtype, noise=None: original(length, extent, dtype, noise) + 1


@plant("vidi.bridge.position.positions")
def positions_reversed(original: Any) -> Any:
    """Positions from the end."""
    return lambda length, extent, dtype, noise=None: original(length, extent, dtype, noise).flip(0)


@plant("vidi.bridge.position.positions", case="train")
def noise_ignored(original: Any) -> Any:
    """Training without the noise on positions."""
    return lambda length, extent, dtype, noise=None: original(length, extent, dtype)


@plant("vidi.bridge.position.positions", case="train")
def noise_not_clipped(original: Any) -> Any:
    """The noisy index leaves [0, L - 1]."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        index = torch.arange(length, dtype=dtype) + (0 if noise is None else noise.to(dtype))
        return index / (length - 1) * (extent - 1)

    return positions


@plant("vidi.bridge.position.positions", case="train")
def noise_after_scaling(original: Any) -> Any:
    """The noise is added to the scaled position in place of the index."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        return (original(length, extent, dtype) + noise.to(dtype)).clamp(0, extent - 1)

    return positions


@plant("vidi.bridge.position.sinusoid")
def halves_not_interleaved(original: Any) -> Any:
    """All sines, then all cosines."""

    def sinusoid(p: Any, freq: Any) -> Any:
        angle = p[:, None] * freq[None, :]
        return torch.cat((angle.sin(), angle.cos()), dim=-1)

    return sinusoid


@plant("vidi.bridge.position.sinusoid")
def cosine_first(original: Any) -> Any:
    """Even columns cosine, odd columns sine."""
    return lambda p, freq: original(p, freq).unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


@plant("vidi.bridge.position.sinusoid")
def sinusoid_in_turns(original: Any) -> Any:
    """Angles in turns: multiplied by 2π."""
    return lambda p, freq: original(p * (2 * math.pi), freq)


@plant("vidi.bridge.position.PositionEmbedding.forward")
def mlp_gelu_tanh(original: Any) -> Any:
    """GELU in its tanh form in the position MLPs."""
    from vidi.bridge import position

    def forward(self: Any, length: int, noise: Any = None) -> Any:
        p = position.positions(length, self.extent, self.fc1.weight.dtype, noise)
        table = position.sinusoid(p, self.freq_K.to(self.fc1.weight))
        return self.fc2(nnf.gelu(self.fc1(table), approximate="tanh"))

    return forward


@plant("vidi.bridge.position.PositionEmbedding.forward")
def mlp_skipped(original: Any) -> Any:
    """The bare sinusoid in place of its MLP."""
    from vidi.bridge import position

    def forward(self: Any, length: int, noise: Any = None) -> Any:
        p = position.positions(length, self.extent, self.fc1.weight.dtype, noise)
        return position.sinusoid(p, self.freq_K.to(self.fc1.weight))

    return forward


@plant("model.bridge.pos_h", "model.bridge.pos_w")
def height_and_width_exchanged(original: Any, model: Any) -> Any:
    """The height's MLP embeds the width, the width's the height."""
    other = model.bridge.pos_w if original.__self__ is model.bridge.pos_h else model.bridge.pos_h
    return lambda *given: type(other).forward(other, *given)


@plant("model.bridge.pos_w.fc1.bias")
def width_without_bias(original: Any) -> Any:
    """The first bias of the width's MLP left out."""
    return torch.zeros_like(original)


@plant("vidi.bridge.position.embed[t_a]")
def audio_time_in_visual_steps(original: Any) -> Any:
    """An audio token's time counts from the end of a grid one longer: the audio is taken for one frame more."""
    return lambda module, axis, length, noise, dtype: (
        original(module, axis, length + 1, None, dtype)[:length]
        if axis.startswith("t_a")
        else original(module, axis, length, noise, dtype)
    )


@plant("vidi.bridge.position.embed[t_a]")
def audio_time_stands_still(original: Any) -> Any:
    """Every audio token stands at time 0."""
    return lambda module, axis, length, noise, dtype: (
        original(module, axis, 1, None, dtype).expand(length, -1).contiguous()
        if axis.startswith("t_a")
        else original(module, axis, length, noise, dtype)
    )


@plant("vidi.bridge.position.embed[t_v]")
def time_of_all_videos(original: Any) -> Any:
    """Time is not started anew for each video: a video's frames count among those of a longer one."""
    return lambda module, axis, length, noise, dtype: (
        original(module, axis, length + 1, None, dtype)[1:]
        if axis.startswith("t_v")
        else original(module, axis, length, noise, dtype)
    )


def _axis(embed: Any) -> str:
    """The axis that an embedding lies along, by its shape: (1, h, 1, D), (1, 1, w, D), (F, 1, 1, D), (A, D)."""
    if embed.ndim == 2:
        return "t_a"
    return "hw"[embed.shape[2] > 1] if max(embed.shape[1:3]) > 1 else "t"


def _stretched(x: Any, embed: Any) -> Any:
    """An embedding along one side, spread over all tokens of a frame row by row: (1, h, w, D)."""
    height, width = x.shape[1:3]
    line = embed.flatten(0, 2).T[None]
    return nnf.interpolate(line, size=height * width, mode="linear", align_corners=True)[0].T.view(1, height, width, -1)


def _on(axis: str, original: Any, wrong: Any) -> Any:
    return lambda x, embed: wrong(x, embed) if _axis(embed) == axis else original(x, embed)


@plant("vidi.bridge.position.add")
def embedding_not_normed(original: Any) -> Any:
    """The embeddings are added without rms()."""
    return lambda x, embed: x + embed


@plant("vidi.bridge.position.add")
def sum_normed(original: Any) -> Any:
    """The sum is normed in place of the embedding."""
    return lambda x, embed: norm.rms(x + embed)


@plant("vidi.bridge.position.add[h]")
def height_dropped(original: Any) -> Any:
    """Misreading: no embedding along the height."""
    return _on("h", original, lambda x, embed: x)


@plant("vidi.bridge.position.add[w]")
def width_dropped(original: Any) -> Any:
    """Misreading: no embedding along the width."""
    return _on("w", original, lambda x, embed: x)


@plant("vidi.bridge.position.add[t]")
def time_dropped(original: Any) -> Any:
    """No embedding along the time."""
    return _on("t", original, lambda x, embed: x)


@plant("vidi.bridge.position.add[t_a]")
def audio_time_dropped(original: Any) -> Any:
    """No time embedding for audio."""
    return _on("t_a", original, lambda x, embed: x)


@plant("vidi.bridge.position.add[h]")
def height_along_width(original: Any) -> Any:
    """The height's embedding is added along the width."""
    return _on("h", original, lambda x, embed: original(x, embed.transpose(1, 2)))


@plant("vidi.bridge.position.add[w]")
def width_along_height(original: Any) -> Any:
    """The width's embedding is added along the height."""
    return _on("w", original, lambda x, embed: original(x, embed.transpose(1, 2)))


@plant("vidi.bridge.position.add[h]")
def height_after_flattening(original: Any) -> Any:
    """Misreading: the height's embedding runs along the flattened tokens of a frame."""
    return _on("h", original, lambda x, embed: original(x, _stretched(x, embed)))


@plant("vidi.bridge.position.add[w]")
def width_after_flattening(original: Any) -> Any:
    """Misreading: the width's embedding runs along the flattened tokens of a frame."""
    return _on("w", original, lambda x, embed: original(x, _stretched(x, embed)))


@plant("vidi.bridge.position.add[t]")
def time_of_next_frame(original: Any) -> Any:
    """Frames carry the time of their successor."""
    return _on("t", original, lambda x, embed: original(x, embed.roll(-1, 0)))


# ---- wiring: every step is right, and is given what belongs elsewhere ----------------------------------------------------------


@plant("vidi.bridge.visual._frame_tokens[pos_h]")
def height_and_width_given_to_each_other(original: Any) -> Any:
    """The width's embedding is added along the height, and the height's along the width."""

    def tokens(bridge: Any, tower: Any, group: Any, embeddings: Any, *rest: Any) -> Any:
        turned = {"pos_h": embeddings["pos_w"].transpose(1, 2), "pos_w": embeddings["pos_h"].transpose(1, 2)}
        return original(bridge, tower, group, {**turned, "pos_t": embeddings["pos_t"]}, *rest)

    return tokens


@plant("vidi.bridge.visual._frame_tokens[pos_h]")
def width_added_before_height(original: Any) -> Any:
    """The width's embedding is added first: the same tokens but for rounding once both are there, and another height stage."""

    def tokens(bridge: Any, tower: Any, group: Any, embeddings: Any, tap: Any) -> Any:
        from vidi.bridge import position

        order = iter(("pos_w", "pos_h", "pos_t"))
        add = position.add
        position.add = lambda x, embed: add(x, embeddings[next(order)])
        try:
            return original(bridge, tower, group, embeddings, tap)
        finally:
            position.add = add

    return tokens
