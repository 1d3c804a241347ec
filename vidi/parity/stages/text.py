"""Text and rotary angles (spec §6, §7)."""

from __future__ import annotations

from functools import partial

from stageparity.code import code
from stageparity.stage import Stage
from vidi.parity.stages.code import ALONE, DECODER, decoder
from vidi.parity.stages.visual import PURE, batches, rounded

__all__ = ["STAGES"]

rope, embed_text = code("vidi.attention.rope"), code("vidi.model.Pipeline.embed_text")
ANGLES = (rope.inverse_frequencies, decoder.text_rows["angles"])

STAGES: tuple[Stage, ...] = (
    Stage(
        "text.embeds", "kept tokens packed left, embedded, padding exact 0", "§6", "B T D",
        inputs=("inputs.input_ids",), run=ALONE.embed_text, tags=PURE,
        code=(decoder.embed_tokens, batches.pack_text["ids"], embed_text["embeds"]),
    ),
    Stage(
        "text.mask", "kept text tokens, the placeholder gone", "§6", "B T",
        exact=True, inputs=("inputs.input_ids",), run=ALONE.embed_text,
        code=(batches.pack_text["mask"], embed_text["mask"]),
    ),
    Stage(
        "text.labels", "labels, the placeholder gone", "§6",
        exact=True, inputs=("inputs.input_ids", "inputs.labels"), run=ALONE.embed_text, when=("labels",),
        code=(batches.pack_text["labels"],),
    ),
    Stage(
        "rope.position_ids", "0, 1, 2, …", "§6",
        exact=True, inputs=("text.embeds",), run=partial(ALONE.rope, "position_ids"), wiring=(DECODER["position_ids"],),
        code=(decoder.text_rows["positions"],),
    ),
    Stage(
        "rope.cos", "rotary cosines", "§7", "1 T H",
        inputs=("text.embeds",), run=partial(ALONE.rope, "cos"), wiring=(DECODER["cos"],),
        code=(rope.angles["cos"], *ANGLES),
        rounded=partial(rounded.turned, "cos"),
    ),
    Stage(
        "rope.sin", "rotary sines", "§7", "1 T H",
        inputs=("text.embeds",), run=partial(ALONE.rope, "sin"), wiring=(DECODER["sin"],),
        code=(rope.angles["sin"], *ANGLES),
        rounded=partial(rounded.turned, "sin"),
    ),
)  # fmt: skip
