"""Test videos, made on the spot with PyAV.

Every picture differs from its neighbours (a brightness per index over a moving gradient with fine detail), so that a
reader which is one frame off, swaps axes or resizes otherwise is seen.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.not_run import not_run

__all__ = [
    "Film",
    "Sound",
    "ffmpeg_command",
    "make_film",
    "make_picture",
    "make_sound",
    "make_video",
    "rotate_mp4",
    "run_ffmpeg",
    "truncate",
]

VIDEO_CODECS = {".mp4": "libx264", ".mkv": "libx264", ".webm": "libvpx"}
AUDIO_CODECS = {".mp4": "aac", ".mkv": "aac", ".webm": "libopus"}


@dataclass(frozen=True)
class Sound:
    """A sweep of `seconds`, another one in each channel."""

    seconds: float = 2.0
    rate_hz: int = 48000
    channels: int = 2
    codec: str | None = None


def make_picture(index: int, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: gradients, stripes of two pixels, and a brightness that tells the index."""
    y, x = np.mgrid[0:height, 0:width]
    red = (3 * x + 11 * index) % 256
    green = (5 * y + 40 * ((x // 2) % 2) + 23 * index) % 256
    blue = (x + y) // 2 % 128 + (index * 37) % 128
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def make_sound(sound: Sound) -> np.ndarray:
    """(channels, samples) int16: a sweep with a slow swell, channels at different pitch and loudness."""
    t = np.arange(round(sound.seconds * sound.rate_hz)) / sound.rate_hz
    rows = []
    for channel in range(sound.channels):
        sweep = np.sin(2 * np.pi * ((220 + 170 * channel) * t + 60 * t * t))
        rows.append((0.7 - 0.3 * channel) * sweep * (0.6 + 0.4 * np.sin(2 * np.pi * 0.5 * t)))
    return np.round(np.stack(rows) * 32767).astype(np.int16)


def make_video(
    path: Path,
    *,
    num_frames: int = 20,
    fps: Fraction | int = 10,
    width: int = 96,
    height: int = 64,
    sound: Sound | None = None,
    pts_ms: Sequence[int] | None = None,
    faststart: bool = False,
    sound_first: bool = False,
    color: int | None = None,
) -> Path:
    """Write a video of `num_frames` pictures (0: no video stream) with `sound` (None: no audio stream).

    The container and the codecs follow the suffix. `pts_ms` gives each frame its own time (variable frame rate);
    `faststart` puts an mp4's index before its data; `sound_first` numbers the sound 0 and the pictures 1;
    `color` tags a colour matrix (1 is BT.709).
    """
    options = {"movflags": "+faststart"} if faststart else {}
    with av.open(str(path), "w", options=options) as container:
        video: av.VideoStream | None = None
        audio: av.AudioStream | None = None
        for kind in ("audio", "video") if sound_first else ("video", "audio"):
            if kind == "video" and num_frames:
                codec = VIDEO_CODECS[path.suffix]
                speed = {"preset": "ultrafast"} if codec == "libx264" else {"deadline": "realtime", "cpu-used": "8"}
                stream = container.add_stream(codec, rate=Fraction(fps), options=speed)
                assert isinstance(stream, av.VideoStream)
                video = stream
                video.width, video.height, video.pix_fmt = width, height, "yuv420p"
                if color is not None:
                    video.codec_context.colorspace = color
                if pts_ms is not None:
                    video.codec_context.time_base = Fraction(1, 1000)
            elif kind == "audio" and sound is not None:
                stream = container.add_stream(sound.codec or AUDIO_CODECS[path.suffix], rate=sound.rate_hz)
                assert isinstance(stream, av.AudioStream)
                audio = stream
                audio.layout = "mono" if sound.channels == 1 else "stereo"
        if audio is not None:
            assert sound is not None
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(make_sound(sound).T.reshape(1, -1)), format="s16", layout=audio.layout.name
            )
            frame.sample_rate, frame.pts = sound.rate_hz, 0
            container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
        for index in range(num_frames):
            assert video is not None
            picture = av.VideoFrame.from_ndarray(make_picture(index, width, height), format="rgb24")
            picture = picture.reformat(format="yuv420p")
            if pts_ms is not None:
                picture.pts, picture.time_base = pts_ms[index], Fraction(1, 1000)
            container.mux(video.encode(picture))
        if video is not None:
            container.mux(video.encode(None))
    return path


@dataclass(frozen=True)
class Film:
    """How `make_film` encodes: any codec with any options."""

    codec: str
    options: dict[str, str]
    num_frames: int = 60
    fps: Fraction | int = 25
    width: int = 96
    height: int = 64
    pixels: str = "yuv420p"
    pts_ms: Sequence[int] | None = None
    movflags: str = ""


def make_film(path: Path, film: Film) -> Path:
    """Write `film.num_frames` pictures as `film` says, muxed by suffix, without sound."""
    options = {"movflags": film.movflags} if film.movflags else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(film.codec, rate=Fraction(film.fps), options=film.options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = film.width, film.height, film.pixels
        if film.pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(film.num_frames):
            picture = av.VideoFrame.from_ndarray(make_picture(index, film.width, film.height), format="rgb24")
            picture = picture.reformat(format=film.pixels)
            picture.pts, picture.time_base = index, 1 / Fraction(film.fps)
            if film.pts_ms is not None:
                picture.pts, picture.time_base = film.pts_ms[index], Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def truncate(path: Path, fraction: float) -> Path:
    """Cut the file's tail off, in place."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def rotate_mp4(path: Path, degrees: int) -> Path:
    """Write a clockwise display rotation of 90, 180 or 270 degrees into the first track header, as phones do."""
    cos, sin = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = bytearray(path.read_bytes())
    # tkhd, version 0: type 4, version and flags 4, times and id 20, reserved 8, layer to reserved 8, then the matrix.
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    data[start : start + 36] = struct.pack(">9i", cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def ffmpeg_command(*, same_generation: bool = False) -> str:
    """An ffmpeg command: $VIDI_FFMPEG, the one of the package imageio-ffmpeg, or the machine's; else NOT RUN.

    ``same_generation``: one that drops the padding at an mp4's end and whose resampler rounds as PyAV's does. Version
    9 was seen to, version 5 not; nothing in between was tried.
    """
    command = os.environ.get("VIDI_FFMPEG") or _packaged_ffmpeg() or shutil.which("ffmpeg")
    if command is None:
        not_run("no ffmpeg command; apt-get install ffmpeg, or pip install imageio-ffmpeg")
    if same_generation:
        banner = subprocess.run([command, "-version"], capture_output=True, text=True, check=True).stdout.split("\n")[0]
        found = re.search(r"version n?(?:\d+:)?(\d+)", banner)
        if found is None or int(found[1]) < 9:
            not_run(f"ffmpeg 9 or newer is needed for equal bits ({banner}); pip install imageio-ffmpeg")
    return command


def run_ffmpeg(command: str, path: Path, *output: str) -> bytes:
    """What ffmpeg writes to its standard output for ``path``."""
    call = [command, "-v", "error", "-i", str(path), *output, "-"]
    return subprocess.run(call, capture_output=True, check=True).stdout


def _packaged_ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg
    except ImportError:
        return None
    return imageio_ffmpeg.get_ffmpeg_exe()
