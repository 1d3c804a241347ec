"""Opening a media file that someone else wrote, and decoding one of its streams; errors name the file and the remedy.

What is opened is decided here, not by FFmpeg: a regular file whose first bytes are those of one of CONTAINERS. The
demuxer is named outright and reads through our own file handle; whatever else it asks to open is refused. Playlists,
concat scripts, image patterns, session descriptions and references to other files (mov `dref`) therefore reach nothing.

The whole file is demuxed even when one stream is decoded: a file that ends before its header says so is noticed from
the packets of all streams together (sound may rightly outlast the pictures, or the other way round).
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, cast

import av
from av.container import InputContainer
from av.stream import Disposition, Stream

from vidi.inputs import boxes

__all__ = ["CONTAINERS", "MAX_PIXELS", "Ends", "Listener", "MediaError", "NoVideoError", "check_decodable"]
__all__ += ["corrupt", "declared_sec", "decoded", "first_stream", "has_index", "num_decoders", "open_media"]
__all__ += ["open_regular", "packets", "quoted", "states_length"]

#: What is opened: FFmpeg's demuxer, and how such files are called.
CONTAINERS = {
    "mov": "mp4, mov, m4v, 3gp",
    "matroska": "mkv, webm",
    "avi": "avi",
    "mpegts": "ts, m2ts",
    "mpeg": "mpg, vob",
    "flv": "flv",
    "ogg": "ogv",
    "asf": "wmv, asf",
}
#: Of one picture. H.264's highest level, 8192 × 4352; a decoder holds some 17 such pictures.
MAX_PIXELS = 8192 * 4352
#: Also for a size that a stream takes on midway.
DECODER_OPTIONS = {"max_pixels": str(MAX_PIXELS)}
#: Of all pictures that decoders hold at once, beyond a first decoder's.
MAX_DECODED_BYTES = 1 << 30
#: What a demuxer may look through for packets: bytes at first, more where headers hold an index or fonts; and so many times
#: those of each packet that it finds.
BARREN_BYTES, HEADER_BYTES, BARREN_RATIO = 32 << 20, 256 << 20, 16
#: Each costs a decoder when a file is opened; fonts, of which a film with subtitles may bring a hundred, are streams too.
MAX_STREAMS = 256
#: FFmpeg asks for 32 KiB at a time otherwise, a call into Python each.
_BUFFER_BYTES = 1 << 20


def quoted(path: str | Path) -> str:
    """A path as a command line takes it: what a message advises is pasted, and the file's name came from elsewhere."""
    return shlex.quote(str(path))


class MediaError(ValueError):
    """A media file that cannot be read; the text names the file, what is wrong, and what to do."""


class NoVideoError(MediaError):
    """A media file without pictures."""


@contextmanager
def open_media(path: str | Path) -> Iterator[InputContainer]:
    """Open ``path`` for reading. Raises MediaError for what is no readable media file."""
    path = Path(path)
    with open_regular(path) as file:
        name = _demuxer(file.read(600))
        if name is None:
            kinds = "; ".join(CONTAINERS.values())
            raise MediaError(
                f"{path}: no readable media file (its first bytes are of none of the containers that are opened: "
                f"{kinds}); it is damaged or of another kind. Download it again, or convert it: "
                f"ffmpeg -i {quoted(path)} converted.mp4"
            )
        source = _Source(file, path, HEADER_BYTES if name in ("mov", "matroska") else BARREN_BYTES)
        options = DECODER_OPTIONS | {"max_streams": str(MAX_STREAMS)}
        if name == "mov":
            options["enable_drefs"] = "0"
            problem = boxes.promises_too_much(file, os.fstat(file.fileno()).st_size)
            if problem is not None:
                raise MediaError(
                    f"{path}: no readable media file (it states {problem}). Download it again, or take its first "
                    f"pictures and sound out of it: ffmpeg -i {quoted(path)} -c copy plain.mp4"
                )
        file.seek(0)
        try:
            container = av.open(
                source,
                "r",
                format=name,
                options=options,
                metadata_errors="replace",
                buffer_size=_BUFFER_BYTES,
                io_open=_refuse_another_file,
            )
        except (av.FFmpegError, OSError, ValueError) as error:
            problem = source.barren or _reason(error)
            if getattr(error, "errno", None) == errno.ENOMEM:
                problem = f"it states more than {MAX_STREAMS} streams, or more data than there is memory for"
            raise MediaError(
                f"{path}: no readable media file ({problem}); it is damaged, cut short, or of another kind. "
                f"Download it again, or see what ffprobe says of it"
            ) from None
        with container:
            yield container


def open_regular(path: Path, what: str = "video") -> BinaryIO:
    """A binary handle of a regular file, called ``what``: neither opening nor reading it can wait for anybody."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise MediaError(f"{path}: cannot be opened ({_reason(error)})") from None
    kind = os.fstat(handle)
    reason = None
    if stat.S_ISDIR(kind.st_mode):
        reason = f"a folder; give the {what} file itself"
    elif not stat.S_ISREG(kind.st_mode):
        reason = f"no regular file but a pipe or a device, which may never end; save the {what} to a file first"
    elif kind.st_size == 0:
        reason = "the file is empty (0 bytes); copy or download it again"
    if reason is not None:
        os.close(handle)
        raise MediaError(f"{path}: {reason}")
    return os.fdopen(handle, "rb")


class _Source:
    """What FFmpeg reads through. A place that does not exist is an error it knows, not an exception in its callback; a file
    that gives hardly a packet ends early, however many empty bytes it claims to have. barren: what is then wrong."""

    def __init__(self, file: Any, path: Path, barren_bytes: int) -> None:
        self.path, self.name, self.tell, self._file = path, file.name, file.tell, file
        self._left, self._furthest, self.barren = barren_bytes, 0, ""

    def read(self, size: int) -> bytes:
        if self._left <= 0:
            self.barren = f"hardly a packet in its first {self._furthest / 1e6:,.0f} MB"
            return b""
        data: bytes = self._file.read(size)
        end = self._file.tell()
        # What is read again, as of files whose sound lies far from its pictures, counts once.
        self._left -= max(0, end - max(self._furthest, end - len(data)))
        self._furthest = max(self._furthest, end)
        return data

    def found(self, packet: Any) -> None:
        self._left += BARREN_RATIO * packet.size

    def seek(self, offset: int, whence: int) -> int:
        try:
            return int(self._file.seek(offset, whence))
        except (OSError, OverflowError):
            return -errno.EINVAL


def _demuxer(head: bytes) -> str | None:
    """The demuxer for a file that begins with ``head``, a key of CONTAINERS, or None."""
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
        return "mov"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi"
    # Packets of 188 bytes, or of 192 with a time stamp of four in front.
    if any(head[first : first + 3 * size : size] == b"\x47\x47\x47" for first, size in ((0, 188), (4, 192))):
        return "mpegts"
    marks = {
        b"\x1a\x45\xdf\xa3": "matroska",
        b"\x00\x00\x01\xba": "mpeg",
        b"FLV\x01": "flv",
        b"OggS": "ogg",
        bytes.fromhex("3026b2758e66cf11"): "asf",
    }
    return next((name for mark, name in marks.items() if head.startswith(mark)), None)


def _refuse_another_file(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise PermissionError("it asks for another file to be opened, which is refused")


# ---- what a container says of itself ------------------------------------------------------------------------------


def first_stream(container: InputContainer, kind: str) -> Any | None:
    """The first "video" or "audio" stream, or None. A cover picture (of a music file) is no video."""
    for stream in container.streams:
        if stream.type == kind and not stream.disposition & Disposition.attached_pic:
            return stream
    return None


def has_index(container: InputContainer) -> bool:
    """Whether the container is of the mp4/mov family, whose durations come from an index, not from an estimate."""
    return "mov" in container.format.name.split(",")


def states_length(container: InputContainer) -> bool:
    """Whether its header states a length (mp4, mkv, webm); elsewhere `declared_sec` is FFmpeg's estimate."""
    return has_index(container) or "matroska" in container.format.name


def declared_sec(container: InputContainer) -> float | None:
    """The length that the file's header states, in seconds, or None."""
    return container.duration / av.time_base if container.duration else None


class Ends:
    """Where the packets seen so far end, over all streams: tells a file that was cut short."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}
        self._streams: dict[int, Any] = {}

    def note(self, packet: Any) -> None:
        if packet.pts is not None:
            index, end = packet.stream_index, packet.pts + (packet.duration or 0)
            if index not in self._ends:
                self._ends[index], self._streams[index] = end, packet.stream
            elif end > self._ends[index]:
                self._ends[index] = end

    @property
    def sec(self) -> Fraction:
        ends = (Fraction(end) * (self._streams[index].time_base or 0) for index, end in self._ends.items())
        return max(ends, default=Fraction(0))

    def refuse_truncated(self, container: InputContainer, path: str | Path) -> None:
        """Raise MediaError where a stated length is not reached.

        The slack: containers round lengths, and count an encoder's padding or not (some 0.03 s); a last frame of
        unknown duration counts for nothing.
        """
        declared = declared_sec(container)
        if declared is None or not states_length(container):
            return
        video = first_stream(container, "video")
        rate = video.average_rate if video is not None else None
        slack = max(0.2, 1.5 / float(rate) if rate else 0.0)
        # A header counts from zero also where the first frame comes later.
        seen = max(float(self.sec), 0.0) - min(0, container.start_time or 0) / av.time_base
        if declared - seen > slack:
            raise MediaError(
                f"{path}: cut short: its header states {declared:.2f} s, its data ends at {seen:.2f} s. Download it "
                f"again, or keep what is there: ffmpeg -i {quoted(path)} -c copy {quoted(f'kept{Path(path).suffix}')}"
            )


def packets(container: InputContainer) -> Iterator[Any]:
    """All packets in the order of the file, and one of size 0 a stream at its end. Raises MediaError where hardly any come.

    PyAV 18 raises IndexError behind the last of them where streams have appeared midway; nobody asks for those here.
    """
    source = cast(Any, container).file.file
    try:
        for packet in container.demux():
            source.found(packet)
            yield packet
    except IndexError:
        pass
    except (av.FFmpegError, OSError):
        if not source.barren:
            raise
    if source.barren:
        raise MediaError(f"{source.path}: damaged: {source.barren}; copy or download the file again")


def check_decodable(stream: Any, path: str | Path) -> None:
    """Raise MediaError for a stream that has no decoder, or whose pictures are too large."""
    codec = stream.codec_context
    if codec is None:
        raise MediaError(
            f"{path}: no decoder for its {stream.type} stream; convert it: ffmpeg -i {quoted(path)} converted.mp4"
        )
    if stream.type == "video" and codec.width * codec.height > MAX_PIXELS:
        raise _too_large(
            path, f"{codec.width} × {codec.height}, {codec.width * codec.height / 1e6:,.0f} million pixels"
        )


def _too_large(path: str | Path, size: str) -> MediaError:
    return MediaError(
        f"{path}: pictures of {size}; at most {MAX_PIXELS / 1e6:.0f} million (8192 × 4352) are decoded. Make them smaller: "
        f"ffmpeg -i {quoted(path)} -vf scale=1920:-2 smaller.mp4"
    )


def num_decoders(codec: Any) -> int:
    """Threads for decoding: the cores that this process may use; fewer where pictures are so large as to fill memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # 17 pictures of 1.5 bytes a pixel: the most references H.264 and HEVC allow, and the one being decoded.
    decoder_bytes = 17 * 3 * max(1, codec.width * codec.height) // 2
    return max(1, min(cores, MAX_DECODED_BYTES // decoder_bytes))


class Listener(Protocol):
    """Is given the packets of all streams but the one that is decoded, in the order of the file."""

    def begin(self, container: InputContainer) -> None:
        """The file is read from its start; once more, where it must be read twice."""

    def hear(self, packet: Any) -> None: ...


def decoded(
    container: InputContainer, stream: Stream, path: str | Path, listener: Listener | None = None
) -> Iterator[Any]:
    """Decode ``stream`` from start to end, frame by frame, in presentation order, by all threads.

    ``listener`` is given the packets of the other streams as they come by. Raises MediaError where data is corrupt, and
    at the end where the file stops well before the length in its header.
    """
    check_decodable(stream, path)
    codec: Any = stream.codec_context
    codec.options = DECODER_OPTIONS
    codec.thread_type = "AUTO"
    if stream.type == "video":
        codec.thread_count = num_decoders(codec)
    if listener is not None:
        listener.begin(container)
    count, ends = 0, Ends()
    try:
        for packet in packets(container):
            ends.note(packet)
            if packet.stream.index == stream.index:  # packet.stream_index is 0 in the flushing packets
                for frame in packet.decode():
                    count += 1
                    yield frame
            elif listener is not None:
                listener.hear(packet)
    except (av.FFmpegError, OSError) as error:
        if stream.type == "video" and not count and not codec.width:
            # FFmpeg keeps no size that is above the limit, and some formats state theirs in the picture alone.
            raise _too_large(path, "no size that could be found, or of one above the limit") from None
        raise corrupt(path, stream.type, count, ends, error) from None
    ends.refuse_truncated(container, path)


def corrupt(path: str | Path, kind: str, count: int, ends: Ends, error: Exception) -> MediaError:
    """The error for data that cannot be decoded, after ``count`` frames that could."""
    return MediaError(
        f"{path}: corrupt {kind} data after {count} decoded frames, about {float(ends.sec):.2f} s in "
        f"({_reason(error)}); copy or download the file again, or rebuild it: "
        f"ffmpeg -err_detect ignore_err -i {quoted(path)} rebuilt.mp4"
    )


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
