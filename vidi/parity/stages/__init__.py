"""The one table of stages: everything that the harness knows of a stage stands in its entry, in a file for each part of the
pipeline.

Places: `{i}` a layer, `{m}` v or a (visual, audio), `{b}` a sample, `{g}` nothing or the number of a video that has a token
budget of its own, `{n}` a name. Inputs may have derived places too (`vidi.parity.bench.Site.id`). Dim letters of shapes: B
samples, F frames of all videos, P audio pieces, L patches, l positions of a piece, S padded grid side, s its side after
resize, h w token grid, C encoder width, D width, V A T visual, audio, text tokens, n audio tokens of all samples, N heads, H
head dim, U vocabulary, · a length of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stageparity.stage import Place, Stage, Stages
from vidi.parity.stages import audio, cached, head, layers, text, visual

__all__ = ["PLACES", "SECTIONS", "STAGES", "expected"]

PLACES = {
    "i": Place(loop=True),
    "m": Place("[va]", loop=True, values=("v", "a")),
    "b": Place(),
    "g": Place(r"(?:\.\d+)?"),
    "n": Place(r".+"),
}
STAGES = Stages(
    (
        *visual.STAGES, *audio.STAGES, *text.STAGES, *layers.STAGES, *cached.LAYERS,
        *head.STAGES, *cached.HEAD, *head.DECODING,
    ),
    PLACES,
)  # fmt: skip
SECTIONS = {
    "§1": "Sizes of the released checkpoint",
    "§2": "Inputs",
    "§3": "Visual path",
    "§4": "Audio path",
    "§5": "Position embedding",
    "§6": "Text",
    "§7": "Decoder layer (decomposed attention)",
    "§8": "Head and loss",
    "§9": "Unpadding for varlen kernels",
}


def expected(
    config: Mapping[str, Any],
    *,
    batch: int = 1,
    without: Iterable[str] = (),
    xattn_layers: Iterable[int] | None = None,
    own_grids: bool = False,
) -> list[str]:
    """All stage ids of a forward pass with this config, in pipeline order (spec §3 to §8).

    config: the official dict (`num_hidden_layers` is read). batch: samples. without: conditions (`Stage.when`) that the case
    lacks: visual, audio, resize, unpad, labels. xattn_layers: layers whose cross-attention is taken apart (default: first
    and last). own_grids: a token budget for each video, so that grids do not join.
    """
    num_layers = int(config["num_hidden_layers"])
    taken = {0, num_layers - 1} if xattn_layers is None else set(xattn_layers)
    mistral = config.get("model_type") == "dattn_mistral"
    lacking = {"loss", "decoding", "cached", *(("fold", "resize") if mistral else ("conv", "head")), *without}
    samples = [str(b) for b in range(batch)]
    values = {
        "i": [str(i) for i in range(num_layers)],
        "m": [m for m, stream in (("v", "visual"), ("a", "audio")) if stream not in lacking],
        "b": samples,
        "g": [f".{b}" for b in samples] if own_grids else [""],
    }
    if not values["m"]:
        lacking.add("streams")

    def given(stage: Stage, places: Mapping[str, str]) -> bool:
        return not lacking & set(stage.when) and ("taken" not in stage.when or int(places["i"]) in taken)

    return STAGES.expand(values, given)
