"""The two encoders: SigLIP (specification §3.1) and Whisper (§4.1), channels-last, as MLX likes them.

Letters: F frames, P pieces of sound, S side of an image, M mel bins, L patches or positions, C width.
"""

import mlx.core as mx
import mlx.nn as nn


class TowerAttention(nn.Module):
    def __init__(self, width, heads, key_bias):
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(3))
        self.k_proj = nn.Linear(width, width, bias=key_bias)

    def __call__(self, x):
        q, k, v = (
            p(x).reshape(*x.shape[:2], self.heads, -1).swapaxes(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        weights = mx.softmax(q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5, axis=-1)
        return self.out_proj((weights @ v).swapaxes(1, 2).reshape(x.shape))


class TwoLayers(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def __call__(self, x):
        return self.fc2(nn.gelu_approx(self.fc1(x)))


class SiglipLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = TowerAttention(width, config["num_attention_heads"], key_bias=True)
        self.mlp = TwoLayers(width, config["intermediate_size"])

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, patch = config["hidden_size"], config["patch_size"]
        self.patch_embedding = nn.Conv2d(3, width, patch, stride=patch)
        self.position_embedding = nn.Embedding((config["image_size"] // patch) ** 2, width)

    def __call__(self, images):
        return self.patch_embedding(images).flatten(1, 2) + self.position_embedding.weight


class Layers(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers


class VisionModel(nn.Module):
    """Frames (F, S, S, 3) to patches (F, L, C), row by row: the output of the last layer but one, which is the last built."""

    def __init__(self, config, select):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Layers([SiglipLayer(config) for _ in range(config["num_hidden_layers"] + 1 + select)])

    def __call__(self, images):
        x = self.embeddings(images)
        for layer in self.encoder.layers:
            x = layer(x)
        return x


class VisionTower(nn.Module):
    def __init__(self, config, select):
        super().__init__()
        self.vision_model = VisionModel(config, select)

    def __call__(self, images):
        return self.vision_model(images)


class WhisperLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        eps = config.get("layer_norm_eps", 1e-5)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.self_attn = TowerAttention(width, config["encoder_attention_heads"], key_bias=False)
        self.fc1, self.fc2 = nn.Linear(width, config["encoder_ffn_dim"]), nn.Linear(config["encoder_ffn_dim"], width)

    def __call__(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(nn.gelu(self.fc1(self.final_layer_norm(x))))


class Whisper(nn.Module):
    """Mel pieces (P, frames, M) to (P, positions, C)."""

    def __init__(self, config):
        super().__init__()
        width = config["d_model"]
        self.conv1 = nn.Conv1d(config["num_mel_bins"], width, 3, padding=1)
        self.conv2 = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config["max_source_positions"], width)
        self.layers = [WhisperLayer(config) for _ in range(config["encoder_layers"])]
        self.layer_norm = nn.LayerNorm(width, config.get("layer_norm_eps", 1e-5))

    def __call__(self, mel):
        x = nn.gelu(self.conv2(nn.gelu(self.conv1(mel)))) + self.embed_positions.weight
        for layer in self.layers:
            x = layer(x)
        return self.layer_norm(x)


class AudioTower(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = Whisper(config)
