"""Frames of a video: one a second, resized while decoding (spec §2).

Letters: F frames, S side of the square picture.

Two ways lead to the same frames, bit for bit. In sequence, the reference: every frame is decoded, from start to end.
In parallel: the file is surveyed without decoding, cut where decoding can start, and only what is needed is decoded, on
all cores. Whatever the rules for cutting do not cover is read in sequence, and `Frames.reading` says so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidi.inputs import container as media
from vidi.inputs import parallel
from vidi.inputs.codecs import Odd
from vidi.inputs.container import MediaError, NoVideoError
from vidi.inputs.survey import Survey, survey

__all__ = ["MAX_FRAMES", "Frames", "MediaError", "NoVideoError", "Video", "frame_step", "read_frames"]

#: Sampled frames that are read without being asked: four hours at one a second, 6.4 GB of pixels at full size.
MAX_FRAMES = 14400

Progress = Callable[[float, float | None], None]


@dataclass(frozen=True)
class Frames:
    """Sampled frames of one video."""

    images_u8: Tensor  #: (F, 3, S, S) uint8, RGB; ``pixels.normalize`` makes floats of them
    duration_sec: float  #: length of the video stream, what fractions in an answer are multiplied by
    average_fps: float
    num_frames: int  #: frames of the whole stream
    step: int
    reading: str = "sequential"  #: "parallel" or "sequential"
    why: str = ""  #: why it was read in sequence

    @property
    def indices(self) -> range:
        """Frame numbers that were kept: 0, step, 2·step, … below ``num_frames``."""
        return range(0, self.num_frames, self.step)


def frame_step(average_fps: float, fps: float = 1.0) -> int:
    """Frames from one sample to the next: round(average_fps / fps), half to even, at least 1 (spec §2).

    Raises ValueError unless both rates are positive and finite, and ``fps`` from a millionth to a million.
    """
    for name, rate in (("average_fps", average_fps), ("fps", fps)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} is {rate}; a positive number of frames per second is needed")
    if not 1e-6 <= fps <= 1e6:
        raise ValueError(f"fps is {fps}; from 0.000001 to 1,000,000 frames a second")
    return max(1, round(average_fps / fps))


class Video:
    """A file that is ready to be read: its rate, which frames will be kept, and whether it can be cut.

    num_kept: how many frames `pictures` will give; None where only reading in sequence can tell. reading, why: as in
    `Frames`, final once `pictures` has ended. num_frames, duration_sec: known once it has ended.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: float = 1.0,
        size: int = 384,
        max_frames: int = MAX_FRAMES,
        check: bool = False,
    ) -> None:
        """Opens and surveys the file. ``check``: read it in sequence, which notices all damage that can be noticed.

        Raises as `read_frames` does.
        """
        if size < 1:
            raise ValueError(f"size is {size}; at least 1 pixel a side")
        if max_frames < 1:
            raise ValueError(f"max_frames is {max_frames}; at least 1")
        frame_step(1.0, fps)
        self.path, self.size, self.fps, self.max_frames = Path(path), size, fps, max_frames
        self.num_frames, self.duration_sec = 0, Fraction(0)
        self._survey: Survey | None = None
        self.why = "asked for (--check)" if check else ""
        with media.open_media(path) as container:
            stream = media.first_stream(container, "video")
            if stream is None:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise NoVideoError(f"{path}: no video in it, only {kinds}; give a file with pictures")
            rate = stream.average_rate or stream.guessed_rate
            if not rate:
                raise MediaError(
                    f"{path}: its frame rate is unknown; write it anew: ffmpeg -i {media.quoted(path)} -r 30 fixed.mp4"
                )
            media.check_decodable(stream, path)
            self.rate: Fraction = rate
            self.step = frame_step(float(rate), fps)
            self.total_sec = media.declared_sec(container)
            self._check_count(int(_stated_sec(container, stream) * rate), stated=True)
            if not check:
                try:
                    self._survey = survey(container, stream, path, self.step, rate, check_count=self._check_count)
                except Odd as odd:
                    self.why = str(odd)
        self.num_kept = None if self._survey is None else -(-self._survey.num_frames // self.step)

    @property
    def reading(self) -> str:
        return "sequential" if self.why else "parallel"

    def pictures(self, listener: media.Listener | None = None) -> Iterator[np.ndarray]:
        """The kept frames in order, (3, S, S) uint8 each. ``listener`` is given the packets of all other streams.

        Where a file turns out not to be what it was taken for, the rest is read in sequence: the frames are the same.
        """
        given = 0
        if self._survey is not None:
            try:
                for picture in parallel.frames(self.path, self._survey, self._square_u8, listener):
                    given += 1
                    yield picture
                self._ended(self._survey.num_frames, self._survey.start_sec, self._survey.end_sec)
                return
            except Odd as odd:
                self.why = str(odd)
        yield from itertools.islice(self._in_sequence(listener), given, None)

    def _in_sequence(self, listener: media.Listener | None) -> Iterator[np.ndarray]:
        """The reference: every frame decoded, by number one in ``step`` kept."""
        with media.open_media(self.path) as container:
            stream = media.first_stream(container, "video")
            assert stream is not None
            count, start_sec, end_sec = 0, None, None
            for count, frame in enumerate(media.decoded(container, stream, self.path, listener), start=1):
                if (count - 1) % self.step == 0:
                    self._check_count(count)
                    yield self._square_u8(frame)
                if frame.pts is not None:
                    shown_sec = frame.pts * frame.time_base
                    start_sec = shown_sec if start_sec is None else start_sec
                    end_sec = shown_sec + ((frame.duration or 0) * frame.time_base or 1 / self.rate)
        if count == 0:
            raise NoVideoError(
                f"{self.path}: a video stream without a single decodable frame; download or encode it again"
            )
        self._ended(count, start_sec, end_sec)

    def _ended(self, count: int, start_sec: Fraction | None, end_sec: Fraction | None) -> None:
        self.num_frames, self.duration_sec = count, count / self.rate
        if start_sec is not None and end_sec is not None:
            span_sec = end_sec - start_sec
            if abs(span_sec - self.duration_sec) > 1 / self.rate:
                self.duration_sec = span_sec

    def _check_count(self, num_frames: int, stated: bool = False) -> None:
        """Raise MediaError where ``num_frames`` of the file give more samples than are read. stated: the file holds no
        more than these; else they were counted, and how many follow nobody knows."""
        kept = -(-num_frames // self.step)
        if kept <= self.max_frames:
            return
        length_sec, step = float(num_frames / self.rate), -(-num_frames // self.max_frames)
        # Samples are whole frames apart: rounded down, so that the step is no smaller.
        fewer = f" {_two_digits(float(self.rate / step))}" if stated else ", below the present one"
        raise MediaError(
            f"{self.path}: {length_sec:,.0f} s or more at {self.fps:g} frames a second: {kept:,} sampled frames, "
            f"{kept * 3 * self.size**2 / 1e9:.1f} GB of pixels; at most {self.max_frames:,} are read. Raise the limit "
            f"(--max-frames{f' {kept}' if stated else ''}), look at fewer (--fps{fewer}), or cut the file: "
            f"ffmpeg -i {media.quoted(self.path)} -t {int(self.max_frames * self.step / self.rate)} "
            f"-c copy {media.quoted(f'part{self.path.suffix}')}"
        )

    def _square_u8(self, frame: Any) -> np.ndarray:
        """One decoded frame -> (3, S, S) uint8, upright."""
        rgb_HWC = frame.to_ndarray(format="rgb24")
        if turns := round(frame.rotation / 90) % 4:
            rgb_HWC = np.ascontiguousarray(np.rot90(rgb_HWC, turns))
        image = Image.fromarray(rgb_HWC).resize((self.size, self.size), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def _two_digits(value: float) -> str:
    """A positive number of two digits that is not above ``value``."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.floor(value / unit) * unit:.2g}"


def _stated_sec(container: Any, stream: Any) -> Fraction:
    """The least length of the pictures that the header states; 0 where it states none."""
    if media.has_index(container) and stream.duration:
        return Fraction(stream.duration * stream.time_base)
    if media.states_length(container):
        # The whole file's, and sound may end a little later.
        return max(Fraction(0), Fraction(media.declared_sec(container) or 0) - 60)
    return Fraction(0)


def read_frames(
    path: str | Path,
    *,
    fps: float = 1.0,
    size: int = 384,
    max_frames: int = MAX_FRAMES,
    check: bool = False,
    progress: Progress | None = None,
) -> Frames:
    """Keep every ``frame_step``-th frame of a video, resized to ``size`` × ``size`` (spec §2).

    The rule goes by frame number and the stream's average rate, also where the rate varies. Each kept frame: RGB,
    turned upright (below), PIL bicubic straight to the square. Only resized frames stay in memory: 3·S² bytes each.

    A rotation in the file's metadata (phones) is applied in quarter turns, as players and ffmpeg do.

    ``duration_sec`` is frame count / average rate. Where the timestamps span something else by more than one frame
    (a variable rate in mkv or webm, whose average rate is a guess), it is the span of the timestamps, from the first
    frame to the end of the last. The header's length is not used: it covers the sound, too.

    ``check``: every frame is decoded, in sequence, also those that nobody needs, so that damage in them is noticed.
    ``progress(done_sec, total_sec or None)`` is called at each kept frame, and once at the end.

    Raises NoVideoError where the file holds no pictures, MediaError where it is missing, damaged, cut short, or holds
    more than ``max_frames`` sampled frames, and ValueError for rates, sizes or limits that are not positive.
    """
    video = Video(path, fps=fps, size=size, max_frames=max_frames, check=check)
    # One growing buffer instead of a list to be stacked: the pictures are never held twice.
    pixels = bytearray()
    for index, picture in enumerate(video.pictures()):
        pixels += picture.tobytes()
        if progress is not None:
            progress(float(index * video.step / video.rate), video.total_sec)
    if progress is not None:
        progress(float(video.duration_sec), float(video.duration_sec))
    images_u8 = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, size, size)
    return Frames(
        images_u8,
        float(video.duration_sec),
        float(video.rate),
        video.num_frames,
        video.step,
        reading=video.reading,
        why=video.why,
    )
