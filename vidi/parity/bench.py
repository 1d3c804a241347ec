"""A golden case on the bench: our model, the goldens that feed a stage alone, and what all stages need to know of its shape."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from stageparity.arrays import to_numpy
from stageparity.golden import Whole
from stageparity.stage import NotHeld, Stage, Stages, fill
from stageparity.store import Case, Targets
from stageparity.subject import Tap
from vidi.attention.unpad import Rows
from vidi.bridge import audio, mask, position
from vidi.bridge.fold import Group
from vidi.cache import CrossKeys
from vidi.decoder.layer import DecoderLayer, TextRows
from vidi.inputs.batch import Batch, pack_text
from vidi.model import VidiModel
from vidi.parity import feed, stepped, trace
from vidi.parity.goldens import inputs_of
from vidi.parity.places import derived

__all__ = ["Bench", "Site"]

HALF = (torch.bfloat16, torch.float16)


class Bench:
    """As `stageparity.subject.Bench`, and what its stages ask for."""

    def __init__(self, case: Case, model: VidiModel, targets: Targets, stages: Stages) -> None:
        self.case, self.model, self.targets, self.stages = case, model, targets, stages
        self._held: dict[str, Tensor] = {}
        self._features: dict[tuple[Any, ...], Tensor] = {}

    # ---- what the harness asks for ------------------------------------------------------------------------------------

    def run(self, tap: Tap) -> None:
        with contextlib.ExitStack() as undo:
            for tower in (self.model.vision_tower, self.model.audio_tower):
                if isinstance(tower, nn.Module):
                    undo.enter_context(self._once(tower))
            trace.run(self.case, self.model, tap)

    @contextlib.contextmanager
    def _once(self, tower: nn.Module) -> Iterator[None]:
        """What a tower makes of the same input is computed once for all runs on this bench: it reads raw inputs alone."""
        forward, own = tower.forward, vars(tower).get("forward")

        def remembered(x: Tensor, *given: str) -> Tensor:
            content = hashlib.sha256(to_numpy(x)[0].tobytes()).digest()
            key = (tower, content, given, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            if key not in self._features:
                self._features[key] = forward(x, *given)
            return self._features[key]

        tower.forward = remembered
        try:
            yield
        finally:
            del tower.forward
            if own is not None:
                tower.forward = own

    def alone(self, stage_id: str) -> Tensor:
        site = self._site(stage_id)
        if site.stage.run is None:
            raise NotHeld(f"no stage feeds {stage_id} alone")
        if self.model.training:  # telling every module so takes longer than most stages
            self.model.eval()
        with torch.no_grad():
            return site.stage.run(site)

    def id(self, template: str, stage_id: str) -> str:
        return self._site(stage_id).id(template)

    def rounded(self, stage_id: str) -> Any:
        site, model = self._site(stage_id), self.model
        if site.stage.rounded is None or model.dtype not in HALF or self.targets.variant != "cast":
            raise NotHeld("nothing says where this rounds")
        if not isinstance(model, VidiModel) or (model.device.type, model.backend) != ("cpu", "eager"):
            raise NotHeld("other kernels round elsewhere")

        def to(x: np.ndarray) -> np.ndarray:
            return torch.from_numpy(np.ascontiguousarray(x)).to(model.dtype).float().numpy()

        return site.stage.rounded(site, to)

    def _site(self, stage_id: str) -> Site:
        found = self.stages.find(stage_id)
        if found is None:
            raise NotHeld(f"{stage_id} is no stage")
        return Site(self, *found)

    # ---- what stages ask for ------------------------------------------------------------------------------------------

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return inputs_of(self.case)

    @cached_property
    def batch(self) -> Batch:
        if "inputs.input_ids" not in self.inputs:
            raise NotHeld("the case holds no ids beside those of its decoding")
        return feed.batch_of(self.inputs)

    @cached_property
    def noise(self) -> position.Noise | None:
        noise = feed.noise_of(self.inputs)
        return (lambda axis, length: noise[axis]) if noise else None

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
    def stepped(self) -> dict[str, Tensor]:
        """The text's stages in decoding, from goldens."""
        batch, judged = self.batch, {e.golden for e in self.stages if e.alone_only}
        ids_BT, _, _ = pack_text(batch.input_ids_BT, batch.keep_BT, placeholder=self.model.config.image_placeholder)

        def golden(stage_id: str) -> Tensor | None:
            found = self.stages.find(stage_id)
            return self.golden(stage_id) if found and found[0].template in judged and self.holds(stage_id) else None

        ids_BT, keep_BT = ids_BT.to(self.model.device), self.golden("text.mask")
        return stepped.run(self.model.decoder, ids_BT, keep_BT, list(self._cross()), golden, self.model.backend)

    def _cross(self) -> Iterator[dict[str, CrossKeys]]:
        """What text reads of the streams, layer by layer."""
        for i, layer in enumerate(cast("Sequence[DecoderLayer]", self.model.decoder.layers)):
            cross = {}
            for m in "va":
                places = derived({"i": str(i), "m": m}, len(self.model.decoder.layers))
                if self.holds(mask := f"{places['path']}.mask"):
                    rows = Rows(self.golden(mask))
                    cross[m] = layer.stream_keys(self.golden(places["stream"]), rows, m)
            yield cross

    @cached_property
    def num_frames(self) -> list[int]:
        if "inputs.feat_index" in self.inputs:
            return [len(self.inputs["inputs.feat_index"])]
        return [len(x) for x in self.batch.images or ()]

    @cached_property
    def plan(self) -> list[Group]:
        return [g for g in self.model.bridge.image_grid.groups(self.num_frames, self.model.config) if g.num_frames]

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
        return fill(template, derived(self.places, self.bench.model.config.decoder.num_layers))

    @property
    def sample(self) -> int:
        return int(self.places["b"])

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
    def grid(self) -> int:
        """Visual tokens a side."""
        return self.model.bridge.image_grid.tokens_side(self.group)

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
