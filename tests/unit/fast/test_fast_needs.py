"""What a run is said to need is what was measured."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
from pathlib import Path

import pytest

from vidi import sizes_7b
from vidi.config import VidiConfig
from vidi.fast import needs
from vidi.fast.model import FastModel

FULL = VidiConfig.full()
ROOT = Path(__file__).parents[3]
MEASURED = json.loads((ROOT / "bench/results/bench.json").read_text(encoding="utf-8"))["fast"]
BENCH_TEXT = 24 + 24 + 1  # prompt, steps and one more, as `vidi bench --max-new-tokens 24` makes room for


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: str(row["frames"]))
def test_measured_peaks(row: dict) -> None:
    found = needs.count(FULL, row["frames"], text_tokens=BENCH_TEXT)
    assert (found.visual_tokens, found.audio_tokens) == (row["visual_tokens"], row["audio_tokens"])
    assert found.peak / 2**30 == pytest.approx(row["peak_gib"], rel=0.01)
    assert needs.count(FULL, row["frames"]).peak / 2**30 == pytest.approx(row["peak_gib"], rel=0.05)


def test_every_term_counts() -> None:
    """Leaving one of the large terms out, or counting it twice, would miss the measured peaks by more than 1 %."""
    found = needs.count(FULL, 300, text_tokens=BENCH_TEXT)
    large = [name for name, size in found.terms.items() if size > 0.01 * found.peak]
    assert len(large) >= 5
    assert found.terms["keys and values"] == (58_800 + 3_000 + BENCH_TEXT) * 344_064


def test_terms_are_what_their_names_say() -> None:
    """In numbers of the release: width 3,584, inner width 14,336; 61,800 tokens in two chunks of whole tiles."""
    terms = needs.count(FULL, 300, text_tokens=BENCH_TEXT).terms
    assert terms["visual and audio tokens, padded and in one row"] == 2 * 2 * 61_800 * 3584
    assert terms["one chunk on its way through the layers"] == 2 * 30_976 * (2 * 3584 + 3 * 14_336)


def test_encoding_is_the_peak_of_a_shallow_decoder() -> None:
    shallow = dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, num_layers=1, intermediate_size=8))
    found = needs.count(shallow, 300, text_tokens=BENCH_TEXT)
    assert found.phase == "encode"
    assert found.terms["visual and audio tokens, while they are put together"] == 3 * 2 * 61_800 * 3584
    assert found.terms["one batch in a tower"] == 2 * 100 * 27**2 * (7 * 1152 + 4304)
    assert found.terms["features of all sound"] == 2 * 2 * 10 * 1500 * 1280


def test_one_frames_sound_takes_a_tower_more_than_its_picture() -> None:
    """A piece of sound is 30 s long also where a second is heard: the larger of both batches is what counts."""
    shallow = dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, num_layers=1, intermediate_size=8))
    found = needs.count(shallow, 1, text_tokens=BENCH_TEXT)
    assert found.phase == "encode"
    assert found.terms["one batch in a tower"] == 2 * 1500 * (7 * 1280 + 5120)


@pytest.mark.parametrize("gib", [20, 24, 48, 80])
def test_room_is_what_fits(gib: int) -> None:
    """As counting every length one by one says; at 48 GiB 1,221 frames need more than 1,800."""
    memory, longest = gib << 30, 5000
    runs = needs.room(FULL, memory)
    inside = {n for first, last in runs for n in range(first, min(last, longest) + 1)}
    assert inside == {n for n in range(1, longest + 1) if needs.count(FULL, n).fits(memory)}
    assert (gib == 20) == (not runs)
    assert all(after[0] > before[1] + 1 for before, after in itertools.pairwise(runs))


def test_the_7b_has_as_many_tokens_a_frame_whatever_their_number() -> None:
    """4 of each frame, 300 of 30 s of sound in windows of 5; its audio pool keeps 1,280 channels."""
    found = needs.count(sizes_7b.config("full"), 600, text_tokens=24)
    assert (found.visual_tokens, found.audio_tokens) == (2_400, 6_000)
    assert found.terms["weights in a second layout"] == 2 * (4096 * 32 * 8 * 128 + 1280 * 5 * 1280)
    assert needs.room(sizes_7b.config("full"), 80 << 30)[0][0] == 1


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="0 frames; at least 1"):
        needs.count(FULL, 0)


def test_the_defaults_are_those_of_the_fast_model() -> None:
    defaults = {name: p.default for name, p in inspect.signature(FastModel).parameters.items()}
    assert defaults["stream_chunk"] == needs.STREAM_CHUNK
    assert defaults["frame_batch"] == needs.FRAME_BATCH
    assert defaults["piece_batch"] == needs.PIECE_BATCH
    assert math.isclose(needs.MEL_FRAMES_PER_SECOND, FULL.audio.mel_frames / 30)
