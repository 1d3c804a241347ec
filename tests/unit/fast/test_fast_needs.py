"""What a run is said to need is what was measured."""

from __future__ import annotations

import inspect
import json
import math
from pathlib import Path

import pytest

from vidi.config import VidiConfig
from vidi.fast import needs
from vidi.fast.model import FastModel

FULL = VidiConfig.full()
ROOT = Path(__file__).parents[3]
MEASURED = json.loads((ROOT / "bench/results/h100/bench.json").read_text(encoding="utf-8"))["fast"]
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


def test_most_frames_is_the_edge() -> None:
    for memory in (24 << 30, 48 << 30, 80 << 30):
        most = needs.most_frames(FULL, memory)
        assert all(needs.count(FULL, n).fits(memory) for n in range(1, most + 1, 7))
        assert needs.count(FULL, most).fits(memory)
        assert not needs.count(FULL, most + 1).fits(memory)
    assert needs.most_frames(FULL, 20 << 30) == 0


def test_no_frames() -> None:
    with pytest.raises(ValueError, match="0 frames; at least 1"):
        needs.count(FULL, 0)


def test_the_defaults_are_those_of_the_fast_model() -> None:
    defaults = {name: p.default for name, p in inspect.signature(FastModel).parameters.items()}
    assert defaults["stream_chunk"] == needs.STREAM_CHUNK
    assert defaults["frame_batch"] == needs.FRAME_BATCH
    assert defaults["piece_batch"] == needs.PIECE_BATCH
    assert math.isclose(needs.MEL_FRAMES_PER_SECOND, FULL.audio.mel_frames / 30)
