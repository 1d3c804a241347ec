"""The visual path of Vidi 1.5 in JAX, written from the specification (§3, §5): pure functions over a dict of parameters.

Letters: F frames, L patches, C width of the tower, S side of the grid, h w tokens of a frame, D width of the decoder.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from stagetrace import tap

VISION = "model.mm_vis.vision_model."


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def layer_norm(p, name, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps) * p[name + ".weight"] + p[name + ".bias"]


def rms(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def mlp(p, name, x, first, second, approximate):
    return linear(p, f"{name}.{second}", jax.nn.gelu(linear(p, f"{name}.{first}", x), approximate=approximate))


def attention(p, name, x, heads):
    q, k, v = (
        linear(p, f"{name}.{part}_proj", x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for part in ("q", "k", "v")
    )
    weights = jax.nn.softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, axis=-1)
    return linear(p, f"{name}.out_proj", (weights @ v).swapaxes(1, 2).reshape(x.shape))


@partial(jax.jit, static_argnames=("layers", "heads", "patch", "eps"))
def tower(p, images, layers, heads, patch, eps):
    """Frames (F, 3, S, S) -> (F, L, C): what the last layer but one gives."""
    kernel = p[VISION + "embeddings.patch_embedding.weight"]
    grid = jax.lax.conv_general_dilated(images, kernel, (patch, patch), "VALID")
    x = grid.reshape(*grid.shape[:2], -1).swapaxes(1, 2) + p[VISION + "embeddings.patch_embedding.bias"]
    x = x + p[VISION + "embeddings.position_embedding.weight"]
    for i in range(layers):
        name = f"{VISION}encoder.layers.{i}"
        x = x + attention(p, f"{name}.self_attn", layer_norm(p, f"{name}.layer_norm1", x, eps), heads)
        x = x + mlp(p, f"{name}.mlp", layer_norm(p, f"{name}.layer_norm2", x, eps), "fc1", "fc2", approximate=True)
    return x


def pad(x, pool):
    """(F, L, C) -> (F, C, S, S), zeros right and below up to a side that folds."""
    side = math.isqrt(x.shape[1])
    more = -side % pool
    return jnp.pad(x.swapaxes(1, 2).reshape(x.shape[0], -1, side, side), ((0, 0), (0, 0), (0, more), (0, more)))


def fold(x, pool):
    """(F, C, S, S) -> (F, C · pool², h, w), channel = (c · pool + dy) · pool + dx."""
    frames, width, side, _ = x.shape
    x = x.reshape(frames, width, side // pool, pool, side // pool, pool)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(frames, width * pool**2, side // pool, side // pool)


@jax.jit
def project(p, x):
    return mlp(p, "model.mm_rand_img_projector.model", x, "0", "2", approximate=False)


@jax.jit
def norm(p, x):
    return p["model.mm_rand_img_norm.weight"] * rms(x)


def position(p, axis, length, extent, freq):
    """(length, D), before rms: positions that span 0 to extent - 1."""
    angle = (jnp.arange(length, dtype=freq.dtype) / max(length - 1, 1) * (extent - 1))[:, None] * freq
    table = jnp.stack((jnp.sin(angle), jnp.cos(angle)), -1).reshape(length, -1)
    return mlp(p, f"model.mm_rand_pos_{axis}.mlp", table, "0", "2", approximate=False)


def visual(p, config, images, freq):
    """Frames of one video -> its tokens (1, V, D)."""
    vision, pool = config["vision_config"], config["mm_image_pool_size"]
    layers = vision["num_hidden_layers"] + 1 + config["mm_vision_select_layer"]
    x = tower(p, images, layers, vision["num_attention_heads"], vision["patch_size"], vision["layer_norm_eps"])
    x = norm(p, project(p, fold(pad(x, pool), pool).transpose(0, 2, 3, 1)))
    height = tap("vision.pos_h.embed", position(p, "h", x.shape[1], pool, freq)[None, :, None])
    x = tap("vision.pos_h", x + rms(height))
    width = tap("vision.pos_w.embed", position(p, "w", x.shape[2], pool, freq)[None, None])
    x = tap("vision.pos_w", x + rms(width))
    time = tap("vision.pos_t.embed.0", position(p, "t", len(x), config["mm_time_interval"], freq)[:, None, None])
    x = tap("vision.pos_t", x + rms(time))
    x = tap("vision.packed", x.reshape(1, -1, x.shape[-1]))
    keep = tap("vision.mask", (jnp.abs(x).sum(-1) != 0) & (images != 0).any())
    return p["model.mm_rand_llm_norm.weight"] * rms(x) * keep[..., None]
