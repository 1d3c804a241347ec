"""What a tap returns is what the plain model goes on with, at every stage: only so can a run be forced."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest
import torch
from torch import Tensor

from tests import tiny
from vidi.checkpoint import synthetic
from vidi.inputs.batch import Batch
from vidi.model import VidiModel

LAYERS = 4
#: id -> what reads it first; {i} a layer, {n} the next one, {m} a modality, {name} its stream. Patterns are tried in order.
FEEDS = {
    r"vision\.tower": "vision.pad",
    r"vision\.pad": "vision.resize",
    r"vision\.resize": "vision.space_to_depth",
    r"vision\.space_to_depth": "vision.projector",
    r"vision\.projector": "vision.norm",
    r"vision\.norm": "vision.pos_h",
    r"vision\.pos_h": "vision.pos_w",
    r"vision\.pos_w": "vision.pos_t",
    r"vision\.(?P<axis>pos_\w)\.embed(\.\d)?": "vision.{axis}",
    r"audio\.tower": "audio.trim",
    r"audio\.trim": "audio.pool",
    r"audio\.pool": "audio.projector",
    r"audio\.projector": "audio.norm",
    r"audio\.norm": "audio.pos_t",
    r"audio\.pos_t\.embed\.\d": "audio.pos_t",
    r"(?P<path>\w+)\.pos_t": "{path}.packed",
    r"(?P<path>\w+)\.packed": "{path}.mask {path}.llm_norm",
    r"vision\.mask": "vision.llm_norm layer.0.t2v.gate xattn.0.v.out",
    r"audio\.mask": "audio.llm_norm layer.0.t2a.gate xattn.0.a.out",
    r"vision\.llm_norm": "layer.0.image_input",
    r"audio\.llm_norm": "layer.0.audio_input",
    r"text\.mask": "text.embeds layer.0.t2t xattn.0.v.out xattn.0.a.out",
    r"text\.embeds": "layer.0.input",
    r"text\.labels": "(labels)",
    r"rope\.position_ids": "rope.cos rope.sin layer.0.t2t",
    r"rope\.(cos|sin)": "layer.0.t2t layer.1.t2t",
    r"layer\.0\.(?P<name>\w+)_input": "xattn.0.{m}.k xattn.0.{m}.v layer.0.{name}_stream",
    r"layer\.(?P<i>\d)\.input": "layer.{i}.t2t xattn.{i}.v.q xattn.{i}.a.q layer.{i}.output",
    r"xattn\.(?P<i>\d)\.(?P<m>[va])\.[qk]": "xattn.{i}.{m}.out",
    r"xattn\.(?P<i>\d)\.(?P<m>[va])\.v": "xattn.{i}.{m}.out layer.{i}.{name}_stream",
    r"xattn\.(?P<i>\d)\.(?P<m>[va])\.out": "layer.{i}.t2{m}",
    r"layer\.(?P<i>\d)\.t2[tva]": "layer.{i}.output",
    r"layer\.\d\.t2[va]\.gate": "",  # told beside the keys, which say the same
    rf"layer\.{LAYERS - 1}\.(image|audio)_stream": "",  # feeds nothing (§7)
    r"layer\.(?P<i>\d)\.(?P<name>\w+)_stream": "xattn.{n}.{m}.k xattn.{n}.{m}.v layer.{n}.{name}_stream",
    rf"layer\.{LAYERS - 1}\.output": "final.norm",
    r"layer\.(?P<i>\d)\.output": "layer.{n}.input",
    r"final\.norm": "logits",
    r"logits": "(logits)",
}
STREAMS = {"v": "image", "a": "audio"}


def readers(stage: str) -> set[str]:
    pattern, reads = next((p, reads) for p, reads in FEEDS.items() if re.fullmatch(p, stage))
    match = re.fullmatch(pattern, stage)
    assert match is not None
    places = match.groupdict()
    places["n"] = str(int(places.get("i") or 0) + 1)
    if "m" in places:
        places["name"] = STREAMS[places["m"]]
    elif "name" in places:
        places["m"] = {name: m for m, name in STREAMS.items()}[places["name"]]
    return set(reads.format(**places).split())


@cache
def model() -> VidiModel:
    """A visual budget that shrinks the grid; frames in chunks that straddle the videos."""
    made = synthetic.create(tiny.config(visual_token_budget=150), 3, dtype=torch.float64).requires_grad_(False)
    made.frame_chunk = 2
    return made


def batch(seed: int = 0) -> Batch:
    samples = [tiny.sample(9, 3, 60, seed=seed), tiny.sample(5, 2, 30, seed=seed + 1)]
    return tiny.make([dataclasses.replace(s, labels=[-100, *s.ids[1:]]) for s in samples])


def run(tap: tiny.Seen, seed: int = 0) -> tiny.Seen:
    """All stages, and what leaves the model besides."""
    tap["(logits)"] = model()(batch(seed), last_stream=True, tap=tap)
    labels_BT = model().embed_text(batch(seed), lambda stage, x: tap.changed(stage, x))[2]
    assert labels_BT is not None
    tap["(labels)"] = labels_BT
    return tap


class Changing(tiny.Seen):
    """Keeps what a stage was before its change."""

    def __init__(self, stage: str = "") -> None:
        self.stage = stage

    def __call__(self, stage: str, x: Tensor) -> Tensor:
        return self.changed(stage, super().__call__(stage, x))

    def changed(self, stage: str, x: Tensor) -> Tensor:
        if stage != self.stage:
            return x
        if x.dtype == torch.bool:
            return ~x
        return x + 1 if not x.is_floating_point() else x * 1.5 + 0.25


@cache
def clean() -> tiny.Seen:
    return run(Changing())


@pytest.mark.parametrize("stage", [stage for stage in clean() if not stage.startswith("(")])
def test_a_changed_stage_changes_what_reads_it(stage: str) -> None:
    found, before = run(Changing(stage)), clean()
    assert found.keys() == before.keys()
    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert readers(stage) <= moved
    assert stage not in moved, "it reads what it made itself"
    if not readers(stage):
        assert moved == set()


def test_a_stage_in_parts_is_forced_part_by_part() -> None:
    """Another video's features, one chunk after the other, in the place of this one's: then the answer is the other's."""
    held, done = clean(), dict.fromkeys(("vision.tower", "audio.tower", "text.embeds"), 0)

    def force(stage: str, x: Tensor) -> Tensor:
        if stage not in done:
            return x
        start, done[stage] = done[stage], done[stage] + len(x)
        return held[stage][start : done[stage]]

    assert (model()(batch(7)) - held["(logits)"]).abs().max() > 0.1
    tiny.assert_close(model()(batch(7), tap=force), held["(logits)"], 1e-12)
    assert done["vision.tower"] == 5
