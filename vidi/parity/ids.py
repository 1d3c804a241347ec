"""The vocabulary of stage ids: their order in the pipeline, their class, their axes. No torch, no model.

A stage id is the name of a tensor in the recordings (`vision.tower` ... `layer.3.t2v` ... `logits`). The same string is
the registry id, the key in a golden file, the row in a report and the word in a test id. Dim letters: B batch,
F frames (of all videos), P audio pieces, C encoder width, D decoder width, V/A/T visual, audio, text tokens,
N query heads, H head dim, h/w token grid, n tokens of all samples joined.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Axes", "axes", "before_float32", "expand", "is_exact", "matching", "order", "sort_ids"]

_BEFORE_FLOAT32 = re.compile(
    r"vision\.(tower|pad|conv|pool|(resize|space_to_depth|projector)(\.\d+)?)|audio\.(tower|trim|pool|projector)|text\.embeds"
)


@dataclass(frozen=True)
class Axes:
    """Which axes of a tensor tell rows (tokens) apart, and which one counts heads.

    `rows` together index one row; every other axis belongs to the row's content. Axes are given for the tensor's full
    rank, so `resolve` checks that they fit.
    """

    rows: tuple[int, ...]
    heads: int | None = None

    def resolve(self, ndim: int) -> Axes:
        """The same axes restricted to what a tensor of `ndim` axes has (a flattened twin loses the later ones)."""
        heads = self.heads if self.heads is not None and self.heads < ndim else None
        return Axes(tuple(axis for axis in self.rows if axis < ndim), heads)


@dataclass(frozen=True)
class _Kind:
    """One template of ids: `{i}` a layer, `{m}` v or a (visual, audio), `{b}` a sample, `{s}` nothing or `.b`.

    `{s}` stands where a token budget for each video gives every sample a grid of its own.
    """

    template: str
    exact: bool = False
    rows: tuple[int, ...] = (0, 1)
    heads: int | None = None


# In pipeline order. The comment at the right is the shape in the recordings.
_BEFORE_LAYERS = (
    _Kind("pos.freq", exact=True, rows=(0,)),  # (D/2,) float32, a named constant: equal or another table
    _Kind("vision.tower"),  # (F, patches, C)
    _Kind("vision.pad", rows=(0, 2, 3)),  # (F, C, side, side)
    _Kind("vision.resize{s}", rows=(0, 2, 3)),  # (F, C, side, side)
    _Kind("vision.space_to_depth{s}", rows=(0, 2, 3)),  # (F, 4C, h, w)
    _Kind("vision.conv", rows=(0, 2, 3)),  # 7B: (F, C, side, side)
    _Kind("vision.pool", rows=(0, 2, 3)),  # 7B: (F, C, P, P)
    _Kind("vision.projector{s}", rows=(0, 1, 2)),  # (F, h, w, D)
    _Kind("vision.norm{s}", rows=(0, 1, 2)),
    _Kind("vision.pos_h.embed{s}", rows=(1,)),  # (1, h, 1, D)
    _Kind("vision.pos_h{s}", rows=(0, 1, 2)),
    _Kind("vision.pos_w.embed{s}", rows=(2,)),  # (1, 1, w, D)
    _Kind("vision.pos_w{s}", rows=(0, 1, 2)),
    _Kind("vision.pos_t.embed.{b}", rows=(0,)),  # (F_b, 1, 1, D)
    _Kind("vision.pos_t{s}", rows=(0, 1, 2)),
    _Kind("vision.packed"),  # (B, V, D)
    _Kind("vision.mask", exact=True),  # (B, V)
    _Kind("vision.llm_norm"),
    _Kind("audio.tower"),  # (P, positions, C)
    _Kind("audio.trim"),  # (B, positions, C)
    _Kind("audio.pool", rows=(0, 2)),  # (B, D, positions // 5)
    _Kind("audio.projector", rows=(0,)),  # (n, D)
    _Kind("audio.norm", rows=(0,)),
    _Kind("audio.pos_t.embed.{b}", rows=(0,)),  # (A_b, D)
    _Kind("audio.pos_t", rows=(0,)),
    _Kind("audio.packed"),  # (B, A, D)
    _Kind("audio.mask", exact=True),
    _Kind("audio.llm_norm"),
    _Kind("text.embeds"),  # (B, T, D)
    _Kind("text.mask", exact=True),
    _Kind("text.labels", exact=True),
    _Kind("rope.position_ids", exact=True),
    _Kind("rope.cos"),  # (1, T, H)
    _Kind("rope.sin"),
)
_XATTN = (
    _Kind("xattn.{i}.{m}.q_mask", exact=True),
    _Kind("xattn.{i}.{m}.kv_mask", exact=True),
    _Kind("xattn.{i}.{m}.q", rows=(0, 2), heads=1),  # (B, N, T, H)
    _Kind("xattn.{i}.{m}.k", rows=(0, 2), heads=1),  # (B, N, V, H), heads repeated
    _Kind("xattn.{i}.{m}.v", rows=(0, 2), heads=1),
    _Kind("xattn.{i}.{m}.unpad.indices_q", exact=True),
    _Kind("xattn.{i}.{m}.unpad.cu_seqlens_q", exact=True),
    _Kind("xattn.{i}.{m}.unpad.cu_seqlens_k", exact=True),
    _Kind("xattn.{i}.{m}.unpad.max_seqlen", exact=True),
    _Kind("xattn.{i}.{m}.unpad.q", rows=(0,), heads=1),  # (n, N, H)
    _Kind("xattn.{i}.{m}.unpad.k", rows=(0,), heads=1),
    _Kind("xattn.{i}.{m}.unpad.v", rows=(0,), heads=1),
    _Kind("xattn.{i}.{m}.out", rows=(0, 1), heads=2),  # (B, T, N, H)
)
_LAYER = (
    _Kind("layer.{i}.input"),
    _Kind("layer.{i}.image_input"),
    _Kind("layer.{i}.audio_input"),
    _Kind("layer.{i}.t2t"),
    *(_Kind(k.template.replace("{m}", "v"), k.exact, k.rows, k.heads) for k in _XATTN),
    _Kind("layer.{i}.t2v"),
    _Kind("layer.{i}.t2v.gate", exact=True),
    *(_Kind(k.template.replace("{m}", "a"), k.exact, k.rows, k.heads) for k in _XATTN),
    _Kind("layer.{i}.t2a"),
    _Kind("layer.{i}.t2a.gate", exact=True),
    _Kind("layer.{i}.image_stream"),
    _Kind("layer.{i}.audio_stream"),
    _Kind("layer.{i}.output"),
)
_AFTER_LAYERS = (
    _Kind("final.norm"),
    _Kind("lm_head"),  # 7B: logits before their cast
    _Kind("logits"),  # (B, T, vocab); flattened over (B·T) in the loss case
    _Kind("loss.kept", exact=True),  # 7B: (N, 2) row and position of each labelled place
    _Kind("loss.labels", exact=True),
    _Kind("loss.logits", rows=(0,)),  # 7B: (N, vocab)
    _Kind("loss.per_token", rows=(0,)),
    _Kind("loss.{name}", rows=(0,)),
    _Kind("grad.{name}", rows=(0,)),
    _Kind("{variant}.nocache.logits"),  # (1, steps, vocab)
    _Kind("{variant}.prompt_ids", exact=True),
    _Kind("{variant}.greedy_nocache.tokens", exact=True),  # 7B: (B, steps) free-running
    _Kind("{variant}.tokens", exact=True),  # (B, steps)
    _Kind("{variant}.lengths", exact=True),  # (B,) tokens before a row stopped, the stop token counted
)

_PLACES = {"s": r"(\.(?P<b>\d+))?", "i": r"(?P<i>\d+)", "b": r"(?P<b>\d+)", "name": r".+", "variant": r"[^.]+"}


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", template)
    return re.compile("".join(_PLACES[p] if n % 2 else re.escape(p) for n, p in enumerate(parts)) + r"\Z")


# (group, position in the group, pattern, kind); all layers share group 1, ordered by layer first.
_TABLE = tuple(
    (group, place, _pattern(kind.template), kind)
    for group, kinds in enumerate((_BEFORE_LAYERS, _LAYER, _AFTER_LAYERS))
    for place, kind in enumerate(kinds)
)


# With a token budget for each video, grids differ in size: these ids then end in the video's number.
_PER_VIDEO = re.compile(r"(vision\.(?:resize|space_to_depth|projector|norm|pos_[hwt]|pos_[hw]\.embed))\.(\d+)\Z")


def _find(stage: str) -> tuple[tuple[int, int, int, int], _Kind] | None:
    if own := _PER_VIDEO.match(stage):
        (group, layer, place, _), kind = _find(own[1]) or ((9, 0, 0, 0), _Kind(own[1]))
        return (group, layer, place, int(own[2])), kind
    for group, place, pattern, kind in _TABLE:
        match = pattern.match(stage)
        if match:
            found = match.groupdict()
            return (group, int(found.get("i") or 0), place, int(found.get("b") or 0)), kind
    return None


def order(stage: str) -> tuple[int, int, int, int, str]:
    """Sort key: the place of a stage id in the pipeline. Inputs come first, ids nobody knows last, by name."""
    if stage.startswith("inputs."):
        return (-1, 0, 0, 0, stage)
    found = _find(stage)
    return (*found[0], stage) if found else (9, 0, 0, 0, stage)


def sort_ids(stages: Iterable[str]) -> list[str]:
    """Stage ids in pipeline order."""
    return sorted(stages, key=order)


def is_exact(stage: str) -> bool:
    """True for masks, gates, indices, lengths, ids and the table pos.freq, compared bit for bit; False for the rest.

    Bool and integer tensors are compared exactly under any id; this is the class that an id promises.
    """
    if stage.startswith("inputs."):
        return not re.match(r"inputs\.(images|audios|feat_scale)(\.|$)", stage)
    found = _find(stage)
    return bool(found and found[1].exact)


def before_float32(stage: str) -> bool:
    """Whether no step that the model does in float32 whatever its dtype (norms, positions; spec §6) comes before a stage:
    a float64 run is double precision up to there."""
    return _BEFORE_FLOAT32.fullmatch(stage) is not None


def axes(stage: str, ndim: int) -> Axes:
    """Row and head axes of a stage's tensor of `ndim` axes. A vector of weights (`grad.*`) is one row."""
    if stage.startswith("grad.") and ndim <= 1:
        return Axes(())
    found = _find(stage)
    if found is None:
        return Axes(tuple(range(max(ndim - 1, 1)))).resolve(ndim)
    if stage == "logits":
        return Axes(tuple(range(ndim - 1)))
    return Axes(found[1].rows, found[1].heads).resolve(ndim)


def matching(stages: Iterable[str], glob: str | None) -> list[str]:
    """The ids that match a shell pattern (`layer.*.t2v`, comma-separated alternatives), in pipeline order; None is
    all.
    """
    if glob is None:
        return sort_ids(stages)
    globs = [part.strip() for part in glob.split(",") if part.strip()]
    return sort_ids({stage for stage in stages if any(fnmatch.fnmatchcase(stage, part) for part in globs)})


def expand(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    resize: bool = False,
    unpad: bool = True,
    visual: bool = True,
    audio: bool = True,
    labels: bool = False,
    xattn_layers: Iterable[int] | None = None,
    own_grids: bool = False,
) -> list[str]:
    """All stage ids of a forward pass with this config, in pipeline order (spec §3 to §8).

    config: the official dict (`num_hidden_layers` is read). batch: samples, one time embedding each. resize: whether
    the token budget acts. unpad: whether some mask is not full, so that unpadded tensors exist. visual, audio:
    modalities present. labels: whether `text.labels` exists. xattn_layers: layers whose cross-attention is taken apart
    (default: first and last). own_grids: a token budget for each video, so that grids do not join.
    """
    layers = int(config["num_hidden_layers"])
    taken = {0, layers - 1} if xattn_layers is None else set(xattn_layers)
    present = {"v": visual, "a": audio}
    out: list[str] = []
    for kind in _BEFORE_LAYERS:
        stage = kind.template
        if stage in ("vision.conv", "vision.pool"):
            continue
        if (stage == "vision.resize{s}" and not resize) or (stage == "text.labels" and not labels):
            continue
        if (stage.startswith("vision.") and not visual) or (stage.startswith("audio.") and not audio):
            continue
        if stage == "pos.freq" and not (visual or audio):
            continue
        stage = stage.replace("{s}", ".{b}" if own_grids else "")
        out += [stage.replace("{b}", str(b)) for b in range(batch)] if "{b}" in stage else [stage]
    for i in range(layers):
        for kind in _LAYER:
            stage = kind.template.replace("{i}", str(i))
            modality = _modality(stage)
            if modality and not present[modality]:
                continue
            if stage.startswith("xattn.") and (i not in taken or (".unpad." in stage and not unpad)):
                continue
            if i > 0 and stage.endswith((".image_input", ".audio_input")):
                continue
            out.append(stage)
    return [*out, "final.norm", "logits"]


def _modality(stage: str) -> str | None:
    """v or a for a layer's stages that exist only with that modality."""
    match = re.match(r"xattn\.\d+\.([va])\.", stage)
    if match:
        return match[1]
    if re.search(r"\.(image_\w+|t2v(\.gate)?)$", stage):
        return "v"
    return "a" if re.search(r"\.(audio_\w+|t2a(\.gate)?)$", stage) else None
