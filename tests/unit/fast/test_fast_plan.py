"""Runs of keys cover every key once, in whole tiles; counted work is that of the published figures; the command parses."""

from __future__ import annotations

import argparse

import pytest
import torch

from vidi.commands import bench
from vidi.config import VidiConfig
from vidi.fast import floors, plan
from vidi.fast.streams import chunk_rows


@pytest.mark.parametrize("text", [1, 24, 1048])
@pytest.mark.parametrize(("visual", "audio"), [((0, 0), (0, 0)), ((0, 11760), (11760, 12360)), ((7, 90007), (5, 6))])
def test_runs_cover_every_key_once(text, visual, audio):
    found = plan.make(text, visual, audio, torch.device("cpu"))
    runs = found.runs_P3.tolist()
    begin = 0
    for branch, (span, end) in enumerate(zip(((0, text), visual, audio), found.ends, strict=True)):
        keys = [s for number, first, stop in runs[begin:end] for s in range(first, stop) if number == branch]
        assert keys == list(range(*span))
        assert all((first - span[0]) % plan.KEY_STEP == 0 for _, first, _ in runs[begin:end])
        begin = end
    assert begin == len(runs)
    assert len(runs) <= 66 + 3


def test_runs_are_as_long_wherever_their_keys_stand():
    """How many keys there are decides, not where the cross cache holds them."""
    cpu = torch.device("cpu")
    for audio in ((11760, 12360), (90_000, 90_600)):
        found = plan.make(24, (0, 11760), audio, cpu).runs_P3
        first = plan.make(24, (0, 11760), (0, 600), cpu).runs_P3
        assert torch.equal(found[:, 2] - found[:, 1], first[:, 2] - first[:, 1])


@pytest.mark.parametrize(("keys", "programs"), [(plan.MANY_KEYS - 1, 2), (plan.MANY_KEYS, 4)])
def test_keys_are_split_for_so_many_programs_a_processor(keys, programs):
    """Of 8 kv heads, over an H100's 132 processors, up to the rounding to whole tiles."""
    runs = len(plan.make(0, (0, keys), (0, 0), torch.device("cpu")).runs_P3)
    assert 0.95 * programs * 132 < 8 * runs <= programs * 132


@pytest.mark.parametrize(("keys", "pieces", "size"), [(0, 3, 64), (1, 1, 64), (64, 1, 64), (65, 1, 128), (640, 3, 256)])
def test_a_run_is_whole_tiles_and_one_at_least(keys, pieces, size):
    assert plan._tiles(keys, pieces) == size


def test_counted_work_is_that_of_the_design():
    work = floors.count(VidiConfig.full(), 60, 6000, 2, 24, 2)
    assert (work.visual_tokens, work.audio_tokens) == (11760, 600)
    frame, piece = (
        work.encode_flops - other.encode_flops
        for other in (
            floors.count(VidiConfig.full(), 59, 6000, 2, 24, 2),
            floors.count(VidiConfig.full(), 60, 6000, 1, 24, 2),
        )
    )
    assert frame == pytest.approx(0.64e12, rel=0.02)
    assert piece == pytest.approx(2.3e12, rel=0.02)
    limits = floors.Ceilings(798e12, 3.0e12, 700e12)
    found = work.floors(limits)
    # 0.06 s, 0.24 s and 7.6 ms on a machine of 798 TFLOP/s and 3.0 TB/s.
    assert found["encode_s"] == pytest.approx(0.055, abs=0.005)
    assert found["prefill_s"] == pytest.approx(0.235, abs=0.005)
    assert found["decode_ms"] == pytest.approx(7.6, abs=0.05)
    hour = floors.count(VidiConfig.full(), 3600, 360000, 120, 24, 2)
    assert (hour.visual_tokens, hour.audio_tokens) == (90000, 36000)
    assert hour.floors(limits)["decode_ms"] == pytest.approx(20.6, abs=0.05)


def test_chunks_are_even_and_whole_tiles():
    assert chunk_rows(12360, 32768) == 12544
    assert chunk_rows(126000, 32768) == 31744
    assert chunk_rows(0, 32768) == chunk_rows(1, 32768) == 256
    for total in (1, 255, 256, 40000, 126000):
        rows = chunk_rows(total, 32768)
        assert rows <= 32768
        assert -(-total // rows) == -(-total // 32768)


def test_lengths_are_checked():
    assert bench.lengths("60,300") == (60, 300)
    for wrong in ("", "0", "60,x", "-3"):
        with pytest.raises(argparse.ArgumentTypeError, match="a whole number"):
            bench.lengths(wrong)
