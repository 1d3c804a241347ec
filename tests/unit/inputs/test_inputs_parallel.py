"""Reading in parallel against reading in sequence: the same frames, bit for bit, whatever the file."""

from __future__ import annotations

import dataclasses
import threading
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch

from tests.media import Film, make_film, truncate
from vidi.config import VidiConfig
from vidi.inputs import codecs, container, parallel, reader, survey, video
from vidi.inputs.reader import Reader

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
    "vp8.webm": Film("libvpx", {"deadline": "realtime", "cpu-used": "8", "g": "12"}),
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
    "refresh.mp4": (Film("libx264", {"preset": "medium", "g": "12", "x264-params": "intra-refresh=1:bframes=0"}), ""),
    "interlaced.mp4": (Film("libx264", {"g": "12", "flags": "+ildct+ilme", "x264-params": "interlaced=1"}), ""),
    "interlaced.ts": (Film("libx264", {"g": "12", "flags": "+ildct+ilme", "x264-params": "interlaced=1"}), ""),
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


#: One of each rule; the others run with the slow tier.
QUICK = {"h264.mp4", "h264.ts", "pyramid.mp4", "variable.mkv", "hevc-open.mp4", "vp9.webm", "mjpeg.avi"}
QUICK |= {"mpeg4.avi", "open.mp4", "h264.avi"}


def tiered(names):
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", tiered(CUT))
def test_equal_bits_in_parallel(shelf, name):
    path = shelf(name, CUT[name])
    for fps in (4.0, 30.0):
        quick, slow = both(path, fps=fps)
        assert_same(quick, slow)
        assert (quick.reading, quick.why) == ("parallel", "")
        assert (slow.reading, slow.why) == ("sequential", "asked for (--check)")
    plan = video.Video(path, fps=30.0)._survey
    assert len(plan.segments) >= 5, "a file that is not cut proves nothing"


@pytest.mark.parametrize("name", tiered(NOT_CUT))
def test_equal_bits_and_a_reason_in_sequence(shelf, name):
    film, why = NOT_CUT[name]
    path = shelf(name, film)
    quick, slow = both(path, fps=4.0)
    assert_same(quick, slow)
    if why:
        assert (quick.reading, quick.why) == ("sequential", why)


def test_what_nobody_needs_is_not_decoded(shelf):
    """Half of a film with B-frames, and all that stands behind the last wanted frame of a piece."""
    path = shelf("h264.mp4", H264)
    fed = [len(segment.packets) for segment in video.Video(path, fps=25 / 12)._survey.segments]
    assert fed == [1] * 5  # the key frames alone
    segments = video.Video(path, fps=25 / 11)._survey.segments
    assert sum(sum(segment.wanted) for segment in segments) == 6
    assert sum(len(segment.packets) for segment in segments) < 40  # of 60


def rewritten(path: Path, into: Path, change, **options) -> Path:
    """The file's packets in another one, as ``change`` leaves them (None: left out)."""
    with av.open(str(path)) as source, av.open(str(into), "w", options=options) as out:
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for number, packet in enumerate(p for p in source.demux(stream) if p.size):
            changed = change(number, packet)
            if changed is not None:
                changed.stream = copy
                out.mux(changed)
    return into


def test_an_edit_list_hides_frames(shelf, tmp_path):
    def earlier(number, packet):
        packet.pts -= 5 * 512
        packet.dts -= 5 * 512
        return packet

    path = rewritten(shelf("h264.mp4", H264), tmp_path / "a.mp4", earlier, avoid_negative_ts="disabled")
    with av.open(str(path)) as source:
        hidden = [packet.is_discard for packet in source.demux(video=0)]
    assert sum(hidden) == 5, "no frame is hidden, so that nothing is shown here"
    quick, slow = both(path, fps=25.0)
    assert_same(quick, slow)
    assert (quick.reading, quick.num_frames) == ("parallel", 55)


@pytest.mark.parametrize("name", ["h264.ts", "h264.flv", "h264.mp4", "vp9.webm"])
def test_packets_that_are_missing(shelf, tmp_path, name):
    """A frame is gone, a reference or not, or the first key frame: the same frames or the same refusal."""
    for gone in ({0}, {7}, {13}, {1, 2}, {30, 31, 32}):
        into = tmp_path / f"{sorted(gone)[0]}-{name}"
        path = rewritten(shelf(name, CUT[name]), into, lambda number, p, gone=gone: None if number in gone else p)
        try:
            slow = video.read_frames(path, size=SIZE, fps=30.0, check=True)
        except video.MediaError as error:
            with pytest.raises(video.MediaError, match=str(error).partition(":")[2][:20]):
                video.read_frames(path, size=SIZE, fps=30.0)
            continue
        quick = video.read_frames(path, size=SIZE, fps=30.0)
        assert quick.num_frames == slow.num_frames
        if gone != {1, 2} and gone != {7}:
            assert_same(quick, slow)


def test_a_stream_that_is_cut_off(shelf, tmp_path):
    path = tmp_path / "a.ts"
    path.write_bytes(shelf("h264.ts", H264).read_bytes())
    for fraction in (0.9, 0.7, 0.5):
        assert_same(*both(truncate(path, fraction), fps=25.0))


@pytest.mark.parametrize(
    ("times", "starts", "cuts"),
    [
        ([0, 3, 1, 2, 4, 7, 5, 6], [2, 0, 0, 0, 2, 0, 0, 0], [0, 4]),
        ([0, 4, 1, 2, 3, 7, 5, 6], [2, 0, 0, 0, 2, 0, 0, 0], [0]),  # 4 is shown behind the frame of the cut
        ([0, 3, 1, 2, 6, 4, 5, 7], [2, 0, 0, 0, 2, 0, 0, 0], [0, 4]),  # 4 and 5 are shown before 6, behind 3
        ([0, 3, 1, 2, 6, 4, 5, 7], [2, 0, 0, 0, 1, 0, 0, 0], [0, 4]),
        ([1, 0, 2, 3], [2, 0, 2, 0], [0, 2]),
    ],
)
def test_cuts_part_the_frames_in_time_as_well(times, starts, cuts):
    assert survey._cuts(np.array(times), np.array(starts, np.uint8)) == cuts


# ---- what packets say -----------------------------------------------------------------------------------------------

SPS, OTHER_SPS, PPS, OTHER_PPS = b"\x67\1", b"\x67\2", b"\x68\1", b"\x68\2"
IDR, REFERENCE, NOBODYS = b"\x65\x88", b"\x41\x9a", b"\x01\x9e"


def annex_b(*units: bytes) -> bytes:
    return b"".join(b"\0\0\0\1" + unit for unit in units)


@pytest.mark.parametrize(
    ("packets", "starts", "disposable"),
    [
        ([[SPS, PPS, IDR], [REFERENCE], [NOBODYS], [SPS, PPS, IDR]], [2, 0, 0, 2], [2]),
        ([[IDR], [IDR]], [2, 2], []),  # parameter sets in the file's header alone
        ([[SPS, PPS, IDR], [IDR], [SPS, IDR]], [2, 0, 0], []),  # sent once: who starts here lacks them
        ([[SPS, PPS, IDR], [SPS, OTHER_PPS, IDR], [SPS, PPS, IDR]], [2, 0, 0], []),
        ([[SPS, PPS, IDR], [OTHER_PPS, NOBODYS], [NOBODYS, REFERENCE]], [2, 0, 0], []),  # needed by others after all
        ([[SPS, PPS, REFERENCE]], [0], []),  # a key frame to the container, but no IDR
    ],
)
def test_where_h264_can_start(packets, starts, disposable):
    look = codecs.looker("h264", None, "yuv420p")
    found = [look(annex_b(*units), True) for units in packets]
    assert [one.start.value for one in found] == starts
    assert [number for number, one in enumerate(found) if one.disposable] == disposable


def test_hidden_frames_are_not_counted():
    """One-pass encoders make none, so there is no film of them here: first bytes of packets."""
    for codec, heads in (("vp8", (0x10, 0x11, 0x00, 0x01)), ("vp9", (0x82, 0x86, 0x80, 0x84))):
        look = codecs.looker(codec, None, None)
        found = [look(bytes([head, 0]), False) for head in heads]
        assert [one.shown for one in found] == [True, True, False, False], codec
        assert found[0].start is codecs.Start.CLOSED
        assert found[1].start is codecs.Start.NO


def test_lengths_that_do_not_add_up_are_odd():
    look = codecs.looker("h264", b"\1dAB\xff" + bytes(20), "yuv420p")
    unit = len(IDR).to_bytes(4, "big") + IDR
    assert look(unit, True).start is codecs.Start.CLOSED
    for wrong in (unit[:-1], unit + b"\0", unit + bytes(4), b"\0\0\0\x10" + IDR):
        with pytest.raises(codecs.Odd):
            look(wrong, True)


def test_streams_of_an_encoder_that_ffmpeg_mends_are_odd():
    note = b"\x06\x05x264 - core %d r1"
    for build, pixels, odd in ((33, "yuv420p", True), (34, "yuv420p", False), (148, "yuv444p", True)):
        look = codecs.looker("h264", None, pixels)
        if odd:
            with pytest.raises(codecs.Odd, match=f"build {build}"):
                look(annex_b(note % build, IDR), True)
        else:
            assert look(annex_b(note % build, IDR), True).start is codecs.Start.CLOSED


# ---- when a piece is not what it was taken for ----------------------------------------------------------------------


def test_a_surprise_midway_ends_in_sequence_with_the_same_frames(shelf, monkeypatch):
    path = shelf("h264.mp4", H264)
    decode, calls = parallel._Decoders.decode, []

    def third(self, packets, segment, shrink):
        calls.append(segment)
        if segment.times[0] == calls[0].times[0] + 24 * 512:
            raise codecs.Odd("made up for this test")
        return decode(self, packets, segment, shrink)

    monkeypatch.setattr(parallel._Decoders, "decode", third)
    quick, slow = both(path, fps=25.0)
    assert_same(quick, slow)
    assert (quick.reading, quick.why) == ("sequential", "made up for this test")


def test_frames_are_held_to_what_was_surveyed(shelf, monkeypatch):
    """Red where a decoder that drops or reorders frames would be believed."""
    path = shelf("h264.mp4", H264)
    honest = video.Video(path, fps=25.0)
    segment = honest._survey.segments[1]
    with container.open_media(path) as opened:
        packets = [p for p in opened.demux(video=0)]
    packets = [packets[number] for number in segment.packets]
    decoders = parallel._Decoders(path, 1)
    assert len(decoders.decode(packets, segment, honest._square_u8)) == 12
    for wrong in (packets[:-1], packets[1:], packets[:5] + packets[6:]):
        with pytest.raises(codecs.Odd):
            parallel._Decoders(path, 1).decode(wrong, segment, honest._square_u8)


@pytest.mark.parametrize(("limit", "value"), [("MAX_SEGMENT_BYTES", 1000), ("MAX_SEGMENT_WANTED", 11)])
def test_pieces_too_large_to_be_held(shelf, monkeypatch, limit, value):
    monkeypatch.setattr(survey, limit, value)
    quick, slow = both(shelf("h264.mp4", H264), fps=25.0)
    assert_same(quick, slow)
    assert (quick.reading, quick.why) == ("sequential", "key frames too far apart")


def test_a_cut_parts_the_frames_in_time():
    """None where what comes behind is shown at the very time of something before."""
    starts = np.array([codecs.Start.CLOSED.value, 0, codecs.Start.CLOSED.value, 0], np.uint8)
    assert survey._cuts(np.array([0, 1, 2, 3]), starts) == [0, 2]
    assert survey._cuts(np.array([0, 2, 2, 3]), starts) == [0]
    assert survey._cuts(np.array([0, 3, 2, 4]), starts) == [0]


def test_the_last_frame_is_the_first_met_of_its_time():
    rows = survey._Rows()
    assert rows.last_shown[0] == np.iinfo(np.int64).min, "no time is earlier"
    for duration in (1, 9):
        packet = SimpleNamespace(
            pts=5, size=1, duration=duration, is_corrupt=False, is_discard=False, has_sidedata=lambda kind: False
        )
        rows.add(packet, codecs.Look(codecs.Start.CLOSED))
    assert rows.last_shown == (5, 1)


def test_a_piece_may_hold_as_many_frames_as_the_limit_says(shelf, monkeypatch):
    monkeypatch.setattr(survey, "MAX_SEGMENT_WANTED", 12)  # as many as stand between two of its key frames
    assert video.read_frames(shelf("h264.mp4", H264), fps=25.0, size=8).reading == "parallel"


@pytest.mark.parametrize(("limit", "value"), [("MAX_KEPT", 25), ("MAX_BYTES", 16000)])
def test_what_is_in_flight_is_bounded(shelf, monkeypatch, limit, value):
    """With a pool that is never ready, no more is dealt out than the limit says, and no less than two pieces."""
    path = shelf("h264.mp4", H264)
    monkeypatch.setattr(parallel, limit, value)
    monkeypatch.setattr(container, "num_decoders", lambda codec: 16)
    held, most, largest = [0], [0], [0]
    decode = parallel._Decoders.decode

    class Lazy:
        def __init__(self, work, segment, packets):
            self.work, self.count = work, 1
            held[0] += sum(p.size for p in packets) if limit == "MAX_BYTES" else sum(segment.wanted)
            most[0] = max(most[0], held[0])
            self.cost = sum(p.size for p in packets) if limit == "MAX_BYTES" else sum(segment.wanted)
            largest[0] = max(largest[0], self.cost)

        def done(self):
            return False

        def result(self):
            held[0] -= self.cost
            return self.work()

    class Pool:
        def __init__(self, *args, **options): ...

        def submit(self, call, packets, segment, shrink):
            return Lazy(lambda: decode(call.__self__, packets, segment, shrink), segment, packets)

        def shutdown(self, **options): ...

    monkeypatch.setattr(parallel, "ThreadPoolExecutor", Pool)
    quick, slow = both(path, fps=25.0)
    assert_same(quick, slow)
    assert quick.reading == "parallel"
    assert 0 < largest[0] < most[0] <= value


def test_whoever_stops_early_is_not_kept_waiting(shelf):
    threads = threading.active_count()
    with Reader(shelf("h264.mp4", H264), VidiConfig.tiny(), fps=25.0) as reader:
        next(reader.pictures())
    assert threading.active_count() == threads


def test_waits_for_the_taker_are_no_time_of_reading(shelf, monkeypatch):
    """By a clock that goes only while a picture waits to be taken."""

    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

    class Slow(reader.Queue):
        def put(self, item: object) -> None:
            clock.now += item is not None
            super().put(item)

    clock = Clock()
    monkeypatch.setattr(reader, "time", clock)
    monkeypatch.setattr(reader, "Queue", Slow)
    with Reader(shelf("h264.mp4", H264), VidiConfig.tiny(), fps=25.0) as running:
        assert len(list(running.pictures())) > 1
    assert clock.now > 1
    assert running.seconds == 0


def test_a_file_that_ends_before_its_last_segment_was_changed(shelf):
    path = shelf("h264.mp4", H264)
    plan = video.Video(path, fps=25.0)._survey
    more = dataclasses.replace(plan, segments=(*plan.segments, survey.Segment((10_000,), (10_000,), (True,))))
    with pytest.raises(codecs.Odd, match="changed while it was read"):
        list(parallel.frames(path, more, lambda frame: np.zeros(1)))
