"""Frames of a video: one a second, resized while decoding (spec §2).

Letters: F frames, S side of the square picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vidi.inputs import container as media
from vidi.inputs.container import MediaError, NoVideoError

__all__ = ["Frames", "MediaError", "NoVideoError", "frame_step", "read_frames"]


@dataclass(frozen=True)
class Frames:
    """Sampled frames of one video."""

    images_u8: Tensor  #: (F, 3, S, S) uint8, RGB; ``pixels.normalize`` makes floats of them
    duration_sec: float  #: length of the video stream, what fractions in an answer are multiplied by
    average_fps: float
    num_frames: int  #: frames of the whole stream, counted while decoding
    step: int

    @property
    def indices(self) -> range:
        """Frame numbers that were kept: 0, step, 2·step, … below ``num_frames``."""
        return range(0, self.num_frames, self.step)


def frame_step(average_fps: float, fps: float = 1.0) -> int:
    """Frames from one sample to the next: round(average_fps / fps), half to even, at least 1 (spec §2).

    Raises ValueError unless both rates are positive and finite.
    """
    for name, rate in (("average_fps", average_fps), ("fps", fps)):
        if not 0 < rate < float("inf"):
            raise ValueError(f"{name} is {rate}; a positive number of frames per second is needed")
    return max(1, round(average_fps / fps))


def read_frames(
    path: str | Path,
    *,
    fps: float = 1.0,
    size: int = 384,
    progress: Callable[[float, float | None], None] | None = None,
) -> Frames:
    """Decode a video from start to end, keep every ``frame_step``-th frame, resized to ``size`` × ``size`` (spec §2).

    The rule goes by frame number and the stream's average rate, also where the rate varies. Each kept frame: RGB,
    turned upright (below), PIL bicubic straight to the square. Only resized frames stay in memory: 3·S² bytes each.

    A rotation in the file's metadata (phones) is applied in quarter turns, as players and ffmpeg do.

    ``duration_sec`` is frame count / average rate. Where the timestamps span something else by more than one frame
    (a variable rate in mkv or webm, whose average rate is a guess), it is the span of the timestamps, from the first
    frame to the end of the last. The header's length is not used: it covers the sound, too.

    ``progress(done_sec, total_sec or None)`` is called at each kept frame, and once at the end.

    Raises NoVideoError where the file holds no pictures, MediaError where it is missing, damaged or cut short, and
    ValueError for rates or sizes that are not positive.
    """
    if size < 1:
        raise ValueError(f"size is {size}; at least 1 pixel a side")
    frame_step(1.0, fps)
    with media.open_media(path) as container:
        stream = media.first_stream(container, "video")
        if stream is None:
            kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
            raise NoVideoError(f"{path}: no video in it, only {kinds}; give a file with pictures")
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise MediaError(f"{path}: its frame rate is unknown; write it anew: ffmpeg -i {path} -r 30 fixed.mp4")
        step, total_sec = frame_step(float(rate), fps), media.declared_sec(container)
        # One growing buffer instead of a list to be stacked: the pictures are never held twice.
        pixels, count, start_sec, end_sec = bytearray(), 0, None, None
        for count, frame in enumerate(media.decoded(container, stream, path), start=1):
            if (count - 1) % step == 0:
                pixels += _square_u8(frame, size).tobytes()
                if progress is not None:
                    progress(float((count - 1) / rate), total_sec)
            if frame.pts is not None:
                shown_sec = frame.pts * frame.time_base
                start_sec = shown_sec if start_sec is None else start_sec
                end_sec = shown_sec + ((frame.duration or 0) * frame.time_base or 1 / rate)
        if count == 0:
            raise NoVideoError(f"{path}: a video stream without a single decodable frame; download or encode it again")
    duration_sec = count / rate
    if start_sec is not None and end_sec is not None and abs(end_sec - start_sec - duration_sec) > 1 / rate:
        duration_sec = end_sec - start_sec
    if progress is not None:
        progress(float(duration_sec), float(duration_sec))
    images_u8 = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 3, size, size)
    return Frames(images_u8, float(duration_sec), float(rate), count, step)


def _square_u8(frame: Any, size: int) -> np.ndarray:
    """One decoded frame -> (3, size, size) uint8, upright."""
    rgb_HWC = frame.to_ndarray(format="rgb24")
    if turns := round(frame.rotation / 90) % 4:
        rgb_HWC = np.ascontiguousarray(np.rot90(rgb_HWC, turns))
    image = Image.fromarray(rgb_HWC).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)
