"""Vidi 1.5 9B put together from transformers: SigLIP and Whisper as they are, Gemma 2's layers with three attentions.

A port as somebody else would write it, from the specification alone; parameters carry the checkpoint's names. The calls
of `tap` are the steps that have no module of their own.
"""

import math

import torch
from stagetrace import tap
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma2Config, SiglipVisionConfig, SiglipVisionModel, WhisperConfig
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.whisper.modeling_whisper import WhisperEncoder

PLACEHOLDER = -200
FRAMES_AT_ONCE = 4


def rms(x):
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


class BridgeNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * rms(x)


class Projector(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return self.model(x)


class PositionEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, length, extent, freq):
        position = torch.arange(length, dtype=torch.float32) / max(length - 1, 1) * (extent - 1)
        angle = position[:, None] * freq
        table = torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)
        return self.mlp(table)


class Audio(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.encoder = WhisperEncoder(config)


class Attention(gemma2.Gemma2Attention):
    def to_text(self, n, rope, causal, keep):
        out, _ = self(n, rope, causal)
        return out * keep[..., None]

    def to_stream(self, n, s, keep, keep_s):
        q, k, v = self.heads(self.q_proj, n), self.heads(self.k_proj, s), self.heads(self.v_proj, s)
        return self.o_proj(self.attend(q, k, v, keep, keep_s).flatten(2))

    def attend(self, q, k, v, keep, keep_s):
        hidden = torch.zeros(keep_s.shape, dtype=q.dtype).masked_fill(~keep_s, torch.finfo(q.dtype).min)
        out, _ = gemma2.eager_attention_forward(
            self, q, k, v, hidden[:, None, None], scaling=self.scaling, softcap=self.attn_logit_softcapping
        )
        return out * keep[..., None, None]

    def to_itself(self, s):
        v = gemma2.repeat_kv(self.heads(self.v_proj, s), self.num_key_value_groups)
        return self.o_proj(v.transpose(1, 2).flatten(2))

    def heads(self, projection, x):
        return projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Layer(gemma2.Gemma2DecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.self_attn = Attention(config, index)
        self.index = index

    def forward(self, x, image, audio, rope, causal, keep, keep_image, keep_audio):
        n = self.input_layernorm(x)
        attended = self.self_attn.to_text(n, rope, causal, keep)
        if image is not None:
            attended = attended + self.read("v", n, image, keep, keep_image)
            image = tap(f"layer.{self.index}.image_stream", self.carry(image))
        if audio is not None:
            attended = attended + self.read("a", n, audio, keep, keep_audio)
            audio = tap(f"layer.{self.index}.audio_stream", self.carry(audio))
        return self.feed_forward(x + self.post_attention_layernorm(attended)), image, audio

    def read(self, m, n, s, keep, keep_s):
        """What the text takes from one stream; a sample that has nothing there takes exactly 0."""
        gate = tap(f"layer.{self.index}.t2{m}.gate", keep_s.any(1))
        keep, keep_s = tap(f"xattn.{self.index}.{m}.q_mask", keep), tap(f"xattn.{self.index}.{m}.kv_mask", keep_s)
        return self.self_attn.to_stream(n, self.input_layernorm(s), keep, keep_s) * gate[:, None, None]

    def carry(self, s):
        """A stream's token attends to itself alone."""
        own = self.self_attn.to_itself(self.input_layernorm(s))
        return self.feed_forward(s + self.post_attention_layernorm(own))

    def feed_forward(self, x):
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Model(nn.Module):
    def __init__(self, config, decoder, vision, audio):
        super().__init__()
        self.config, self.decoder = config, decoder
        width, pool = decoder.hidden_size, config["mm_image_pool_size"]
        self.embed_tokens = nn.Embedding(decoder.vocab_size, width)
        self.layers = nn.ModuleList(Layer(decoder, i) for i in range(decoder.num_hidden_layers))
        self.norm = gemma2.Gemma2RMSNorm(width, decoder.rms_norm_eps)
        self.rotary_emb = gemma2.Gemma2RotaryEmbedding(decoder)
        self.mm_vis = SiglipVisionModel(vision)
        self.mm_aud = Audio(audio)
        self.mm_rand_img_projector = Projector(vision.hidden_size * pool**2, width)
        self.mm_rand_img_norm = BridgeNorm(width)
        self.mm_rand_pos_h, self.mm_rand_pos_w = PositionEmbedding(width), PositionEmbedding(width)
        self.mm_rand_pos_t = PositionEmbedding(width)
        kernel = config["mm_audio_pool_size"]
        self.mm_rand_aud_pool = nn.Conv1d(audio.d_model, width, kernel, stride=kernel, bias=False)
        self.mm_rand_aud_projector = Projector(width, width)
        self.mm_rand_aud_norm = BridgeNorm(width)
        self.mm_rand_llm_norm = BridgeNorm(width)

    def forward(self, ids, videos, sounds, attention_mask=None, sizes=None, freq=None):
        """ids, attention_mask: (B, S); videos, sounds: for each sample (frames, 3, S, S) and (pieces, mel bins, mel frames).

        freq: the table of position frequencies as it was trained with, where this machine's exp may be another one.
        """
        if freq is None:
            width = self.decoder.hidden_size
            freq = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10000.0) / width))
        self.freq = tap("pos.freq", freq)
        image, keep_image = self.visual_tokens(videos)
        audio, keep_audio = self.audio_tokens(sounds, sizes)
        x, keep = self.embed(ids, attention_mask)

        position_ids = tap("rope.position_ids", torch.arange(x.shape[1])[None])
        cos, sin = self.rotary_emb(x, position_ids)
        rope = tap("rope.cos", cos), tap("rope.sin", sin)
        arguments = (self.decoder, x, keep, None, position_ids)
        masks = {
            "full_attention": create_causal_mask(*arguments),
            "sliding_attention": create_sliding_window_causal_mask(*arguments),
        }
        x, image, audio = self.scale(x), self.scale(image, "image"), self.scale(audio, "audio")
        for i, (layer, kind) in enumerate(zip(self.layers, self.decoder.layer_types, strict=True)):
            x = tap(f"layer.{i}.input", x)
            x, image, audio = layer(x, image, audio, rope, masks[kind], keep, keep_image, keep_audio)
        return self.norm(x)

    # ---- text

    def embed(self, ids, attention_mask):
        keep = ids != PLACEHOLDER
        keep = keep if attention_mask is None else keep & attention_mask
        rows = [self.embed_tokens(row[kept]) for row, kept in zip(ids, keep, strict=True)]
        x = tap("text.embeds", pad_sequence(rows, batch_first=True))
        return x, tap(
            "text.mask", pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True)
        )

    def scale(self, x, stream=None):
        if x is None:
            return None
        x = x * torch.tensor(self.decoder.hidden_size**0.5, dtype=x.dtype)
        return x if stream is None else tap(f"layer.0.{stream}_input", x)

    # ---- video

    def visual_tokens(self, videos):
        if not any(len(video) for video in videos):
            return None, None
        frames = torch.cat(videos)
        grids = [
            self.fold(self.resize(self.pad(self.see(piece)), len(frames))) for piece in frames.split(FRAMES_AT_ONCE)
        ]
        x = self.mm_rand_img_norm(self.mm_rand_img_projector(torch.cat(grids).permute(0, 2, 3, 1)))
        pool = self.config["mm_image_pool_size"]
        height = tap("vision.pos_h.embed", self.mm_rand_pos_h(x.shape[1], pool, self.freq)[None, :, None])
        width = tap("vision.pos_w.embed", self.mm_rand_pos_w(x.shape[2], pool, self.freq)[None, None])
        x = self.add(self.add(x, height), width)
        rows = [
            self.add(video, self.time("vision", b, len(video), 1, 1)).flatten(0, 2)
            for b, video in enumerate(x.split([*map(len, videos)]))
        ]
        return self.to_stream("vision", rows, videos)

    def see(self, frames):
        return self.mm_vis(frames, output_hidden_states=True).hidden_states[self.config["mm_vision_select_layer"]]

    def pad(self, patches):
        side = math.isqrt(patches.shape[1])
        odd = side % self.config["mm_image_pool_size"]
        return functional.pad(patches.transpose(1, 2).unflatten(2, (side, side)), (0, odd, 0, odd))

    def resize(self, grid, num_frames):
        side, budget = grid.shape[-1], self.config.get("visual_token_budget", 60000)
        room = budget * self.config["mm_image_pool_size"] ** 2 / (num_frames * side**2)
        if room >= 1:
            return grid
        side = max(int(side * math.sqrt(room)) // 2 * 2, 10)
        grid = functional.interpolate(grid, (side, side), mode="bilinear", align_corners=False)
        return tap("vision.resize", grid, join=0)

    def fold(self, grid):
        return functional.pixel_unshuffle(grid, self.config["mm_image_pool_size"])

    def time(self, path, sample, length, *others):
        embed = self.mm_rand_pos_t(length, self.config["mm_time_interval"], self.freq)
        embed = embed.view(length, *others, embed.shape[-1])
        return tap(f"{path}.pos_t.embed.{sample}", embed) if length else embed

    def add(self, x, embed):
        return x + rms(embed)

    # ---- sound

    def audio_tokens(self, sounds, sizes):
        pool, positions = self.config["mm_audio_pool_size"], self.mm_aud.encoder.config.max_source_positions
        lengths = [
            int(size) * positions // sound.shape[-1] if len(sound) else 0
            for sound, size in zip(sounds, sizes, strict=True)
        ]
        if max(lengths, default=0) < pool:
            return None, None
        pieces = self.hear(torch.cat(sounds)).split([*map(len, sounds)])
        x = tap("audio.trim", self.trim([piece.flatten(0, 1) for piece in pieces], lengths))
        x = self.mm_rand_aud_pool(x.transpose(1, 2)).transpose(1, 2)
        x = torch.cat([row[: length // pool] for row, length in zip(x, lengths, strict=True)])
        x = self.mm_rand_aud_norm(self.mm_rand_aud_projector(x)).split([length // pool for length in lengths])
        rows = [self.add(row, self.time("audio", b, len(row))) for b, row in enumerate(x)]
        return self.to_stream("audio", rows, sounds)

    def hear(self, pieces):
        return self.mm_aud.encoder(pieces).last_hidden_state

    def trim(self, sounds, lengths):
        return pad_sequence([sound[:length] for sound, length in zip(sounds, lengths, strict=True)], batch_first=True)

    # ---- both

    def to_stream(self, path, rows, raw):
        x = tap(f"{path}.packed", pad_sequence(rows, batch_first=True))
        signal = torch.tensor([bool(sample.any()) for sample in raw])
        keep = tap(f"{path}.mask", (x.abs().sum(-1) != 0) & signal[:, None])
        return tap(f"{path}.llm_norm", self.mm_rand_llm_norm(x) * keep[..., None]), keep


class Vidi(nn.Module):
    def __init__(self, config):
        super().__init__()
        known = {
            key: config["vision_config"][key]
            for key in SiglipVisionConfig().to_dict()
            if key in config["vision_config"]
        }
        fields = {key: config[key] for key in Gemma2Config().to_dict() if key in config}
        fields["sliding_window"] += 1  # transformers counts the query's own key among the window's
        # No attention but the eager one has the softcap, and masks are made for the one that the config names.
        decoder = Gemma2Config(**fields, attn_implementation="eager")
        self.model = Model(config, decoder, SiglipVisionConfig(**known), WhisperConfig(**config["audio_config"]))

    def forward(self, *inputs):
        return self.head(self.model(*inputs))

    def head(self, x):
        cap = self.model.decoder.final_logit_softcapping
        return torch.tanh(x @ self.model.embed_tokens.weight.T / cap) * cap


def load(config, tensors):
    """config: the official dict; tensors: parameters by the names of this file."""
    model = Vidi(config).eval()
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    return model
