"""Vidi 1.5 9B in MLX, written from the specification alone: bridge (§3, §4, §5), text (§6), head (§8).

Modules and their members bear the official names, so that a checkpoint loads by its own keys. Letters: B batch, F frames,
P pieces of sound, S side of an image, C encoder width, D decoder width, V visual, A audio and T text tokens, L any length.
"""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from decoder import DecoderLayer, GemmaNorm
from towers import AudioTower, VisionTower

try:
    from stagetrace import tap
except ImportError:  # nobody traces

    def tap(stage, x):
        return x


def rms(x):
    return x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + 1e-5)


class BridgeNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = mx.ones(width)

    def __call__(self, x):
        return self.weight * rms(x)


class Projector(nn.Module):
    def __init__(self, inner, width):
        super().__init__()
        self.model = [nn.Linear(inner, width), nn.GELU(), nn.Linear(width, width)]

    def __call__(self, x):
        for part in self.model:
            x = part(x)
        return x


class Position(nn.Module):
    """The embedding of positions that span 0 to span - 1 whatever their number is, before rms: (L, D)."""

    def __init__(self, width, span):
        super().__init__()
        self.span = span
        self.mlp = [nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)]

    def __call__(self, length, frequencies):
        positions = mx.arange(length).astype(mx.float32) / max(length - 1, 1) * (self.span - 1)
        angles = positions[:, None] * frequencies
        x = mx.stack([mx.sin(angles), mx.cos(angles)], axis=-1).flatten(1)
        for part in self.mlp:
            x = part(x)
        return x


class AudioPool(nn.Module):
    """(B, positions, C) to (B, A, D): five positions become one token, and the width changes in the same step."""

    def __init__(self, inner, width, pool):
        super().__init__()
        self.weight = mx.zeros((width, pool, inner))

    def __call__(self, x):
        return mx.conv1d(x, self.weight, stride=self.weight.shape[1])


def pad(grid, pool):
    """Zeros at the right and below, up to a side that folds: (F, S, S, C)."""
    more = -grid.shape[1] % pool
    return mx.pad(grid, [(0, 0), (0, more), (0, more), (0, 0)])


def resized_side(frames, side, pool, budget):
    """The side that keeps all frames of a batch within the token budget."""
    if frames * side**2 <= budget * pool**2:
        return side
    smaller = int(side * math.sqrt(budget * pool**2 / (frames * side**2)))
    return max(smaller - smaller % 2, 10)


def resize(grid, side):
    """Bilinear, half-pixel centres, no antialias: two products with the matrix of one axis."""
    old = grid.shape[1]
    at = np.clip((np.arange(side) + 0.5) * (old / side) - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), old - 2)
    one = np.zeros((side, old))
    one[np.arange(side), low] = 1 - (at - low)
    one[np.arange(side), low + 1] = at - low
    one = mx.array(one.astype(np.float32))
    return mx.einsum("hH,wW,FHWC->FhwC", one, one, grid)


def space_to_depth(grid, pool):
    """Each block of patches moves into channels, channel = (c·pool + dy)·pool + dx."""
    frames, side, _, width = grid.shape
    blocks = grid.reshape(frames, side // pool, pool, side // pool, pool, width)
    return blocks.transpose(0, 1, 3, 5, 2, 4).reshape(frames, side // pool, side // pool, -1)


def padded(rows, length=0):
    """A batch of ragged (L, …), zeros at the right."""
    length = max(length, *(len(r) for r in rows))
    return mx.stack([mx.pad(r, [(0, length - len(r))] + [(0, 0)] * (r.ndim - 1)) for r in rows])


def kept(packed, raw):
    """(B, L): tokens that are not all zero, of samples whose raw input is not all zero."""
    signal = mx.stack([(x != 0).any() for x in raw])
    return (mx.abs(packed).sum(axis=-1) != 0) & signal[:, None]


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, pool = config["hidden_size"], config["mm_image_pool_size"]
        vision, audio = config["vision_config"], config["audio_config"]
        self.pool, self.mel_frames = pool, 2 * audio["max_source_positions"]
        self.budget = config.get("visual_token_budget", 60000)  # of all videos of a batch
        self.mm_vis = VisionTower(vision, config["mm_vision_select_layer"])
        self.mm_aud = AudioTower(audio)
        self.mm_rand_img_projector = Projector(vision["hidden_size"] * pool**2, width)
        self.mm_rand_aud_pool = AudioPool(audio["d_model"], width, config["mm_audio_pool_size"])
        self.mm_rand_aud_projector = Projector(width, width)
        self.mm_rand_img_norm, self.mm_rand_aud_norm, self.mm_rand_llm_norm = (BridgeNorm(width) for _ in range(3))
        self.mm_rand_pos_h, self.mm_rand_pos_w = Position(width, pool), Position(width, pool)
        self.mm_rand_pos_t = Position(width, config["mm_time_interval"])
        self.embed_tokens = nn.Embedding(config["vocab_size"], width)
        self.layers = [DecoderLayer(config, i) for i in range(config["num_hidden_layers"])]
        self.norm = GemmaNorm(width, config["rms_norm_eps"])

    def visual(self, videos, freq):
        """Frames (F, S, S, 3) of each video -> tokens (B, V, D), keep (B, V)."""
        features = self.mm_vis(mx.concatenate(videos))
        side = math.isqrt(features.shape[1])
        grid = pad(features.reshape(len(features), side, side, -1), self.pool)
        grid = tap("vision.pad", grid.transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        smaller = resized_side(len(grid), grid.shape[1], self.pool, self.budget)
        if smaller != grid.shape[1]:
            grid = tap("vision.resize", resize(grid, smaller).transpose(0, 3, 1, 2)).transpose(0, 2, 3, 1)
        x = self.mm_rand_img_norm(self.mm_rand_img_projector(space_to_depth(grid, self.pool)))
        height = tap("vision.pos_h.embed", self.mm_rand_pos_h(x.shape[1], freq)[None, :, None])
        x = tap("vision.pos_h", x + rms(height))
        width = tap("vision.pos_w.embed", self.mm_rand_pos_w(x.shape[2], freq)[None, None])
        x = tap("vision.pos_w", x + rms(width))
        rows, start = [], 0
        for b, video in enumerate(videos):
            time = tap(f"vision.pos_t.embed.{b}", self.mm_rand_pos_t(len(video), freq)[:, None, None])
            rows.append(x[start : start + len(video)] + rms(time))
            start += len(video)
        x = tap("vision.pos_t", mx.concatenate(rows))
        parts = mx.split(x, np.cumsum([len(video) for video in videos])[:-1].tolist())
        packed = tap("vision.packed", padded([part.flatten(0, 2) for part in parts]))
        keep = tap("vision.mask", kept(packed, videos))
        return self.mm_rand_llm_norm(packed) * keep[..., None], keep

    def audio(self, sounds, sizes, freq):
        """Mel pieces (P, frames, M) of each sample, its size in mel frames -> tokens (B, A, D), keep (B, A)."""
        features = self.mm_aud.encoder(mx.concatenate(sounds))
        parts, start = [], 0
        for sound, size in zip(sounds, sizes, strict=True):
            parts.append(
                features[start : start + len(sound)].flatten(0, 1)[: size * features.shape[1] // self.mel_frames]
            )
            start += len(sound)
        pooled = self.mm_rand_aud_pool(tap("audio.trim", padded(parts)))
        rows = [
            row[: len(part) // self.mm_rand_aud_pool.weight.shape[1]] for row, part in zip(pooled, parts, strict=True)
        ]
        x = self.mm_rand_aud_norm(self.mm_rand_aud_projector(mx.concatenate(rows)))
        time = [tap(f"audio.pos_t.embed.{b}", self.mm_rand_pos_t(len(row), freq)) for b, row in enumerate(rows)]
        x = tap("audio.pos_t", x + rms(mx.concatenate(time)))
        parts = mx.split(x, np.cumsum([len(row) for row in rows])[:-1].tolist())
        packed = tap("audio.packed", padded(parts, pooled.shape[1]))
        keep = tap("audio.mask", kept(packed, sounds))
        return self.mm_rand_llm_norm(packed) * keep[..., None], keep

    def text(self, ids, mask):
        """Token ids (B, L) and their mask -> embeddings (B, T, D), keep (B, T): the placeholder gone, packed to the left."""
        rows = [row[keep] for row, keep in zip(ids, mask & (ids != -200), strict=True)]
        keep = tap("text.mask", padded([mx.ones(len(row), mx.bool_) for row in rows]))
        return tap("text.embeds", padded([self.embed_tokens(mx.array(row)) for row in rows])), keep


class Vidi(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Model(config)

    def __call__(self, ids, mask, videos, sounds, sizes, frequencies):
        """frequencies: the table of §5 as data. MLX's exp is up to 4 units in the last place off it, which pos_t shows."""
        model, config = self.model, self.config
        freq = tap("pos.freq", frequencies)
        image, keep_image = model.visual(videos, freq)
        audio, keep_audio = model.audio(sounds, sizes, freq)
        x, keep_text = model.text(ids, mask)
        text = (*self.angles(x.shape[1]), keep_text)
        root = math.sqrt(config["hidden_size"])
        x, image, audio = x * root, image * root, audio * root
        for layer in model.layers:
            x, image, audio = layer(x, image, audio, text, keep_image, keep_audio)
        return self.logits(model.norm(x))

    def angles(self, length):
        """cos and sin (1, T, H) of the text's positions."""
        half = self.config["head_dim"] // 2
        inverse = 1 / self.config["rope_theta"] ** (mx.arange(half).astype(mx.float32) / half)
        positions = tap("rope.position_ids", mx.arange(length, dtype=mx.int64)[None])
        turned = mx.tile(positions[..., None] * inverse, (1, 1, 2))
        return tap("rope.cos", mx.cos(turned)), tap("rope.sin", mx.sin(turned))

    def logits(self, x):
        cap = self.config["final_logit_softcapping"]
        return cap * mx.tanh(self.model.embed_tokens.as_linear(x) / cap)


def load(config, weights):
    """The model with official weights: convolutions turned channels-last; the last vision layer and the head behind it, which
    nothing uses, left out."""
    last = config["vision_config"]["num_hidden_layers"] - 1
    unused = (
        "lm_head.",
        *(f"model.mm_vis.vision_model.{n}." for n in (f"encoder.layers.{last}", "post_layernorm", "head")),
    )
    used = {name: value for name, value in weights.items() if not name.startswith(unused)}
    model = Vidi(config)
    model.load_weights([(name, mx.array(np.moveaxis(x, 1, -1) if x.ndim > 2 else x)) for name, x in used.items()])
    return model
