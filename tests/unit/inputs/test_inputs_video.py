"""Frames against PyAV frame by frame, Pillow, the reference image processor, and the ffmpeg command."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.media import Sound, ffmpeg_command, make_picture, make_sound, make_video, rotate_mp4, run_ffmpeg, truncate
from tests.not_run import not_run
from vidi.inputs import container as media
from vidi.inputs import pixels, video

SIZE = 26


def every_frame(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def squares(frames):
    resized = [Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for frame in frames]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("average_fps", "fps", "step"),
    [
        (30000 / 1001, 1, 30),
        (24000 / 1001, 1, 24),
        (0.5, 1, 1),  # round gives 0: the next frame is the nearest there is
        (1.5, 1, 2),
        (2.5, 1, 2),  # half to even, downwards
        (3.5, 1, 4),  # half to even, upwards
        (25, 2, 12),
        (10, 0.25, 40),
        (10, 100, 1),
    ],
)
def test_step_follows_the_rule(average_fps, fps, step):
    assert video.frame_step(average_fps, fps) == step


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_rates_that_are_none_are_refused(fps, tmp_path):
    with pytest.raises(ValueError, match="fps"):
        video.read_frames(tmp_path / "absent.mp4", fps=fps)


@pytest.mark.parametrize(
    ("name", "fps", "num_frames", "indices"),
    [
        ("a.mp4", 10, 25, [0, 10, 20]),
        ("b.mkv", 10, 20, [0, 10]),
        ("c.webm", 10, 21, [0, 10, 20]),
        ("d.mp4", Fraction(30000, 1001), 61, [0, 30, 60]),
        ("e.mkv", Fraction(24000, 1001), 49, [0, 24, 48]),
        ("f.webm", Fraction(5, 2), 7, [0, 2, 4, 6]),
        ("g.mp4", Fraction(1, 2), 3, [0, 1, 2]),
        ("h.mkv", 10, 1, [0]),
        ("i.mp4", 10, 1, [0]),
    ],
)
def test_frames_are_the_files_own_at_the_rules_indices(tmp_path, name, fps, num_frames, indices):
    path = make_video(tmp_path / name, fps=fps, num_frames=num_frames)
    frames = video.read_frames(path, size=SIZE)
    truth = every_frame(path)
    assert len(truth) == num_frames == frames.num_frames
    assert list(frames.indices) == indices
    assert torch.equal(frames.images_u8, squares([truth[index] for index in indices]))
    assert frames.average_fps == float(fps)
    # To a nanosecond, not to a container's millisecond: times are rounded down to seconds later.
    assert frames.duration_sec == pytest.approx(num_frames / float(fps), abs=1e-9)


def test_another_rate_takes_other_frames(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=25)
    assert list(video.read_frames(path, fps=4, size=SIZE).indices) == list(range(0, 25, 2))


def test_sound_before_pictures_loses_no_frame(tmp_path):
    path = make_video(tmp_path / "a.mkv", num_frames=15, sound=Sound(1.5), sound_first=True)
    assert video.read_frames(path, size=SIZE).num_frames == 15


def test_length_of_a_variable_rate_is_the_timestamps_span(tmp_path):
    path = make_video(tmp_path / "v.mkv", num_frames=5, pts_ms=[0, 100, 900, 5000, 5100])
    assert video.read_frames(path, size=SIZE).duration_sec == pytest.approx(5.2, abs=0.002)


@pytest.mark.parametrize(("span_sec", "duration_sec"), [(2.1, 2.0), (2.2, 2.2), (1.9, 2.0), (1.5, 1.5)])
def test_a_span_within_one_frame_of_the_count_is_rounding(tmp_path, span_sec, duration_sec):
    """20 frames at 10 a second; beyond a tenth the rate is a guess, and the timestamps tell more."""
    film = video.Video(make_video(tmp_path / "a.mp4"))
    film._ended(20, Fraction(1, 2), Fraction(1, 2) + Fraction(str(span_sec)))
    assert film.duration_sec == Fraction(str(duration_sec))


@pytest.mark.parametrize("option", ["size", "max_frames"])
def test_nothing_is_asked_for(tmp_path, option):
    path = make_video(tmp_path / "a.mp4", num_frames=1)
    assert video.read_frames(path, **{"size": 1} | {option: 1}).num_frames == 1
    with pytest.raises(ValueError, match=f"{option} is 0"):
        video.read_frames(path, **{option: 0})


def test_sound_that_outlasts_the_pictures_does_not_stretch_them(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=10, sound=Sound(3.0))
    assert video.read_frames(path, size=SIZE).duration_sec == 1.0


def test_progress_tells_seconds(tmp_path):
    seen = []
    path = make_video(tmp_path / "a.mp4", num_frames=25)
    video.read_frames(path, size=SIZE, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0.0, 2.5), (1.0, 2.5), (2.0, 2.5), (2.5, 2.5)]


@pytest.mark.parametrize(("degrees", "turns"), [(90, 3), (180, 2), (270, 1)])
def test_rotation_turns_pictures_upright(tmp_path, degrees, turns):
    path = make_video(tmp_path / "a.mp4", num_frames=2)
    stored = every_frame(path)
    frames = video.read_frames(rotate_mp4(path, degrees), fps=10, size=SIZE)
    assert torch.equal(frames.images_u8, squares([np.rot90(frame, turns).copy() for frame in stored]))


@pytest.mark.parametrize(
    ("degrees", "turns"), [(44, 0), (46, 1), (134, 1), (136, 2), (224, 2), (226, 3), (314, 3), (316, 0)]
)
def test_a_rotation_between_quarter_turns_is_the_nearest(tmp_path, degrees, turns):
    film = video.Video(make_video(tmp_path / "a.mp4", num_frames=1), size=8)
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    frame = SimpleNamespace(rotation=degrees, to_ndarray=lambda format: picture)
    np.testing.assert_array_equal(film._square_u8(frame), np.rot90(picture, turns).transpose(2, 0, 1))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_and_colours_equal_the_ffmpeg_command(tmp_path, degrees):
    command = ffmpeg_command()
    path = make_video(tmp_path / "a.mp4", num_frames=3, color=1)
    if degrees:
        rotate_mp4(path, degrees)
    raw = run_ffmpeg(command, path, "-pix_fmt", "rgb24", "-f", "rawvideo")
    shape = (3, 96, 64, 3) if degrees in (90, 270) else (3, 64, 96, 3)
    frames = video.read_frames(path, fps=10, size=SIZE)
    assert torch.equal(frames.images_u8, squares(np.frombuffer(raw, np.uint8).reshape(shape)))


@pytest.mark.parametrize("size", [26, 384])
def test_floats_equal_the_reference_processor(tmp_path, monkeypatch, size):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    path = make_video(tmp_path / "a.mp4", num_frames=25)
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    whole = every_frame(path)
    truth = processor([Image.fromarray(whole[i]) for i in (0, 10, 20)], return_tensors="pt")["pixel_values"]
    frames = video.read_frames(path, size=size)
    assert torch.equal(pixels.normalize(frames.images_u8, torch.float32, "cpu"), truth)


def test_every_pixel_value_equals_the_reference_processor(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    truth = processor(Image.fromarray(ramp), return_tensors="pt")["pixel_values"]
    ours = pixels.normalize(torch.from_numpy(ramp).permute(2, 0, 1)[None], torch.float32, "cpu")
    assert torch.equal(ours, truth)


# ---- files that are none ------------------------------------------------------------------------------------------


def test_a_cover_picture_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000)
        sound.layout = "mono"
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        samples = av.AudioFrame.from_ndarray(make_sound(Sound(0.5, 16000, 1)), format="s16", layout="mono")
        samples.sample_rate, samples.pts = 16000, 0
        container.mux([*sound.encode(samples), *sound.encode(None)])
        picture = av.VideoFrame.from_ndarray(make_picture(0, 32, 32), format="rgb24").reformat(format="yuvj420p")
        container.mux([*cover.encode(picture), *cover.encode(None)])
    with pytest.raises(video.NoVideoError, match=r"a\.mp4: no video in it"):
        video.read_frames(path)


def test_no_pictures(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=0, sound=Sound(0.5))
    with pytest.raises(video.NoVideoError, match=r"a\.mp4: no video in it, only audio"):
        video.read_frames(path)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"", "is empty"), (b"no video" * 500, "no readable media file")]
)
def test_what_is_no_media_file(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(video.MediaError, match=rf"a\.mp4: .*{message}"):
        video.read_frames(path)


def test_a_folder(tmp_path):
    with pytest.raises(video.MediaError, match="a folder"):
        video.read_frames(tmp_path)


@pytest.mark.parametrize("fraction", [0.5, 0.9])
@pytest.mark.parametrize(
    ("name", "faststart", "message"),
    [
        ("a.mp4", False, "no readable media file"),  # the index is at the end and gone
        ("b.mp4", True, "cut short|corrupt"),
        ("c.mkv", False, "cut short|corrupt"),
        ("d.webm", False, "cut short|corrupt"),
    ],
)
def test_a_file_that_ends_early(tmp_path, name, faststart, message, fraction):
    path = make_video(tmp_path / name, num_frames=60, sound=Sound(6.0), faststart=faststart)
    video.read_frames(path, size=SIZE)
    with pytest.raises(video.MediaError, match=message):
        video.read_frames(truncate(path, fraction), size=SIZE)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm"])
def test_a_file_that_starts_late_is_not_cut_short(tmp_path, name):
    path = make_video(tmp_path / name, num_frames=4, pts_ms=[900, 1000, 1100, 1200])
    assert video.read_frames(path, size=SIZE).duration_sec == pytest.approx(0.4, abs=0.002)


@pytest.mark.parametrize(
    ("fps", "missing_sec", "cut_short"), [(30, 0.15, False), (30, 0.3, True), (1, 1.4, False), (1, 1.6, True)]
)
def test_how_much_may_be_missing_at_the_end(tmp_path, fps, missing_sec, cut_short):
    """A fifth of a second, or one frame and a half where frames are longer."""
    path = make_video(tmp_path / "a.mkv", num_frames=4, fps=fps)
    ends = media.Ends()
    with media.open_media(path) as container:
        for packet in container.demux():
            ends.note(packet)
        duration = round((float(ends.sec) + missing_sec) * av.time_base)
        said = SimpleNamespace(duration=duration, start_time=0, format=container.format, streams=container.streams)
        if cut_short:
            with pytest.raises(video.MediaError, match="cut short"):
                ends.refuse_truncated(said, path)
        else:
            ends.refuse_truncated(said, path)


@pytest.mark.parametrize("duration", [None, 0])
def test_a_header_without_a_length_declares_none(duration):
    assert media.declared_sec(SimpleNamespace(duration=duration)) is None
    assert media.declared_sec(SimpleNamespace(duration=2_500_000)) == 2.5


def test_a_codec_without_a_decoder(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=4, sound=Sound(0.4))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(video.MediaError, match=r"no decoder for its video stream"):
        video.read_frames(path, size=SIZE)


def test_a_hole_in_the_data(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=40, width=160, height=128)
    data = bytearray(path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    with pytest.raises(video.MediaError, match=r"a\.mp4: corrupt video data after \d+ decoded frames"):
        video.read_frames(path, size=SIZE)
