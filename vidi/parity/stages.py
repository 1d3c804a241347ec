"""The stage registry: every stage of the forward pass, in order, with what feeds it and the code that computes it.

A template stands for a family of ids: ``{i}`` a layer, ``{m}`` a modality (v, a), ``{b}`` a sample, ``{g}`` nothing or the
number of a video with a token budget of its own. Derived places: ``{path}`` vision or audio, ``{name}`` image or audio,
``{stream}`` the stream that enters the layer, ``{before}`` the text that enters it.

`run` computes the stage from golden inputs alone (isolated: one wrong stage reds one row). `sites` names the code that
is the stage's own; a fault patched in there must first be reported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidi import loss
from vidi.attention.unpad import Rows
from vidi.bridge import audio, fold, mask, position, visual
from vidi.bridge.visual import Group
from vidi.cache import CrossKeys
from vidi.decoder.attention import repeat_heads
from vidi.decoder.layer import DecoderLayer, TextRows
from vidi.inputs import batch as batches
from vidi.inputs import pixels
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed, trace
from vidi.parity.golden import Whole
from vidi.parity.store import Case, Targets

__all__ = ["STAGES", "Bench", "NotHeld", "Site", "Stage", "find", "isolated"]

NAMES = {"v": {"path": "vision", "name": "image"}, "a": {"path": "audio", "name": "audio"}}


@dataclass(frozen=True)
class Stage:
    """One entry of the registry. ``inputs``: templates of the golden tensors that feed it.

    ``sites``: dotted names of functions, classes, modules (all that is in them) or parts of the model (`model.bridge.pos_h`),
    each with the use it has here in brackets, where another stage uses the same code for something else.
    """

    template: str
    inputs: tuple[str, ...]
    run: Callable[[Site], Tensor]
    sites: tuple[str, ...]
    spec: str
    what: str

    @property
    def reads_raw(self) -> bool:
        """Only raw inputs feed this stage, so that run alone or chained it has the same error: its own."""
        return all(name.startswith("inputs.") for name in self.inputs)

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        places = {
            "i": r"(?P<i>\d+)",
            "m": r"(?P<m>[va])",
            "b": r"(?P<b>\d+)",
            "g": r"(?P<g>(?:\.\d+)?)",
            "n": r"(?P<n>.+)",
        }
        parts = re.split(r"\{(\w)\}", self.template)
        return re.compile("".join(places[p] if k % 2 else re.escape(p) for k, p in enumerate(parts)) + r"\Z")


class NotHeld(LookupError):
    """The case does not hold an input of the stage whole, so the stage cannot be fed alone."""


class Bench:
    """A case on the bench: its model, its goldens as tensors, and what all stages need to know of its shape."""

    def __init__(self, case: Case, model: VidiModel, targets: Targets) -> None:
        self.case, self.model, self.targets = case, model, targets
        self.inputs = case.inputs
        self.batch: Batch = feed.batch_of(self.inputs)
        noise = feed.noise_of(self.inputs)
        self.noise: position.Noise | None = (lambda axis, length: noise[axis]) if noise else None
        self._held: dict[str, Tensor] = {}

    def golden(self, stage_id: str) -> Tensor:
        """A golden tensor in the model's dtype, on its device. Raises NotHeld where the case has it not, or in part."""
        if stage_id not in self._held:
            golden = self.targets.get(stage_id)
            if not isinstance(golden, Whole):
                raise NotHeld(f"{self.case.name} does not hold {stage_id} whole")
            self._held[stage_id] = feed.to_torch(golden.array, self.model.dtype, self.model.device)
        return self._held[stage_id]

    def holds(self, stage_id: str) -> bool:
        return stage_id in self.targets and isinstance(self.targets[stage_id], Whole)

    @cached_property
    def num_frames(self) -> list[int]:
        if "inputs.feat_index" in self.inputs:
            return [len(self.inputs["inputs.feat_index"])]
        return [len(x) for x in self.batch.images or ()]

    @cached_property
    def plan(self) -> list[Group]:
        return [g for g in visual.groups(self.num_frames, self.model.config) if g.num_frames]

    @cached_property
    def audio_sizes(self) -> tuple[int, ...]:
        return self.batch.audio_sizes or ()

    @cached_property
    def audio_tokens(self) -> list[int]:
        return [audio.num_tokens(size, self.model.config) for size in self.audio_sizes]

    def signal(self, modality: str) -> Tensor:
        raw = self.batch.images if modality == "v" else self.batch.audios
        if raw is None:
            raise NotHeld("the case gives the tower's output in place of raw input")
        return mask.has_signal(raw).to(self.model.device)


@dataclass(frozen=True)
class Site:
    """One stage id on the bench: its places filled in, its inputs by template."""

    bench: Bench
    stage: Stage
    places: Mapping[str, str]

    def __getitem__(self, template: str) -> Tensor:
        assert template in self.stage.inputs, f"{self.stage.template} reads {template} without declaring it"
        return self.bench.golden(self.id(template))

    def id(self, template: str) -> str:
        """The id that a template of ``inputs`` stands for here."""
        i, m = int(self.places.get("i") or 0), self.places.get("m") or "v"
        names = NAMES[m]
        stream = f"layer.0.{names['name']}_input" if i == 0 else f"layer.{i - 1}.{names['name']}_stream"
        last = f"layer.{self.bench.model.config.decoder.num_layers - 1}.output"
        return template.format(**{**self.places, **names, "stream": stream, "last": last})

    @property
    def model(self) -> VidiModel:
        return self.bench.model

    @property
    def layer(self) -> DecoderLayer:
        return self.model.decoder.layers[int(self.places["i"])]  # type: ignore[return-value]

    @property
    def group(self) -> Group:
        return next(g for g in self.bench.plan if g.suffix == self.places["g"])

    @property
    def frames(self) -> slice:
        """This group's frames among all joined."""
        start = sum(self.bench.num_frames[: self.group.videos[0]])
        return slice(start, start + self.group.num_frames)

    @property
    def text(self) -> TextRows:
        cos, sin, keep_BT = self["rope.cos"], self["rope.sin"], self["text.mask"]
        samples, length = keep_BT.shape
        pos_BT = torch.arange(length, device=keep_BT.device).expand(samples, length)
        return TextRows(
            pos_BT, cos.expand(samples, -1, -1), sin.expand(samples, -1, -1), Rows(keep_BT), self.model.backend
        )

    @property
    def keys(self) -> CrossKeys:
        k, v = self.layer.stream_keys_values(self["{stream}"])
        return CrossKeys(k, v, Rows(self["{path}.mask"]))

    def embed(self, module: position.PositionEmbedding, axis: str, length: int) -> Tensor:
        return position.embed(module, axis, length, self.bench.noise, self.model.dtype)


# ---- what a stage's entry runs, where one expression would be too long --------------------------------------------------


def _vision_tower(s: Site) -> Tensor:
    if s.bench.batch.images is None:
        raise NotHeld("the case gives the tower's output in place of frames")
    frames = torch.cat([pixels.normalize(x, s.model.dtype, s.model.device) for x in s.bench.batch.images])
    return s.model.vision_tower(frames, s.model.tower_backend)


def _audio_tower(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    return s.model.audio_tower(torch.cat(s.bench.batch.audios).to(s.model.device, s.model.dtype), s.model.tower_backend)


def _space_to_depth(s: Site) -> Tensor:
    resized = s.id("vision.resize{g}")
    grid = s.bench.golden(resized) if s.bench.holds(resized) else s["vision.pad"][s.frames]
    return fold.space_to_depth(grid, s.model.config.image_pool_size)


def _pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"vision.pos_t.embed.{b}") for b in s.group.videos if s.bench.num_frames[b]]
    return position.add(s["vision.pos_w{g}"], torch.cat(embeds))


def _vision_packed(s: Site) -> Tensor:
    rows = torch.cat([s.bench.golden(f"vision.pos_t{g.suffix}").flatten(0, 2) for g in s.bench.plan])
    tokens = [0] * len(s.bench.num_frames)
    for g in s.bench.plan:
        for b in g.videos:
            tokens[b] = s.bench.num_frames[b] * (g.side // s.model.config.image_pool_size) ** 2
    return batches.pad_rows(list(rows.split(tokens)))


def _trim(s: Site) -> Tensor:
    assert s.bench.batch.audios is not None
    positions = [audio.num_positions(size, s.model.config) for size in s.bench.audio_sizes]
    return audio.trim(s["audio.tower"], [len(x) for x in s.bench.batch.audios], positions)


def _audio_projector(s: Site) -> Tensor:
    pooled = s["audio.pool"]
    rows = torch.cat([row.T[:n] for row, n in zip(pooled, s.bench.audio_tokens, strict=True)])
    return s.model.bridge.audio_projector(rows)


def _audio_pos_t(s: Site) -> Tensor:
    embeds = [s.bench.golden(f"audio.pos_t.embed.{b}") for b, n in enumerate(s.bench.audio_tokens) if n]
    return position.add(s["audio.norm"], torch.cat(embeds))


def _text_tap(s: Site, stage_id: str) -> Tensor:
    tap = trace.Trace()
    s.model.embed_text(s.bench.batch, tap)
    return tap.tensors()[stage_id]


def _rope(s: Site, part: str) -> Tensor:
    length = s["text.embeds"].shape[1]
    pos_BT = torch.arange(length, device=s.model.device)[None]
    rows = s.model.decoder.text_rows(pos_BT, None, s.model.backend, s.model.dtype)
    return {"position_ids": rows.pos_BT, "cos": rows.cos_BTH, "sin": rows.sin_BTH}[part]


def _xattn_out(s: Site) -> Tensor:
    group = s.model.config.decoder.num_heads // s.model.config.decoder.num_kv_heads
    q, k, v = (s[f"xattn.{{i}}.{{m}}.{part}"].transpose(1, 2) for part in "qkv")
    return s.layer.attention.attend_stream(
        q,
        k[:, :, ::group],
        v[:, :, ::group],
        keep_q=Rows(s["text.mask"]),
        keep_k=Rows(s["{path}.mask"]),
        backend=s.model.backend,
    )


def _xattn_key(s: Site, part: int) -> Tensor:
    value = s.layer.stream_keys_values(s["{stream}"])[part]
    return repeat_heads(value, s.model.config.decoder.num_heads).transpose(1, 2)


def _unpad(s: Site) -> Tensor:
    prefix = s.id("xattn.{i}.{m}")
    q, k, v = (s[f"xattn.{{i}}.{{m}}.{part}"].transpose(1, 2) for part in "qkv")
    flat = dict(trace.unpadded(prefix, q, k, v, Rows(s["text.mask"]), Rows(s["{path}.mask"])))
    return flat[prefix + s.stage.template.removeprefix("xattn.{i}.{m}")]


def _output(s: Site) -> Tensor:
    branches = [s["layer.{i}.t2t"]]
    branches += [s.bench.golden(x) for m in "va" if s.bench.holds(x := s.id(f"layer.{{i}}.t2{m}"))]
    return s.layer.merge(s["layer.{i}.input"], branches)


def _stream(s: Site) -> Tensor:
    x = s["{stream}"]
    return s.layer.update_stream(x, s.layer.stream_keys_values(x)[1])


def _per_token(s: Site) -> Tensor:
    labels_BT = s["text.labels"]
    return loss.per_token(s["logits"].reshape(*labels_BT.shape, -1), labels_BT)


def _mean_loss(s: Site) -> Tensor:
    named = s.bench.case.info.get("loss_thresholds", {"none": None})
    value = loss.mean_above(s["loss.per_token"], s["text.labels"], named[s.places["n"]])
    return value.reshape(s.bench.golden(s.id("loss.{n}")).shape)


# ---- the registry -------------------------------------------------------------------------------------------------------

_B, _D = "vidi.bridge.", "vidi.decoder."
_TOWER = ("vidi.towers.layer.", "vidi.attention.sdpa.", "vidi.attention.dispatch.[tower]")
_RMS = (_B + "norm.",)
_LAYER, _PART = _D + "layer.DecoderLayer.", "model.decoder.layers.{i}."
_NORM = (_D + "norm.", _PART + "input_norm", _PART + "attention")
_ATTENTION = _D + "attention.DecomposedAttention."
_CROSS = ("vidi.attention.eager.[cross]", "vidi.attention.dispatch.[cross]", "vidi.attention.mask.zero_rows")
_SELF = ("vidi.attention.eager.[self]", "vidi.attention.dispatch.[self]", "vidi.attention.mask.zero_rows")
_QUERIES = (_ATTENTION + "queries", *_NORM)
_STREAM_KEYS = (_LAYER + "stream_keys_values", _ATTENTION + "keys_values", *_NORM)
_FEED = (
    _LAYER + "feed_forward",
    _D + "mlp.",
    _D + "norm.",
    *(_PART + x for x in ("mlp", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm")),
)
_STREAM = (
    _LAYER + "update_stream",
    _ATTENTION + "attend_own_token",
    _ATTENTION + "output",
    _D + "attention.repeat_heads",
    _D + "decoder.update_in_chunks",
    *_STREAM_KEYS,
    *_FEED,
)


def _position(*uses: str) -> tuple[str, ...]:
    """The code of an embedding, as far as it serves these axes."""
    code = ("PositionEmbedding", "embed", "positions", "sinusoid")
    named = (f"{_B}position.{name}[{use}]" for name in code for use in uses)
    return (*named, f"model.bridge.pos_{uses[0]}")


def _elsewhere(s: Site) -> Tensor:
    raise NotHeld("decoding is a chain of its own: no stage of it is fed alone")


STAGES: tuple[Stage, ...] = (
    Stage(
        "pos.freq",
        (),
        lambda s: position.frequencies(s.model.config.decoder.hidden_size),
        (_B + "position.frequencies",),
        "§5",
        "table of position frequencies, torch on the CPU",
    ),
    Stage(
        "vision.tower",
        ("inputs.images",),
        _vision_tower,
        ("vidi.towers.siglip.", "vidi.inputs.pixels.", "model.vision_tower", *_TOWER),
        "§3.1",
        "SigLIP2 at hidden state -2",
    ),
    Stage(
        "vision.pad",
        ("vision.tower",),
        lambda s: fold.pad(s["vision.tower"], s.model.config.image_pool_size),
        (_B + "fold.pad",),
        "§3.2",
        "patch grid padded to even, right and below",
    ),
    Stage(
        "vision.resize{g}",
        ("vision.pad",),
        lambda s: fold.resize(s["vision.pad"][s.frames], s.group.side),
        (_B + "fold.resize", _B + "fold.resized_side", _B + "visual.groups"),
        "§3.3",
        "bilinear, when the token budget acts",
    ),
    Stage(
        "vision.space_to_depth{g}",
        ("vision.pad", "vision.resize{g}"),
        _space_to_depth,
        (_B + "fold.space_to_depth",),
        "§3.4",
        "2×2 patches into channels",
    ),
    Stage(
        "vision.projector{g}",
        ("vision.space_to_depth{g}",),
        lambda s: s.model.bridge.image_projector(s["vision.space_to_depth{g}"].permute(0, 2, 3, 1)),
        (_B + "projector.", "model.bridge.image_projector"),
        "§3.5",
        "Linear, GELU (erf), Linear",
    ),
    Stage(
        "vision.norm{g}",
        ("vision.projector{g}",),
        lambda s: s.model.bridge.image_norm(s["vision.projector{g}"]),
        (*_RMS, "model.bridge.image_norm"),
        "§3.5",
        "bridge RMSNorm",
    ),
    Stage(
        "vision.pos_h.embed{g}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_h, "h", s.group.side // s.model.config.image_pool_size)[None, :, None],
        _position("h"),
        "§5",
        "height embedding, before rms",
    ),
    Stage(
        "vision.pos_h{g}",
        ("vision.norm{g}", "vision.pos_h.embed{g}"),
        lambda s: position.add(s["vision.norm{g}"], s["vision.pos_h.embed{g}"]),
        (_B + "position.add[h]", *_RMS),
        "§3.6",
        "+ rms(height)",
    ),
    Stage(
        "vision.pos_w.embed{g}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_w, "w", s.group.side // s.model.config.image_pool_size)[None, None],
        _position("w"),
        "§5",
        "width embedding, before rms",
    ),
    Stage(
        "vision.pos_w{g}",
        ("vision.pos_h{g}", "vision.pos_w.embed{g}"),
        lambda s: position.add(s["vision.pos_h{g}"], s["vision.pos_w.embed{g}"]),
        (_B + "position.add[w]", *_RMS),
        "§3.6",
        "+ rms(width)",
    ),
    Stage(
        "vision.pos_t.embed.{b}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_t, f"t_v.{s.places['b']}", s.bench.num_frames[int(s.places["b"])])[
            :, None, None
        ],
        _position("t", "t_v"),
        "§5",
        "time embedding of one video, before rms",
    ),
    Stage(
        "vision.pos_t{g}",
        ("vision.pos_w{g}", "vision.pos_t.embed.{b}"),
        _pos_t,
        (_B + "position.add[t]", *_RMS),
        "§3.6",
        "+ rms(time), per video",
    ),
    Stage(
        "vision.packed",
        ("vision.pos_t{g}",),
        _vision_packed,
        (
            _B + "pack.to_stream[split]",
            "vidi.inputs.batch.pad_rows",
            _B + "visual.encode",
            _B + "visual._frame_tokens[flatten]",
        ),
        "§3.7",
        "(t, h, w) flattened per video, zero-padded at the right",
    ),
    Stage(
        "vision.mask",
        ("vision.packed", "inputs.images"),
        lambda s: mask.keep_tokens(s["vision.packed"], s.bench.signal("v")),
        (_B + "mask.keep_tokens", _B + "mask.has_signal[v]"),
        "§3.8",
        "kept visual tokens",
    ),
    Stage(
        "vision.llm_norm",
        ("vision.packed", "vision.mask"),
        lambda s: s.model.bridge.llm_norm(s["vision.packed"]) * s["vision.mask"][..., None],
        (_B + "pack.to_stream[norm]", *_RMS, "model.bridge.llm_norm"),
        "§3.9",
        "shared RMSNorm, then the mask",
    ),
    Stage(
        "audio.tower",
        ("inputs.audios",),
        _audio_tower,
        ("vidi.towers.whisper.", "model.audio_tower", *_TOWER),
        "§4.1",
        "Whisper encoder",
    ),
    Stage(
        "audio.trim",
        ("audio.tower", "inputs.audio_sizes"),
        _trim,
        (_B + "audio.trim", _B + "audio.num_positions", "vidi.inputs.batch.pad_rows"),
        "§4.2",
        "pieces joined, cut to the sound's length, zero-padded",
    ),
    Stage(
        "audio.pool",
        ("audio.trim",),
        lambda s: audio.pool(s["audio.trim"], s.model.bridge.audio_pool),
        (_B + "audio.pool", "model.bridge.audio_pool"),
        "§4.3",
        "Conv1d of kernel and stride 5: width change and pooling in one",
    ),
    Stage(
        "audio.projector",
        ("audio.pool", "inputs.audio_sizes"),
        _audio_projector,
        (_B + "audio.encode", _B + "audio.num_tokens", _B + "projector.", "model.bridge.audio_projector"),
        "§4.4",
        "Linear, GELU (erf), Linear",
    ),
    Stage(
        "audio.norm",
        ("audio.projector",),
        lambda s: s.model.bridge.audio_norm(s["audio.projector"]),
        (*_RMS, "model.bridge.audio_norm"),
        "§4.4",
        "bridge RMSNorm",
    ),
    Stage(
        "audio.pos_t.embed.{b}",
        ("pos.freq",),
        lambda s: s.embed(s.model.bridge.pos_t, f"t_a.{s.places['b']}", s.bench.audio_tokens[int(s.places["b"])]),
        _position("t", "t_a"),
        "§5",
        "time embedding of one sample's audio, before rms",
    ),
    Stage(
        "audio.pos_t",
        ("audio.norm", "audio.pos_t.embed.{b}"),
        _audio_pos_t,
        (_B + "position.add[t_a]", *_RMS),
        "§4.4",
        "+ rms(time)",
    ),
    Stage(
        "audio.packed",
        ("audio.pos_t",),
        lambda s: batches.pad_rows(list(s["audio.pos_t"].split(s.bench.audio_tokens))),
        (_B + "pack.to_stream[split]", "vidi.inputs.batch.pad_rows"),
        "§4.5",
        "zero-padded at the right",
    ),
    Stage(
        "audio.mask",
        ("audio.packed", "inputs.audios"),
        lambda s: mask.keep_tokens(s["audio.packed"], s.bench.signal("a")),
        (_B + "mask.keep_tokens", _B + "mask.has_signal[a]"),
        "§4.5",
        "kept audio tokens",
    ),
    Stage(
        "audio.llm_norm",
        ("audio.packed", "audio.mask"),
        lambda s: s.model.bridge.llm_norm(s["audio.packed"]) * s["audio.mask"][..., None],
        (_B + "pack.to_stream[norm]", *_RMS, "model.bridge.llm_norm"),
        "§4.5",
        "shared RMSNorm, then the mask",
    ),
    Stage(
        "text.embeds",
        ("inputs.input_ids",),
        lambda s: _text_tap(s, "text.embeds"),
        (_D + "decoder.Decoder.embed_tokens", "vidi.inputs.batch.pack_text[ids]", "vidi.model.VidiModel.embed_text"),
        "§6",
        "kept tokens packed left, embedded, padding exact 0",
    ),
    Stage(
        "text.mask",
        ("inputs.input_ids",),
        lambda s: _text_tap(s, "text.mask"),
        ("vidi.inputs.batch.pack_text[mask]",),
        "§6",
        "kept text tokens, the placeholder gone",
    ),
    Stage(
        "text.labels",
        ("inputs.input_ids", "inputs.labels"),
        lambda s: _text_tap(s, "text.labels"),
        ("vidi.inputs.batch.pack_text[labels]",),
        "§6",
        "labels, the placeholder gone",
    ),
    Stage(
        "rope.position_ids",
        ("text.embeds",),
        lambda s: _rope(s, "position_ids"),
        (_D + "decoder.Decoder.text_rows[positions]",),
        "§6",
        "0, 1, 2, …",
    ),
    Stage(
        "rope.cos",
        ("text.embeds",),
        lambda s: _rope(s, "cos"),
        (
            "vidi.attention.rope.angles[cos]",
            "vidi.attention.rope.inverse_frequencies",
            _D + "decoder.Decoder.text_rows[angles]",
        ),
        "§7",
        "rotary cosines",
    ),
    Stage(
        "rope.sin",
        ("text.embeds",),
        lambda s: _rope(s, "sin"),
        (
            "vidi.attention.rope.angles[sin]",
            "vidi.attention.rope.inverse_frequencies",
            _D + "decoder.Decoder.text_rows[angles]",
        ),
        "§7",
        "rotary sines",
    ),
    Stage(
        "layer.0.image_input",
        ("vision.llm_norm",),
        lambda s: s.model.decoder.scaled(s["vision.llm_norm"]),
        (_D + "decoder.Decoder.scaled", "vidi.precision.sqrt_in"),
        "§6",
        "visual stream · sqrt(D)",
    ),
    Stage(
        "layer.0.audio_input",
        ("audio.llm_norm",),
        lambda s: s.model.decoder.scaled(s["audio.llm_norm"]),
        (_D + "decoder.Decoder.scaled", "vidi.precision.sqrt_in"),
        "§6",
        "audio stream · sqrt(D)",
    ),
    Stage(
        "layer.0.input",
        ("text.embeds",),
        lambda s: s.model.decoder.scaled(s["text.embeds"]),
        (_D + "decoder.Decoder.scaled", "vidi.precision.sqrt_in"),
        "§6",
        "text · sqrt(D)",
    ),
    Stage(
        "layer.{i}.t2t",
        ("layer.{i}.input", "rope.cos", "rope.sin", "text.mask"),
        lambda s: s.layer.text_to_text(s.layer.input_norm(s["layer.{i}.input"]), s.text),
        (
            _LAYER + "text_to_text[whole]",
            _ATTENTION + "attend_self",
            _ATTENTION + "keys_values",
            _ATTENTION + "output",
            "vidi.attention.mask.sees[whole]",
            "vidi.attention.rope.apply",
            _PART + "window",
            *_SELF,
            *_QUERIES,
        ),
        "§7",
        "causal self-attention, window on even layers",
    ),
    Stage(
        "xattn.{i}.{m}.q",
        ("layer.{i}.input",),
        lambda s: s.layer.attention.queries(s.layer.input_norm(s["layer.{i}.input"])).transpose(1, 2),
        _QUERIES,
        "§7",
        "queries, not rotated",
    ),
    Stage(
        "xattn.{i}.{m}.k",
        ("{stream}",),
        lambda s: _xattn_key(s, 0),
        _STREAM_KEYS,
        "§7",
        "stream keys, not rotated; recorded with heads repeated",
    ),
    Stage(
        "xattn.{i}.{m}.v",
        ("{stream}",),
        lambda s: _xattn_key(s, 1),
        _STREAM_KEYS,
        "§7",
        "stream values; recorded with heads repeated",
    ),
    Stage("xattn.{i}.{m}.q_mask", ("text.mask",), lambda s: s["text.mask"], (), "§9", "the text mask"),
    Stage("xattn.{i}.{m}.kv_mask", ("{path}.mask",), lambda s: s["{path}.mask"], (), "§9", "the stream's mask"),
    *(
        Stage(
            f"xattn.{{i}}.{{m}}.unpad.{name}",
            ("xattn.{i}.{m}.q", "xattn.{i}.{m}.k", "xattn.{i}.{m}.v", "text.mask", "{path}.mask"),
            _unpad,
            (f"vidi.attention.unpad._unpad_xattn_input[{name}]", *(f"vidi.attention.unpad.{site}" for site in sites)),
            "§9",
            what,
        )
        for name, sites, what in (
            ("indices_q", ("Rows.indices",), "flat places of the kept queries"),
            ("cu_seqlens_q", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative query lengths"),
            ("cu_seqlens_k", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative key lengths"),
            ("max_seqlen", ("Rows.max_seqlen", "Rows.lengths_B"), "longest query and key length"),
            ("q", ("Rows.indices", "unpad"), "kept queries on one axis"),
            ("k", ("Rows.indices", "unpad"), "kept keys on one axis"),
            ("v", ("Rows.indices", "unpad"), "kept values on one axis"),
        )
    ),
    Stage(
        "xattn.{i}.{m}.out",
        ("xattn.{i}.{m}.q", "xattn.{i}.{m}.k", "xattn.{i}.{m}.v", "text.mask", "{path}.mask"),
        _xattn_out,
        (_ATTENTION + "attend_stream", "vidi.attention.unpad.", *_CROSS),
        "§7",
        "cross-attention, before the output projection",
    ),
    Stage(
        "layer.{i}.t2{m}",
        ("layer.{i}.input", "rope.cos", "rope.sin", "text.mask", "{stream}", "{path}.mask"),
        lambda s: s.layer.text_to_stream(s.layer.input_norm(s["layer.{i}.input"]), s.text, s.keys, s.places["m"]),
        (
            _LAYER + "text_to_stream",
            _ATTENTION + "attend_stream",
            _ATTENTION + "output",
            "vidi.attention.unpad.",
            *_CROSS,
            *_QUERIES,
            *_STREAM_KEYS,
        ),
        "§7",
        "text to one stream",
    ),
    Stage(
        "layer.{i}.t2{m}.gate",
        ("{path}.mask",),
        lambda s: s["{path}.mask"].any(-1),
        (),
        "§7",
        "does the sample keep a token",
    ),
    Stage(
        "layer.{i}.image_stream",
        ("{stream}",),
        _stream,
        _STREAM,
        "§7",
        "visual stream after the layer",
    ),
    Stage(
        "layer.{i}.audio_stream",
        ("{stream}",),
        _stream,
        _STREAM,
        "§7",
        "audio stream after the layer",
    ),
    Stage(
        "layer.{i}.output",
        ("layer.{i}.input", "layer.{i}.t2t", "layer.{i}.t2v", "layer.{i}.t2a"),
        _output,
        (_LAYER + "merge", *_FEED),
        "§7",
        "text after the layer",
    ),
    Stage(
        "final.norm",
        ("{last}",),
        lambda s: s.model.decoder.norm(s["{last}"]),
        (_D + "norm.", "model.decoder.norm"),
        "§8",
        "final GemmaNorm",
    ),
    Stage(
        "logits",
        ("final.norm",),
        lambda s: s.model.decoder.logits(s["final.norm"]),
        (_D + "decoder.Decoder.logits", _D + "decoder.softcap"),
        "§8",
        "tied head, softcap",
    ),
    Stage(
        "loss.per_token",
        ("logits", "text.labels"),
        _per_token,
        ("vidi.loss.per_token", "vidi.loss.shift"),
        "§8",
        "cross-entropy of each position",
    ),
    Stage(
        "loss.{n}",
        ("loss.per_token", "text.labels"),
        _mean_loss,
        ("vidi.loss.mean_above", "vidi.loss.shift"),
        "§8",
        "mean above the cut",
    ),
    Stage(
        "{n}.cached.logits",
        ("logits",),
        _elsewhere,
        (
            "vidi.cache.",
            "vidi.generate.forced_logits",
            "vidi.model.VidiModel.prefill",
            _D + "decoder.Decoder.step",
            _D + "decoder.Decoder.forward[cache]",
            "vidi.attention.mask.sees[cached]",
            _LAYER + "text_to_text[cached]",
        ),
        "§7",
        "logits of decoding step by step, equal to those of whole passes",
    ),
    Stage("{n}.tokens", ("logits",), _elsewhere, ("vidi.generate.greedy",), "§2", "what greedy decoding says"),
    Stage("{n}.lengths", ("logits",), _elsewhere, ("vidi.generate.greedy",), "§2", "where each row stops"),
)


def find(stage_id: str) -> tuple[Stage, dict[str, str]] | None:
    """The registry's entry for an id and the places filled in; None for what has no isolated form (layer inputs, decoding,
    gradients)."""
    for stage in STAGES:
        match = stage.pattern.match(stage_id)
        if match:
            places = match.groupdict()
            if stage.template.endswith(("image_stream", "audio_stream")):
                places["m"] = "v" if stage.template.endswith("image_stream") else "a"
            return stage, places
    return None


def isolated(bench: Bench, stage_ids: list[str]) -> Iterator[tuple[str, Tensor]]:
    """(id, tensor) of every stage that this case can feed from its goldens.

    A stage that reads raw inputs alone is left out: fed alone or chained, it is the same run.
    """
    bench.model.eval()
    for stage_id in stage_ids:
        found = find(stage_id)
        if found is None or found[0].reads_raw:
            continue
        try:
            with torch.no_grad():
                value = found[0].run(Site(bench, *found))
        except NotHeld:
            continue
        yield stage_id, value
