"""Segments of a surveyed video, decoded by as many threads as there are cores, and delivered in order.

One thread reads the file once more from start to end and deals out packets; FFmpeg and Pillow release the interpreter
lock, so that threads are enough. What is in flight is bounded: compressed bytes, kept pictures and decoders.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import numpy as np

from vidi.inputs import container as media
from vidi.inputs.codecs import Odd
from vidi.inputs.survey import Segment, Survey

__all__ = ["frames"]

MAX_BYTES = 256 << 20  #: of packets in flight
MAX_KEPT = 1024  #: pictures in flight

Shrink = Callable[[Any], np.ndarray]


def frames(path: Path, survey: Survey, shrink: Shrink, listener: media.Listener | None = None) -> Iterator[np.ndarray]:
    """Kept frames of all segments, in order, each as ``shrink`` makes it of the decoded one.

    ``listener`` is given the packets of the other streams as they come by. Raises Odd where what is decoded is not what
    was surveyed: all frames up to there were right, the rest must be read in sequence.
    """
    with media.open_media(path) as container:
        stream = media.first_stream(container, "video")
        assert stream is not None
        workers = media.num_decoders(stream.codec_context)
        if listener is not None:
            listener.begin(container)
        # Where there are fewer segments than cores, each is decoded by several.
        decoders = _Decoders(path, max(1, workers // max(1, len(survey.segments))))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        in_flight: deque[tuple[Future[list[np.ndarray]], int, int]] = deque()
        try:
            for packets, segment in _dealt(container, stream, survey.segments, listener):
                size, kept = sum(packet.size for packet in packets), sum(segment.wanted)
                while in_flight and (
                    len(in_flight) >= 2 * workers
                    or size + sum(job[1] for job in in_flight) > MAX_BYTES
                    or kept + sum(job[2] for job in in_flight) > MAX_KEPT
                    or in_flight[0][0].done()
                ):
                    yield from in_flight.popleft()[0].result()
                in_flight.append((pool.submit(decoders.decode, packets, segment, shrink), size, kept))
            while in_flight:
                yield from in_flight.popleft()[0].result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _dealt(
    container: Any, stream: Any, segments: Sequence[Segment], listener: media.Listener | None
) -> Iterator[tuple[list[Any], Segment]]:
    """Each segment with its packets, as soon as the file has been read so far; the file is read to its end."""
    waiting = deque(segments)
    held: dict[int, Any] = {}
    needed = _needed(waiting)
    video_packets = 0
    try:
        for packet in media.packets(container):
            if packet.stream.index != stream.index:
                if listener is not None:
                    listener.hear(packet)
                continue
            if not packet.size:
                continue
            if video_packets in needed:
                held[video_packets] = packet
            while waiting and video_packets >= waiting[0].packets[-1]:
                segment = waiting.popleft()
                if any(number not in held for number in segment.packets):
                    raise Odd("the file changed while it was read")
                packets = [held[number] for number in segment.packets]
                needed = _needed(waiting)
                held = {number: packet for number, packet in held.items() if number in needed}
                yield packets, segment
            video_packets += 1
    except (av.FFmpegError, OSError):
        raise Odd("its packets cannot be read a second time (damage)") from None
    if waiting:
        raise Odd("the file changed while it was read")


def _needed(waiting: Sequence[Segment]) -> set[int]:
    """Packets of the next two segments: the first picture of an open one is given to the one in front of it as well."""
    return {number for segment in itertools.islice(waiting, 2) for number in segment.packets}


class _Decoders:
    """Codec contexts as the container makes them, used again from segment to segment."""

    def __init__(self, path: Path, threads_each: int) -> None:
        self._path, self._threads_each = path, threads_each
        self._free: list[Any] = []

    def decode(self, packets: Sequence[Any], segment: Segment, shrink: Shrink) -> list[np.ndarray]:
        """The kept frames of one segment. Raises Odd where other frames come out than must, or a damaged one."""
        try:
            codec = self._free.pop()
        except IndexError:
            codec = self._new()
        kept, times = [], []
        wanted = dict(zip(segment.times, segment.wanted, strict=True))
        try:
            for packet in [*packets, None]:
                for frame in codec.decode(packet):
                    if frame.is_corrupt:
                        raise Odd("damaged pictures")
                    times.append(frame.pts)
                    if wanted.get(frame.pts):
                        kept.append(shrink(frame))
        except (av.FFmpegError, OSError):
            raise Odd("pictures that cannot be decoded (damage)") from None
        if times != list(segment.times):
            raise Odd("other frames came out of the decoder than its packets announce")
        codec.flush_buffers()
        self._free.append(codec)
        return kept

    def _new(self) -> Any:
        with media.open_media(self._path) as container:
            stream = media.first_stream(container, "video")
            assert stream is not None
            codec = stream.codec_context
            codec.options = media.DECODER_OPTIONS
            codec.thread_count, codec.thread_type = self._threads_each, "AUTO"
            return codec
