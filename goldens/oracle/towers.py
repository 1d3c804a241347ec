"""Frames and log-mel pieces to features: SigLIP's hidden state -2 and the Whisper encoder (spec §3.1, §4.1).

Dims: F frames, P audio pieces, S image side, M mel bins, C encoder width, L tokens of a tower, E heads, H head dim.
"""

import numpy as np

from .case import Sizes, Weights
from .casts import Arithmetic
from .pointwise import gelu_erf, gelu_tanh, layer_norm, softmax_average

__all__ = ["siglip", "whisper"]


def siglip(ar: Arithmetic, sizes: Sizes, w: Weights, frames_F3SS: np.ndarray) -> np.ndarray:
    """Frames (F, 3, S, S) in [-1, 1] -> (F, patches, C), patches row by row: the last layer but one, no post-norm."""
    root = "model.mm_vis.vision_model."
    weight_CK = w(root + "embeddings.patch_embedding.weight")
    patches_FLK = _patches(ar.store(frames_F3SS), sizes.patch)
    x_FLC = ar.linear(patches_FLK, weight_CK.reshape(len(weight_CK), -1), w(root + "embeddings.patch_embedding.bias"))
    x_FLC = ar.store(x_FLC + w(root + "embeddings.position_embedding.weight"))
    for i in range(sizes.vision_layers_run):
        layer = f"{root}encoder.layers.{i}."
        n_FLC = layer_norm(ar, x_FLC, w(layer + "layer_norm1.weight"), w(layer + "layer_norm1.bias"), sizes.vision_eps)
        x_FLC = ar.store(x_FLC + _attention(ar, w, layer + "self_attn.", n_FLC, sizes.vision_heads))
        n_FLC = layer_norm(ar, x_FLC, w(layer + "layer_norm2.weight"), w(layer + "layer_norm2.bias"), sizes.vision_eps)
        hidden = ar.linear(n_FLC, w(layer + "mlp.fc1.weight"), w(layer + "mlp.fc1.bias"))
        hidden = ar.store(gelu_tanh(hidden))
        x_FLC = ar.store(x_FLC + ar.linear(hidden, w(layer + "mlp.fc2.weight"), w(layer + "mlp.fc2.bias")))
    return x_FLC


def whisper(ar: Arithmetic, sizes: Sizes, w: Weights, mel_PML: np.ndarray) -> np.ndarray:
    """Log-mel pieces (P, M, 2·positions) -> (P, positions, C), after the encoder's last LayerNorm."""
    root, eps = "model.mm_aud.encoder.", sizes.audio_eps
    x_PLC = np.swapaxes(ar.store(mel_PML), 1, 2)
    x_PLC = ar.store(gelu_erf(_conv3(ar, w, root + "conv1.", x_PLC, stride=1)))
    x_PLC = ar.store(gelu_erf(_conv3(ar, w, root + "conv2.", x_PLC, stride=2)))
    x_PLC = ar.store(x_PLC + w(root + "embed_positions.weight"))
    for i in range(sizes.audio_layers):
        layer = f"{root}layers.{i}."
        norm = layer + "self_attn_layer_norm."
        n_PLC = layer_norm(ar, x_PLC, w(norm + "weight"), w(norm + "bias"), eps)
        x_PLC = ar.store(x_PLC + _attention(ar, w, layer + "self_attn.", n_PLC, sizes.audio_heads))
        norm = layer + "final_layer_norm."
        n_PLC = layer_norm(ar, x_PLC, w(norm + "weight"), w(norm + "bias"), eps)
        hidden = ar.store(gelu_erf(ar.linear(n_PLC, w(layer + "fc1.weight"), w(layer + "fc1.bias"))))
        x_PLC = ar.store(x_PLC + ar.linear(hidden, w(layer + "fc2.weight"), w(layer + "fc2.bias")))
    return layer_norm(ar, x_PLC, w(root + "layer_norm.weight"), w(root + "layer_norm.bias"), eps)


def _patches(frames_F3SS: np.ndarray, patch: int) -> np.ndarray:
    """Non-overlapping patches as rows (F, patches, 3·patch·patch), channel slowest: a strided convolution's windows."""
    num_frames, channels, height, width = frames_F3SS.shape
    rows, cols = height // patch, width // patch
    tiles = frames_F3SS[:, :, : rows * patch, : cols * patch].reshape(num_frames, channels, rows, patch, cols, patch)
    return tiles.transpose(0, 2, 4, 1, 3, 5).reshape(num_frames, rows * cols, channels * patch * patch)


def _conv3(ar: Arithmetic, w: Weights, name: str, x_PLC: np.ndarray, stride: int) -> np.ndarray:
    """Conv1d of kernel 3 and zero padding 1 along the middle axis, with bias."""
    padded = np.pad(x_PLC, ((0, 0), (1, 1), (0, 0)))
    length = (x_PLC.shape[1] - 1) // stride + 1
    windows = np.stack([padded[:, tap : tap + stride * (length - 1) + 1 : stride] for tap in range(3)], axis=-1)
    weight_OCK = w(name + "weight")
    return ar.linear(windows.reshape(*windows.shape[:2], -1), weight_OCK.reshape(len(weight_OCK), -1), w(name + "bias"))


def _attention(ar: Arithmetic, w: Weights, name: str, x_BLC: np.ndarray, num_heads: int) -> np.ndarray:
    """Plain self-attention over all L tokens, scale H^-0.5, scores and softmax unrounded (§7, precision)."""
    batch, length, width = x_BLC.shape

    def heads(part: str) -> np.ndarray:
        y_BLC = ar.linear(x_BLC, w(f"{name}{part}.weight"), w.optional(f"{name}{part}.bias"))
        return y_BLC.reshape(batch, length, num_heads, -1).transpose(0, 2, 1, 3)

    q_BELH, k_BELH, v_BELH = heads("q_proj"), heads("k_proj"), heads("v_proj")
    scale = ar.work((width // num_heads) ** -0.5)
    scores_BELL = ar.contract(q_BELH, np.swapaxes(k_BELH, 2, 3)) * scale
    out_BELH = softmax_average(ar, scores_BELL, None, v_BELH)
    return ar.linear(
        out_BELH.transpose(0, 2, 1, 3).reshape(batch, length, width),
        w(name + "out_proj.weight"),
        w(name + "out_proj.bias"),
    )
