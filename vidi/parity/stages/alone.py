"""How a stage is computed from its golden inputs alone, where its entry does not say it in one line."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from stageparity.run import Trace
from stageparity.stage import NotHeld
from vidi import loss
from vidi.attention.unpad import Rows
from vidi.bridge import audio, conv_pool, fold, position
from vidi.decoder.attention import repeat_heads
from vidi.inputs import batch as batches
from vidi.inputs import pixels
from vidi.parity import feed, trace
from vidi.parity.bench import Site

__all__ = [
    "audio_pos_t", "audio_projector", "audio_tower", "cached", "conv", "cross_attention", "embed_text", "frequencies_here",
    "image_projector", "layer_output", "lm_head", "logits", "loss_logits", "mean_loss", "per_token", "rope", "space_to_depth",
    "stream", "stream_key", "trim", "unpad", "vision_packed", "vision_pos_t", "vision_tower",
]  # fmt: skip

QKV = tuple(f"xattn.{{i}}.{{m}}.{x}" for x in "qkv")


def vision_tower(s: Site) -> Tensor:
    if s.bench.batch.images is None:
        raise NotHeld("the case gives the tower's output in place of frames")
    frames = torch.cat([pixels.normalize(x, s.model.dtype, s.model.device) for x in s.bench.batch.images])
    return s.model.vision_tower(frames, s.model.tower_backend)


def space_to_depth(s: Site) -> Tensor:
    resized = s.id("vision.resize{g}")
    grid = s.bench.golden(resized) if s.bench.holds(resized) else s["vision.pad"][s.frames]
    return fold.space_to_depth(grid, s.model.config.image_pool_size)


def conv(s: Site) -> Tensor:
    grid = s.model.bridge.image_grid
    assert isinstance(grid, conv_pool.ConvPool)
    return grid.conv(conv_pool.square(s["vision.tower"]))


def image_projector(s: Site) -> Tensor:
    """Over what the image grid gives, (F, C, h, w)."""
    grid = "vision.pool" if s.bench.holds("vision.pool") else "vision.space_to_depth{g}"
    return s.model.bridge.image_projector(s[grid].permute(0, 2, 3, 1))


def vision_pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"vision.pos_t.embed.{b}") for b in s.group.videos if s.bench.num_frames[b]]
    return position.add(s["vision.pos_w{g}"], torch.cat(embeds))


def vision_packed(s: Site) -> Tensor:
    rows = torch.cat([s.bench.golden(f"vision.pos_t{g.suffix}").flatten(0, 2) for g in s.bench.plan])
    tokens = [0] * len(s.bench.num_frames)
    for g in s.bench.plan:
        for b in g.videos:
            tokens[b] = s.bench.num_frames[b] * s.model.bridge.image_grid.tokens_side(g) ** 2
    return batches.pad_rows(list(rows.split(tokens)))


def frequencies_here(golden: np.ndarray) -> np.ndarray:
    return feed.machine_table(2 * len(golden)).numpy()


def audio_tower(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    return s.model.audio_tower(torch.cat(s.bench.batch.audios).to(s.model.device, s.model.dtype), s.model.tower_backend)


def trim(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    positions = [audio.num_positions(size, s.model.config) for size in s.bench.audio_sizes]
    return audio.trim(s["audio.tower"], [len(x) for x in s.bench.batch.audios], positions)


def audio_projector(s: Site) -> Tensor:
    rows = [row.T[:n] for row, n in zip(s["audio.pool"], s.bench.audio_tokens, strict=True)]
    return s.model.bridge.audio_projector(torch.cat(rows))


def audio_pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"audio.pos_t.embed.{b}") for b, n in enumerate(s.bench.audio_tokens) if n]
    return position.add(s["audio.norm"], torch.cat(embeds))


def embed_text(s: Site) -> Tensor:
    tap = Trace()
    s.model.embed_text(s.bench.batch, tap)
    return tap.tensors()[s.stage.template]


def rope(part: str, s: Site) -> Tensor:
    length = s["text.embeds"].shape[1]
    pos_BT = torch.arange(length, device=s.model.device)[None]
    rows = s.model.decoder.text_rows(pos_BT, None, s.model.backend, s.model.dtype)
    return {"position_ids": rows.pos_BT, "cos": rows.cos_BTH, "sin": rows.sin_BTH}[part]


def cross_attention(s: Site) -> Tensor:
    group = s.model.config.decoder.num_heads // s.model.config.decoder.num_kv_heads
    q, k, v = (s[x].transpose(1, 2) for x in QKV)
    keep_q, keep_k = Rows(s["text.mask"]), Rows(s["{path}.mask"])
    return s.layer.attention.attend_stream(
        q, k[:, :, ::group], v[:, :, ::group], keep_q=keep_q, keep_k=keep_k, backend=s.model.backend
    )


def stream_key(which: int, s: Site) -> Tensor:
    value = s.layer.stream_keys_values(s["{stream}"])[which]
    return repeat_heads(value, s.model.config.decoder.num_heads).transpose(1, 2)


def unpad(s: Site) -> Tensor:
    q, k, v = (s[x].transpose(1, 2) for x in QKV)
    return trace.unpadded(q, k, v, Rows(s["text.mask"]), Rows(s["{path}.mask"]))[s.stage.template.rpartition(".")[2]]


def layer_output(s: Site) -> Tensor:
    branches = [s["layer.{i}.t2t"]]
    branches += [s.bench.golden(x) for m in "va" if s.bench.holds(x := s.id(f"layer.{{i}}.t2{m}"))]
    return s.layer.merge(s["layer.{i}.input"], branches)


def stream(s: Site) -> Tensor:
    x = s["{stream}"]
    return s.layer.update_stream(x, s.layer.stream_keys_values(x)[1])


def cached(s: Site) -> Tensor:
    return s.bench.stepped[s.id(s.stage.golden)]


def lm_head(s: Site) -> Tensor:
    tap = Trace()
    s.model.decoder.logits(s["final.norm"], tap)
    return tap.tensors()["lm_head"]


def logits(s: Site) -> Tensor:
    if s.bench.holds("lm_head"):
        return s.model.decoder.finished(s["lm_head"])
    return s.model.decoder.logits(s["final.norm"])


def loss_logits(s: Site) -> Tensor:
    row_N, position_N = s["loss.kept"].unbind(1)
    return s.model.decoder.logits(s["final.norm"][row_N, position_N])


def per_token(s: Site) -> Tensor:
    if s.bench.holds("loss.logits"):
        return loss.cross_entropy(s["loss.logits"], s["loss.labels"])
    labels_BT = s["text.labels"]
    return loss.per_token(s["logits"].reshape(*labels_BT.shape, -1), labels_BT)


def mean_loss(s: Site) -> Tensor:
    named = s.bench.case.info.get("loss_thresholds", {"none": None})
    losses, threshold = s["loss.per_token"], named[s.places["n"]]
    labelled = s.bench.holds("loss.labels")
    value = loss.mean_of(losses, threshold) if labelled else loss.mean_above(losses, s["text.labels"], threshold)
    return value.reshape(s.bench.golden(s.id("loss.{n}")).shape)
