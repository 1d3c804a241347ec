"""Videos from anywhere: nothing but the named file is opened, and neither time nor memory runs away.

What must not be opened is a pipe without a writer: whoever opens it waits until the child process is ended.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import random
import re
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import pytest

from tests.media import Film, Sound, make_film, make_picture, make_sound, make_video
from vidi.inputs import audio, boxes, container, parallel, reader, survey, video

HANG_SEC = 10.0
MEMORY_MIB = 1024
H264 = Film("libx264", {"preset": "medium", "g": "12", "bf": "3"}, num_frames=40)


def read_in_child(paths) -> dict[str, str]:
    """What `read_all` says of each file. Fails for a hang, a crash, a traceback, or memory beyond the limit."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.inputs.read_all"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    found, lines = {}, queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in child.stdout], daemon=True).start()
    try:
        for path in paths:
            child.stdin.write(f"{path}\n")
            child.stdin.flush()
            line = next_line(lines, 60 if not found else HANG_SEC)  # the first one waits for torch to load
            assert line.startswith("start"), line
            line = next_line(lines, HANG_SEC)
            _, _, mebibytes, _, said = line.split(" ", 4)
            assert int(mebibytes) < MEMORY_MIB, f"{path}: {mebibytes} MiB"
            found[Path(path).name] = said.strip()
        child.stdin.close()
        assert child.wait(HANG_SEC) == 0
        assert child.stderr.read() == "", "something on stderr"
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            pipe.close()
    return found


def next_line(lines: queue.Queue[str], seconds: float) -> str:
    try:
        return lines.get(timeout=seconds)
    except queue.Empty:
        pytest.fail(f"no answer in {seconds} s")


# ---- no other file --------------------------------------------------------------------------------------------------


HOSTILE = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{bait}\n#EXT-X-ENDLIST\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{bait}\n#EXT-X-ENDLIST\n",
    "itself.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nitself.m3u8\n",
    "concat.ffconcat": "ffconcat version 1.0\nfile {bait}\n",
    "concat.mkv": "ffconcat version 1.0\nfile {bait}\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
    "<Representation><BaseURL>{bait}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    "pictures%03d.png": "\x89PNG",
    "stream.rtsp": "rtsptext\nrtsp://127.0.0.1/x\n",
    "movie.imf": '<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016"/>',
    "meta.ffmeta": ";FFMETADATA1\ntitle={bait}\n",
    "index.vob": "DVDVIDEO-VMG {bait}",
    "script.avs": 'DirectShowSource("{bait}")',
}


@pytest.mark.slow
def test_playlists_and_scripts_are_not_opened(tmp_path):
    bait = tmp_path / "bait.mp4"
    os.mkfifo(bait)
    paths = []
    for name, content in HOSTILE.items():
        paths.append(tmp_path / name)
        paths[-1].write_text(content.replace("{bait}", str(bait)), encoding="latin-1")
    for name, said in read_in_child([*paths, bait, "/dev/zero", "/dev/null", tmp_path, tmp_path / "absent"]).items():
        assert said.startswith("refused"), name
        if name in HOSTILE:
            assert "none of the containers that are opened" in said, name
        elif name in ("bait.mp4", "zero", "null"):
            assert "no regular file" in said


def referring(path: Path, target: str) -> Path:
    """A mov whose pictures lie in the file ``target``, as the data reference of its track says."""
    make_video(path, num_frames=3)
    data = path.read_bytes()
    at = data.index(b"dref") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    name = target.encode()
    # An alias record: volume and file name, nested how deep, then the absolute path as entry 2.
    alias = bytes(10) + b"\x03vol".ljust(28, b"\0") + bytes(12) + b"\x04file".ljust(64, b"\0") + bytes(16)
    alias += struct.pack(">hh", 1, 1) + bytes(16)
    alias += struct.pack(">hH", 2, len(name)) + name + bytes(len(name) % 2) + struct.pack(">hH", -1, 0)
    entry = struct.pack(">I4sI", 12 + len(alias), b"alis", 0) + alias
    dref = struct.pack(">I4sII", 16 + len(entry), b"dref", 0, 1) + entry
    data = bytearray(data[:at] + dref + data[at + old :])
    for holder in (b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        where = data.index(holder) - 4
        size = int.from_bytes(data[where : where + 4], "big")
        data[where : where + 4] = (size + len(dref) - old).to_bytes(4, "big")
    path.write_bytes(data)
    return path


def test_a_movie_whose_data_lie_in_another_file(tmp_path, monkeypatch):
    other = make_video(tmp_path / "other.mp4", num_frames=3)
    path = referring(tmp_path / "a.mp4", str(other))
    asked = []

    def opener(url, flags, options):
        asked.append(url)
        return open(url.removeprefix("file:"), "rb")

    # FFmpeg left to itself, with the option that allows it, does ask for the file: the attack is a real one.
    with (
        path.open("rb") as file,
        av.open(file, "r", options={"enable_drefs": "1", "use_absolute_path": "1"}, io_open=opener),
    ):
        pass
    assert asked == [str(other)] or asked == [f"file:{other}"]
    asked.clear()
    monkeypatch.setattr(container, "_refuse_another_file", opener)
    with container.open_media(path):
        pass
    assert asked == []


# ---- bounded memory and time ----------------------------------------------------------------------------------------


def test_a_long_video_is_refused_before_it_is_decoded(tmp_path):
    """200,000 s at one frame a second: 88 GB of pixels. Said from the header, and where there is none while counting."""
    film = Film("libx264", {"preset": "ultrafast", "g": "999"}, num_frames=1200, fps=1, width=16, height=16)
    for name, said in (("a.mp4", "1,200"), ("a.mkv", "1,140"), ("a.ts", "1,001")):
        path = make_film(tmp_path / name, film)
        started = time.perf_counter()
        with pytest.raises(video.MediaError, match=rf"{said} sampled frames, 0\.[45] GB") as told:
            video.read_frames(path, max_frames=1000)
        assert "--max-frames" in str(told.value)
        assert "--fps" in str(told.value)
        assert time.perf_counter() - started < 2
    assert video.read_frames(path, max_frames=1200, size=8).num_frames == 1200
    hostile = path.rename(tmp_path / "a;$(touch owned).t s")
    with pytest.raises(video.MediaError, match=r"-c copy 'part\.t s'$") as told:
        video.read_frames(hostile, max_frames=1000)
    assert f"ffmpeg -i '{hostile}' -t" in str(told.value)
    assert video.MAX_FRAMES == 14400


@pytest.mark.parametrize("fps", [30, 1, "1/10"])
def test_what_is_advised_for_a_long_video_helps(tmp_path, fps):
    """200,000 s in 200 KB, at ten seconds a frame: --fps 0.72 would have read every frame all the same."""
    path = make_film(tmp_path / "a.mp4", Film("libx264", {"preset": "ultrafast"}, num_frames=60, fps=Fraction(fps)))
    with pytest.raises(video.MediaError, match="60 sampled frames") as told:
        video.read_frames(path, fps=30, max_frames=25)
    said = re.search(r"--max-frames (\d+)\).*--fps ([\d.]+)\).*-t (\d+) ", str(told.value))
    assert int(said[1]) == 60
    assert len(video.read_frames(path, fps=30, max_frames=60, size=8).images_u8) == 60
    assert 20 <= len(video.read_frames(path, fps=float(said[2]), max_frames=25, size=8).images_u8) <= 25
    assert int(said[3]) == int(25 / Fraction(fps))


def test_frames_are_counted_in_sequence_too(tmp_path):
    """And as nobody knows how many follow, no number is advised that would help."""
    path = make_film(tmp_path / "a.avi", Film("mpeg4", {}, num_frames=30, fps=1))
    with pytest.raises(video.MediaError, match="11 sampled frames") as told:
        video.read_frames(path, max_frames=10)
    assert "(--max-frames), look at fewer (--fps, below the present one)" in str(told.value)


@pytest.mark.parametrize(("name", "codec", "pixels"), [("a.mov", "png", "rgb24"), ("a.mp4", "libx264", "yuv420p")])
def test_giant_pictures_are_refused_before_they_are_decoded(tmp_path, name, codec, pixels):
    path = tmp_path / name
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=1, options={"preset": "ultrafast"} if codec == "libx264" else {})
        stream.width, stream.height, stream.pix_fmt = 8192, 4400, pixels
        picture = av.VideoFrame(8192, 4400, pixels)
        for plane in picture.planes:
            plane.update(bytes(plane.buffer_size))
        out.mux([*stream.encode(picture), *stream.encode(None)])
    assert path.stat().st_size < 200_000
    with pytest.raises(
        video.MediaError, match=r"at most 36 million \(8192 × 4352\) are decoded. Make them smaller"
    ) as told:
        video.read_frames(path)
    if codec == "libx264":
        assert "8192 × 4400, 36 million" in str(told.value)


def test_sound_without_end_is_refused(tmp_path):
    from vidi.config import VidiConfig
    from vidi.inputs.reader import Reader

    path = make_video(tmp_path / "a.mp4", num_frames=5, fps=1, sound=Sound(80.0, 16000, 1))
    with Reader(path, VidiConfig.tiny(), max_frames=80) as reader:
        assert len(list(reader.pictures())) == 5
        assert reader.sound()[1] >= 8000
    with Reader(path, VidiConfig.tiny(), max_frames=10) as reader:
        assert len(list(reader.pictures())) == 5
        with pytest.raises(video.MediaError, match="--max-frames"):
            reader.sound()


def test_sound_that_fails_behind_its_last_packet_keeps_nobody_waiting(tmp_path):
    """Its last piece is made when the end has been heard: whoever then waits for another end waits for ever."""
    path = make_video(tmp_path / "a.mp4", num_frames=5, fps=1, sound=Sound(2.5, 16000, 1))
    sound = audio.Sound(path, 16, 100, max_sec=2.1)
    with container.open_media(path) as opened:
        assert len(list(container.decoded(opened, container.first_stream(opened, "video"), path, sound))) == 5
        waiting = threading.Thread(target=sound.close, daemon=True)
        waiting.start()
        waiting.join(HANG_SEC)
        assert not waiting.is_alive()
        with pytest.raises(video.MediaError, match="more than 2 s of sound"):
            sound.features()


def test_boxes_that_promise_more_than_the_file_holds(tmp_path):
    path = tmp_path / "sound.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        track = out.add_stream("pcm_s16le", rate=16000)
        track.layout = "mono"
        samples = av.AudioFrame.from_ndarray(make_sound(Sound(2.0, 16000, 1)), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 16000, 0
        out.mux([*track.encode(samples), *track.encode(None)])
        for index in range(20):
            picture = av.VideoFrame.from_ndarray(make_picture(index, 96, 64), format="rgb24")
            out.mux(stream.encode(picture.reformat(format="yuv420p")))
        out.mux(stream.encode(None))
    honest = path.read_bytes()
    assert video.read_frames(path, size=8).num_frames == 20
    with pytest.MonkeyPatch.context() as patch:  # ten minutes of it have 28 million samples
        patch.setattr(boxes, "MAX_SAMPLES", 10_000)
        assert video.read_frames(path, size=8).num_frames == 20
    first, second = honest.index(b"stsz"), honest.rindex(b"stsz")
    fragments = make_film(tmp_path / "f.mp4", Film("libx264", {"g": "12"}, movflags="frag_keyframe+empty_moov"))
    assert video.read_frames(fragments, size=8).num_frames == 60
    run = fragments.read_bytes().index(b"trun")
    for name, data, at, bad in (
        ("a.mov", honest, first + 8, struct.pack(">II", 1, 40_000_000)),
        ("b.mov", honest, first + 8, struct.pack(">II", 0, 40_000_000)),
        ("c.mov", honest, second + 12, struct.pack(">I", 40_000_000)),
        ("d.mp4", fragments.read_bytes(), run + 4, struct.pack(">II", 1, 40_000_000)),
        ("e.mov", honest, 0, None),
    ):
        spoiled = bytearray(data)
        if bad is None:
            spoiled = bytearray(struct.pack(">I4s", 8, b"free") * (boxes.MAX_BOXES + 1) + bytes(honest))
        else:
            spoiled[at : at + len(bad)] = bad
        (tmp_path / name).write_bytes(spoiled)
        with pytest.raises(video.MediaError, match=r"it states (40,000,000 samples|more than 1,000,000 boxes)"):
            video.read_frames(tmp_path / name)


def test_every_box_counts_also_an_empty_one_at_the_end_of_what_holds_it(monkeypatch):
    inner = struct.pack(">I4s", 12, b"free") + bytes(4) + struct.pack(">I4s", 8, b"free")
    data = struct.pack(">I4s", 8 + len(inner), b"moov") + inner
    for most, problem in ((3, None), (2, "more than 2 boxes")):
        monkeypatch.setattr(boxes, "MAX_BOXES", most)
        assert boxes.promises_too_much(io.BytesIO(data), len(data)) == problem


def test_the_limits_are_those_that_the_page_tells():
    page = " ".join((Path(__file__).parents[3] / "docs" / "video.md").read_text(encoding="utf-8").split())
    mib = 1 << 20
    for words in (
        f"at most {reader.AHEAD:,} of them and {parallel.MAX_BYTES // mib} MiB of packets are in flight",
        f"hold over {survey.MAX_SEGMENT_BYTES // mib} MiB or {survey.MAX_SEGMENT_WANTED} wanted frames",
        f"| {video.MAX_FRAMES:,}: four hours at one a second",
        f"{container.BARREN_BYTES // mib} MiB (mp4, mkv: {container.HEADER_BYTES // mib} MiB, for an index or fonts) "
        f"and {container.BARREN_RATIO} times",
        f"{boxes.MAX_SAMPLES // 10**6} million outside constant-size sound",
        f"{boxes.MAX_PICTURE_TRACKS}; {container.MAX_STREAMS}",
        "(together at most 1 GiB",
    ):
        assert words in page, words
    assert parallel.MAX_KEPT == reader.AHEAD
    assert "8192 × 4352" in page
    assert (container.MAX_PIXELS, container.MAX_DECODED_BYTES) == (8192 * 4352, 1 << 30)


def test_edits_that_show_a_track_again_and_again(tmp_path):
    """FFmpeg makes an entry of each sample for each edit: 290 KB of file took 2 GB, and another an hour to decode."""
    path = make_film(tmp_path / "a.mp4", Film("libx264", {"g": "12"}, num_frames=60, fps=30))
    raw = path.read_bytes()
    for count, shown in ((1, 58), (3, 174), (20_000, None)):  # an edit from 0 leaves out two, which come later
        edits = struct.pack(">II", 0, count) + struct.pack(">IIhh", 2000, 0, 1, 0) * count
        held = struct.pack(">I4s", 16 + len(edits), b"edts") + struct.pack(">I4s", 8 + len(edits), b"elst") + edits
        data = bytearray(raw)
        at = data.index(b"edts") - 4
        old = int.from_bytes(data[at : at + 4], "big")
        data[at : at + old] = held
        for holder in (b"trak", b"moov"):
            where = data.index(holder) - 4
            size = int.from_bytes(data[where : where + 4], "big")
            data[where : where + 4] = (size + len(held) - old).to_bytes(4, "big")
        path.write_bytes(data)
        if shown:
            assert video.read_frames(path, size=8).num_frames == shown
        else:
            with pytest.raises(video.MediaError, match="60 samples or more, shown by 20,000 edits, in a file of"):
                video.read_frames(path, size=8)


def test_tracks_without_number(tmp_path, monkeypatch):
    """FFmpeg begins to decode each when it opens the file: 999 small ones took 2.4 GB and 49 s."""
    path = make_film(tmp_path / "a.mp4", Film("libx264", {"g": "12"}, num_frames=12))
    raw = path.read_bytes()
    at, moov = raw.index(b"trak") - 4, raw.index(b"moov") - 4
    track = raw[at : at + int.from_bytes(raw[at : at + 4], "big")]
    for copies, said in (
        (boxes.MAX_PICTURE_TRACKS - 1, ""),
        (boxes.MAX_PICTURE_TRACKS, "more than 4 tracks of pictures"),
    ):
        size = int.from_bytes(raw[moov : moov + 4], "big") + copies * len(track)
        path.write_bytes(raw[:moov] + size.to_bytes(4, "big") + raw[moov + 4 : at] + copies * track + raw[at:])
        if said:
            with pytest.raises(video.MediaError, match=said):
                video.read_frames(path, size=8)
        else:
            assert video.read_frames(path, size=8).num_frames == 12
    monkeypatch.setattr(container, "MAX_STREAMS", 1)
    for name, said in (("b.mkv", "cut short"), ("b.mp4", "it states more than 1 streams")):
        with pytest.raises(video.MediaError, match=said):
            video.read_frames(make_video(tmp_path / name, num_frames=5, sound=Sound(1.0)), size=8)


ENDLESS = {
    "a.ts": (b"\x47" + bytes(187)) * 5,
    "a.mpg": b"\x00\x00\x01\xba" + bytes(2000),
    "a.flv": b"FLV\x01\x05\0\0\0\x09" + bytes(2000),
    "a.avi": b"RIFF\xff\xff\xff\xffAVI ",
    "a.mkv": None,
    "a.mp4": None,
}


@pytest.mark.slow
def test_files_of_nothing_end_early(tmp_path):
    """8 GiB that take no place on a disk: a demuxer would look through them for a packet, for minutes."""
    paths = []
    for name, data in ENDLESS.items():
        path = tmp_path / name
        if data is None:
            make_video(path, num_frames=5)
        else:
            path.write_bytes(data)
        os.truncate(path, 8 << 30)
        paths.append(path)
    said = read_in_child(paths)
    assert said.pop("a.mp4").startswith("same")  # whose index says where the pictures end
    for name, text in said.items():
        assert text.startswith("refused"), name
        assert "hardly a packet in its first" in text, name


def test_what_is_read_again_counts_once(tmp_path):
    """Sound that lies far from its pictures makes FFmpeg jump to and fro, a buffer at a time."""
    data = io.BytesIO(bytes(100))
    data.name = "x"
    source = container._Source(data, tmp_path / "a.ts", 150)
    for _ in range(20):
        source.seek(0, 0)
        assert len(source.read(100)) == 100
    assert source.barren == ""


def test_what_packets_hold_buys_more_reading(tmp_path):
    """Sixteen bytes for each of them, and what holds none is looked through no further than that."""
    data = io.BytesIO(bytes(10_000))
    data.name = "x"
    source = container._Source(data, tmp_path / "a.ts", 50)
    for _ in range(3):
        assert len(source.read(100)) == 100
        source.found(SimpleNamespace(size=10))
    assert source.barren == ""
    assert sum(iter(lambda: len(source.read(10)), 0)) == 3 * 160 + 50 - 3 * 100
    assert "hardly a packet" in source.barren


def test_a_place_that_does_not_exist_is_an_error_that_ffmpeg_knows(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=1)
    with path.open("rb") as file:
        source = container._Source(file, path, 100)
        assert source.seek(7, 0) == 7
        assert source.seek(-1, 0) == -errno.EINVAL


@pytest.mark.parametrize(
    ("cores", "width", "height", "threads"),
    [(1, 96, 64, 1), (5, 96, 64, 5), (64, 3840, 2160, 5), (64, 8192, 4352, 1), (3, 0, 0, 3)],
)
@pytest.mark.parametrize("bound", [True, False], ids=["cores of this process", "cores of the machine"])
def test_threads_are_as_many_as_cores_and_as_memory_allows(cores, width, height, threads, bound, monkeypatch):
    """Seventeen pictures of 3840 × 2160 are 212 MB, and a decoder holds as many; 1 GiB is for all decoders."""
    if bound:
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    else:
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert container.num_decoders(SimpleNamespace(width=width, height=height)) == threads


# ---- spoiled files --------------------------------------------------------------------------------------------------


BASES = {
    "a.mp4": lambda path: make_video(path, num_frames=30, sound=Sound(3.0)),
    "b.mkv": lambda path: make_video(path, num_frames=30, sound=Sound(3.0)),
    "c.webm": lambda path: make_video(path, num_frames=20, sound=Sound(2.0)),
    "d.ts": lambda path: make_film(path, H264),
    "e.mp4": lambda path: make_film(path, H264),
    "f.flv": lambda path: make_film(path, H264),
    "g.mp4": lambda path: make_film(
        path, Film("libx264", {"g": "12"}, num_frames=40, movflags="frag_keyframe+empty_moov")
    ),
    "h.mov": lambda path: make_film(path, Film("mjpeg", {}, num_frames=15, pixels="yuvj420p")),
    "i.avi": lambda path: make_film(path, Film("mpeg4", {"g": "12"}, num_frames=30)),
    "j.wmv": lambda path: make_film(path, Film("wmv2", {}, num_frames=20)),
    "k.mpg": lambda path: make_film(path, Film("mpeg2video", {}, num_frames=20)),
    "l.webm": lambda path: make_film(path, Film("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8", "g": "12"})),
}
WORDS = [bytes.fromhex(word) for word in ("ffffffff", "7fffffff", "00000000", "80000000", "00ffffff", "10000000")]


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Bits flipped, words overwritten, bytes cut out, doubled or made up; more often at either end, where headers are."""
    found = bytearray(data)
    span = min(len(found), 1200) if rng.random() < 0.6 else len(found)
    from_end = rng.random() < 0.3

    def at() -> int:
        place = rng.randrange(span)
        return len(found) - 1 - place if from_end else place

    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 2, 8, 64])):
            found[at()] ^= 1 << rng.randrange(8)
    elif kind == 1:
        for _ in range(rng.choice([1, 3])):
            place = at()
            found[place : place + 4] = rng.choice(WORDS)
    elif kind == 2:
        place = at()
        del found[place : place + rng.choice([1, 16, 500])]
    elif kind == 3:
        place, source = at(), at()
        found[place:place] = found[source : source + rng.choice([1, 16, 500])]
    elif kind == 4:
        del found[rng.randrange(8, len(found)) :]
    else:
        place, count = at(), rng.choice([4, 64, 2000])
        found[place : place + count] = rng.randbytes(count)
    return bytes(found)


@pytest.mark.parametrize(
    ("seed", "count"), [(0, 24), *(pytest.param(s, 250, marks=pytest.mark.slow) for s in range(1, 7))]
)
def test_spoiled_files(tmp_path, seed, count):
    bases = {name: make(tmp_path / f"base-{name}").read_bytes() for name, make in BASES.items()}
    rng, paths = random.Random(seed), []
    for number in range(count):
        name = rng.choice(list(bases))
        paths.append(tmp_path / f"{number}-{name}")
        paths[-1].write_bytes(spoil(bases[name], rng))
    said = [text.split()[0] for text in read_in_child(paths).values()]
    assert len(said) == count
    # Both ends happen: files that are refused, and files that are read in spite of all.
    assert min(said.count("refused"), said.count("same")) > count / 8
    # Damage that only --check notices, or that shows in other pixels, is rare.
    assert said.count("differs") + said.count("unnoticed") <= max(2, count / 20)


def test_streams_that_appear_midway_end_no_reading():
    """PyAV then raises IndexError behind the last packet; a spoiled file in some thousands does it."""

    def demux():
        yield from (packet, packet)
        raise IndexError

    packet, source = SimpleNamespace(size=1), container._Source(SimpleNamespace(name="x", tell=None), Path("a.ts"), 9)
    appearing = SimpleNamespace(demux=demux, file=SimpleNamespace(file=source))
    assert list(container.packets(appearing)) == [packet, packet]


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


@pytest.mark.parametrize("version", [b"", bytes(4)], ids=["as in mov", "as in mp4"])
def test_boxes_inside_meta_are_seen_with_and_without_its_version(version: bytes) -> None:
    lie = box(b"stsz", struct.pack(">III", 0, 0, 1_000_000))
    data = box(b"meta", version + box(b"hdlr", bytes(8) + b"vide") + lie)
    said = boxes.promises_too_much(io.BytesIO(data), len(data))
    assert said == f"1,000,000 samples or more in a file of {len(data)} bytes"


def test_boxes_behind_and_inside_one_with_a_long_length_are_seen() -> None:
    """Of a length in eight bytes, as `mdat` has it beyond 4 GiB; any other box may have it, too."""

    def long(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4sQ", 1, kind, 16 + len(content)) + content

    lie = box(b"stsz", struct.pack(">III", 0, 0, 1_000_000))
    for data in (long(b"mdat", bytes(100)) + lie, long(b"moov", lie)):
        said = boxes.promises_too_much(io.BytesIO(data), len(data))
        assert said == f"1,000,000 samples or more in a file of {len(data)} bytes"


@pytest.mark.parametrize("table", [b"stco", b"co64"])
def test_chunks_of_sound_are_counted(table: bytes) -> None:
    """FFmpeg makes an entry of each chunk where all samples have one size."""
    sizes = box(b"stsz", struct.pack(">III", 0, 2, 10))
    chunks = box(table, struct.pack(">II", 0, 1_000_000))
    for kind, wrong in ((b"soun", True), (b"vide", False)):
        data = box(b"trak", box(b"hdlr", bytes(8) + kind) + sizes + chunks)
        said = boxes.promises_too_much(io.BytesIO(data), len(data))
        assert said == (f"1,000,000 samples or more in a file of {len(data)} bytes" if wrong else None)
