"""Opening a media file and decoding one of its streams, with errors that name the file and the remedy.

The whole file is demuxed even when one stream is decoded: a file that ends before its header says so is noticed from
the packets of all streams together (sound may rightly outlast the pictures, or the other way round).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition, Stream

__all__ = ["MediaError", "NoVideoError", "declared_sec", "decoded", "first_stream", "has_index", "open_media"]


class MediaError(ValueError):
    """A media file that cannot be read; the text names the file, what is wrong, and what to do."""


class NoVideoError(MediaError):
    """A media file without pictures."""


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Open ``path`` for reading. Raises MediaError for what is no readable media file."""
    path = Path(path)
    if not path.exists():
        raise MediaError(f"{path}: no such file")
    if path.is_dir():
        raise MediaError(f"{path}: a folder; give the video file itself")
    if path.stat().st_size == 0:
        raise MediaError(f"{path}: the file is empty (0 bytes); copy or download it again")
    try:
        container = av.open(str(path), "r")
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path}: no readable media file ({_reason(error)}); it is damaged, cut short, or of another kind. "
            f"Download it again, or see what ffprobe says of it"
        ) from None
    with container:
        yield container


def first_stream(container: InputContainer, kind: str) -> Any | None:
    """The first "video" or "audio" stream, or None. A cover picture (of a music file) is no video."""
    for stream in container.streams:
        if stream.type == kind and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def has_index(container: InputContainer) -> bool:
    """Whether the container is of the mp4/mov family, whose durations come from an index, not from an estimate."""
    return "mp4" in container.format.name.split(",")


def declared_sec(container: InputContainer) -> float | None:
    """The length that the file's header states, in seconds, or None."""
    return container.duration / av.time_base if container.duration else None


def decoded(container: InputContainer, stream: Stream, path: str | Path) -> Iterator[Any]:
    """Decode ``stream`` from start to end, frame by frame, in presentation order, by all threads.

    Raises MediaError where data is corrupt, and at the end where the file stops well before the length in its header.
    """
    codec: Any = stream.codec_context
    if codec is None:
        raise MediaError(f"{path}: no decoder for its {stream.type} stream; convert it: ffmpeg -i {path} converted.mp4")
    codec.thread_type = "AUTO"
    count, end_sec = 0, Fraction(0)
    try:
        for packet in container.demux():
            if packet.pts is not None and packet.time_base:
                end_sec = max(end_sec, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index == stream.index:  # packet.stream_index is 0 in the flushing packets
                for frame in packet.decode():
                    count += 1
                    yield frame
    except (av.FFmpegError, OSError) as error:
        raise MediaError(
            f"{path}: corrupt {stream.type} data after {count} decoded frames, about {float(end_sec):.2f} s in "
            f"({_reason(error)}); copy or download the file again, or rebuild it: "
            f"ffmpeg -err_detect ignore_err -i {path} rebuilt.mp4"
        ) from None
    _refuse_truncated(container, end_sec, path)


def _refuse_truncated(container: InputContainer, end_sec: Fraction, path: str | Path) -> None:
    """Only where the header states a length (mp4, mkv, webm); elsewhere it is FFmpeg's estimate.

    The slack: containers round lengths, and count an encoder's padding or not (some 0.03 s); a last frame of unknown
    duration counts for nothing.
    """
    declared = declared_sec(container)
    if declared is None or not (has_index(container) or "matroska" in container.format.name):
        return
    video = first_stream(container, "video")
    rate = video.average_rate if video is not None else None
    slack = max(0.2, 1.5 / float(rate) if rate else 0.0)
    # A header counts from zero also where the first frame comes later.
    seen = float(end_sec) - min(0, container.start_time or 0) / av.time_base
    if declared - seen > slack:
        raise MediaError(
            f"{path}: cut short: its header states {declared:.2f} s, its data ends at {seen:.2f} s. Download it again, "
            f"or keep what is there: ffmpeg -i {path} -c copy kept{Path(path).suffix}"
        )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
