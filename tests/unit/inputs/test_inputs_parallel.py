"""Reading in parallel against reading in sequence: the same frames, bit for bit, whatever the file."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from tests.media import Film, make_film
from vidi.inputs import video

SIZE = 26
H264 = Film("libx264", {"preset": "medium", "g": "12", "bf": "3"})
X265 = {"preset": "ultrafast", "x265-params": "keyint=12:min-keyint=12:bframes=3:b-adapt=0:log-level=none:pools=1"}
X265_CLOSED = X265 | {"x265-params": X265["x265-params"] + ":open-gop=0"}

#: Files that are cut, and how many pieces of 60 frames with a key frame at least every 12 must be seen.
CUT = {
    "h264.mp4": H264,
    "h264.mkv": H264,
    "h264.ts": H264,
    "h264.mov": H264,
    "h264.flv": H264,
    "no-b.mp4": Film("libx264", {"preset": "ultrafast", "g": "12"}),
    "pyramid.mp4": Film("libx264", {"preset": "slow", "g": "12", "bf": "8", "b-pyramid": "normal", "refs": "6"}),
    "high10.mkv": Film("libx264", {"preset": "medium", "g": "12"}, pixels="yuv420p10le"),
    "high444.mkv": Film("libx264", {"preset": "medium", "g": "12"}, pixels="yuv444p"),
    "variable.mkv": dataclasses.replace(H264, pts_ms=[i * i * 7 + 40 * i for i in range(60)]),
    "variable.mp4": dataclasses.replace(H264, pts_ms=[i * i * 7 + 40 * i for i in range(60)]),
    "ntsc.mp4": dataclasses.replace(H264, fps=Fraction(30000, 1001)),
    "late.mp4": dataclasses.replace(H264, pts_ms=[900 + 40 * i for i in range(60)]),
    "fragments.mp4": dataclasses.replace(H264, movflags="frag_keyframe+empty_moov"),
    "hevc.mp4": Film("libx265", X265_CLOSED),
    "hevc.mkv": Film("libx265", X265_CLOSED),
    "hevc-open.mp4": Film("libx265", X265),
    "hevc-open.mkv": Film("libx265", X265),
    "hevc.ts": Film("libx265", X265_CLOSED),
    "vp8.webm": Film("libvpx", {"deadline": "realtime", "cpu-used": "8", "g": "12", "auto-alt-ref": "1"}),
    "vp9.webm": Film("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12", "row-mt": "0"}),
    "vp9.mp4": Film("libvpx-vp9", {"deadline": "good", "cpu-used": "5", "g": "12", "lag-in-frames": "8"}),
    "av1.mkv": Film("libsvtav1", {"preset": "12", "g": "11", "svtav1-params": "lp=1"}),
    "mjpeg.avi": Film("mjpeg", {}, pixels="yuvj420p"),
    "mjpeg.mov": Film("mjpeg", {}, pixels="yuvj420p"),
    "prores.mov": Film("prores_ks", {}, pixels="yuv422p10le"),
}

#: Files to which the rules do not apply, and what is said of them.
NOT_CUT = {
    "mpeg4.mp4": (Film("mpeg4", {"g": "12"}), "no rule for the codec mpeg4"),
    "mpeg4.avi": (Film("mpeg4", {"g": "12", "bf": "2"}), "no rule for the codec mpeg4"),
    "mpeg2.mpg": (Film("mpeg2video", {"g": "12"}), "no rule for the codec mpeg2video"),
    "open.mp4": (Film("libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}), ""),
    "h264.avi": (H264, "packets without a time"),
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")

    def make(name: str, film: Film) -> Path:
        path = folder / name
        return path if path.exists() else make_film(path, film)

    return make


def both(path, **options):
    """Read in the quickest way there is, and in sequence."""
    return video.read_frames(path, size=SIZE, **options), video.read_frames(path, size=SIZE, check=True, **options)


def assert_same(quick, slow):
    assert torch.equal(quick.images_u8, slow.images_u8)
    for field in ("duration_sec", "average_fps", "num_frames", "step"):
        assert getattr(quick, field) == getattr(slow, field), field


@pytest.mark.parametrize("name", CUT)
def test_equal_bits_in_parallel(shelf, name):
    path = shelf(name, CUT[name])
    for fps in (1.0, 4.0, 30.0):
        quick, slow = both(path, fps=fps)
        assert_same(quick, slow)
        assert (quick.reading, quick.why) == ("parallel", "")
        assert (slow.reading, slow.why) == ("sequential", "asked for (--check)")
    survey = video.Video(path, fps=30.0)._survey
    assert len(survey.segments) >= 5, "a file that is not cut proves nothing"


@pytest.mark.parametrize("name", NOT_CUT)
def test_equal_bits_and_a_reason_in_sequence(shelf, name):
    film, why = NOT_CUT[name]
    path = shelf(name, film)
    for fps in (1.0, 4.0):
        quick, slow = both(path, fps=fps)
        assert_same(quick, slow)
    if why:
        assert (quick.reading, quick.why) == ("sequential", why)
