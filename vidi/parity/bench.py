"""A stage on the bench: what it is, and a golden case that feeds it alone.

A template stands for a family of ids: ``{i}`` a layer, ``{m}`` a modality (v, a), ``{b}`` a sample, ``{g}`` nothing or the
number of a video with a token budget of its own, ``{n}`` a name. Derived places: ``{path}`` vision or audio, ``{name}``
image or audio, ``{stream}`` the stream that enters the layer, ``{last}`` the text after the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.bridge import audio, mask, position, visual
from vidi.bridge.visual import Group
from vidi.cache import CrossKeys
from vidi.decoder.layer import DecoderLayer, TextRows
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed
from vidi.parity.golden import Whole
from vidi.parity.store import Case, Targets

__all__ = ["Bench", "NotHeld", "Site", "Stage"]

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
