"""The same stages in decoding, from caches (spec §7): judged alone, by the goldens of a whole pass (`vidi.parity.stepped`)."""

from __future__ import annotations

import re
from dataclasses import replace

from stageparity.code import code
from stageparity.stage import Stage
from stageparity.store import Targets
from vidi.parity.stages import head, layers
from vidi.parity.stages.code import ALONE, decoder, layer, mask

__all__ = ["HEAD", "LAYERS"]

#: what decoding has in the place of a whole pass
STEP = {
    layer.text_to_text["whole"]: layer.text_to_text["cached"],
    mask.sees["whole"]: mask.sees["cached"],
}
#: whose code it is beside that of a whole pass
OWN = {
    "layer.{i=0}.input": (decoder.step["input"], decoder.embed_tokens),
    "layer.{i}.t2t": (decoder.step["text"], decoder.text_rows, code("vidi.attention.rope"), code("vidi.cache")),
    "layer.{i}.t2{m}": (decoder.step["streams"],),
    "layer.{i}.output": (decoder.step["streams"], decoder.step["output"]),
    "final.norm": (decoder.step["norm"],),
    "lm_head": (decoder.step["head"],),
    "logits": (decoder.step["head"],),
}


def _cached(entry: Stage) -> Stage:
    return replace(
        entry,
        template=f"{entry.template}.cached",
        what=f"{entry.what}; in decoding",
        golden=entry.template,
        alone_only=_fed,
        run=ALONE.cached,
        wiring=(),
        code=(*(STEP.get(c, c) for c in entry.code), *OWN[entry.template]),
        when=(*entry.when, "cached"),
    )


def _fed(targets: Targets) -> bool:
    """Does a case hold whole what decoding reads beside the text? Of hundreds of frames it holds samples."""
    read = re.compile(r"text\.mask|layer\.\d+\.(image|audio)_(input|stream)")
    return "text.mask" in targets and all(targets.is_whole(stage) for stage in targets if read.fullmatch(stage))


LAYERS, HEAD = (tuple(_cached(entry) for entry in part.STAGES if entry.template in OWN) for part in (layers, head))
