"""The stage registry: every stage of the forward pass, in order, with what feeds it and the code that computes it.

`Stage.run` computes a stage from golden inputs alone (isolated: one wrong stage reds one row). `Stage.sites` names the
code that is the stage's own; a fault patched in there must first be reported here. The entries: `vidi/parity/registry/`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import Tensor

from vidi.parity.bench import Bench, NotHeld, Site, Stage
from vidi.parity.registry import audio, head, layers, text, visual

__all__ = ["STAGES", "Bench", "NotHeld", "Site", "Stage", "find", "isolated", "template_of"]

STAGES: tuple[Stage, ...] = (*visual.STAGES, *audio.STAGES, *text.STAGES, *layers.STAGES, *head.STAGES)


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


def template_of(stage_id: str) -> str:
    """The family that an id belongs to; for what is no entry of its own, its numbers as places."""
    found = find(stage_id)
    return found[0].template if found else re.sub(r"\.\d+(?=\.|\Z)", ".{i}", stage_id)


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
