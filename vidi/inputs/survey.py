"""A first pass over a file that decodes nothing: how many frames, which are wanted, where decoding can be cut.

Frames are numbered in the order they are shown. A cut stands before a packet from which decoding can start, and which
parts the frames in time as well: all before it are shown before all behind it. Between two cuts lies a Segment, which
a decoder of its own can turn into the same frames as a decoder that came all the way.

    packets    I0 P3 B1 B2 | I4 P6 B5 | …     (decoding order, shown numbers)      step 2: 0, 2, 4, 6 are wanted
    needed     I0 P3    B2 | I4 P6    | …     B1 and B5 are needed by nobody

Where the first frame of a segment is a CRA picture of HEVC, frames that come behind it and are shown before it belong
to the segment in front, which is given that picture, too.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import Flags, InputContainer

from vidi.inputs import codecs
from vidi.inputs.codecs import Odd, Start
from vidi.inputs.container import Ends, packets

__all__ = ["Segment", "Survey", "survey"]

#: A segment is decoded by one thread, its packets and its pictures are held until it is their turn.
MAX_SEGMENT_BYTES = 64 << 20
MAX_SEGMENT_WANTED = 512


@dataclass(frozen=True)
class Segment:
    """Packets that one decoder is given, numbered in the order of the file, and the times of frames that are kept."""

    packets: tuple[int, ...]
    times: tuple[int, ...]  #: of all frames that must come out, ascending, in the stream's time base
    wanted: tuple[bool, ...]  #: which of them are kept


@dataclass(frozen=True)
class Survey:
    """num_frames and the span in seconds are those of the frames that are shown."""

    num_frames: int
    start_sec: Fraction
    end_sec: Fraction
    segments: tuple[Segment, ...]


def survey(
    container: InputContainer,
    stream: Any,
    path: str | Path,
    step: int,
    rate: Fraction,
    *,
    check_count: Callable[[int], None],
) -> Survey:
    """Demux the whole file, and plan how every ``step``-th frame of ``stream`` is decoded.

    ``check_count`` is told how many frames there are so far, and may raise.

    Raises Odd where the file must be decoded in sequence, MediaError where it is cut short.
    """
    looks = codecs.looker(
        stream.codec_context.codec.canonical_name, stream.codec_context.extradata, stream.codec_context.pix_fmt
    )
    # Times that PyAV has FFmpeg make up where a container states none (avi) tell nothing.
    container.flags &= ~cast(int, Flags.gen_pts.value)
    rows = _Rows()
    ends = Ends()
    try:
        for packet in packets(container):
            ends.note(packet)
            if packet.stream.index != stream.index:
                continue
            if packet.size == 0:
                if packet.dts is not None:
                    raise Odd("an empty packet")
                continue  # the demuxer's sign that the file has ended
            rows.add(packet, looks(bytes(packet), packet.is_keyframe))
            check_count(rows.num_shown)
    except (av.FFmpegError, OSError):
        raise Odd("its packets cannot be read to the end (damage)") from None
    ends.refuse_truncated(container, path)
    return rows.planned(step, stream.time_base, rate)


class _Rows:
    """One entry a packet of the video stream, in the order of the file."""

    def __init__(self) -> None:
        self.pts, self.sizes = array("q"), array("q")
        self.starts, self.disposable, self.shown = bytearray(), bytearray(), bytearray()
        self.num_shown, self.last_shown = 0, (-(1 << 63), 0)

    def add(self, packet: Any, look: codecs.Look) -> None:
        if packet.pts is None:
            raise Odd("packets without a time")
        if packet.is_corrupt:
            raise Odd("packets that are marked as damaged")
        if packet.has_sidedata("new_extradata") or packet.has_sidedata("param_change"):
            raise Odd("the codec's parameters change midway")
        shown = look.shown and not packet.is_discard
        self.pts.append(packet.pts)
        self.sizes.append(packet.size)
        self.starts.append(look.start.value)
        self.disposable.append(look.disposable)
        self.shown.append(shown)
        self.num_shown += shown
        if shown and packet.pts > self.last_shown[0]:
            self.last_shown = packet.pts, packet.duration or 0

    def planned(self, step: int, base: Fraction, rate: Fraction) -> Survey:
        pts_P, sizes_P = np.frombuffer(self.pts, np.int64), np.frombuffer(self.sizes, np.int64)
        starts_P = np.frombuffer(self.starts, np.uint8)
        disposable_P, shown_P = (np.frombuffer(x, np.bool_) for x in (self.disposable, self.shown))
        if not self.num_shown:
            raise Odd("no frame that is shown")
        if len(np.unique(pts_P)) != len(pts_P):
            raise Odd("two packets of one time")
        cuts = _cuts(pts_P, starts_P)
        if not cuts or cuts[0] != 0:
            raise Odd("it does not begin with a frame from which decoding can start")
        times_F = np.sort(pts_P[shown_P])
        wanted_P = shown_P & (np.searchsorted(times_F, pts_P) % step == 0)
        segments = []
        for run, tail in _pieces(cuts, pts_P, starts_P):
            # The picture at the head of the tail is the next segment's.
            fed = np.concatenate([run, tail]) if wanted_P[tail[1:]].any() else run
            kept = wanted_P[fed] & ~np.isin(fed, tail[:1])
            if not kept.any():
                continue
            fed = fed[: np.flatnonzero(kept)[-1] + 1]
            kept = kept[: len(fed)]
            needed = kept | ~disposable_P[fed]
            fed, kept = fed[needed], kept[needed]
            if sizes_P[fed].sum() > MAX_SEGMENT_BYTES or kept.sum() > MAX_SEGMENT_WANTED:
                raise Odd("key frames too far apart")
            order = np.argsort(pts_P[fed])
            order = order[shown_P[fed][order]]
            times, flags = pts_P[fed][order], kept[order]
            segments.append(Segment(tuple(fed.tolist()), tuple(times.tolist()), tuple(flags.tolist())))
        last, duration = self.last_shown
        return Survey(
            num_frames=self.num_shown,
            start_sec=int(times_F[0]) * base,
            end_sec=last * base + (duration * base or 1 / rate),
            segments=tuple(reversed(segments)),
        )


def _cuts(pts_P: np.ndarray, starts_P: np.ndarray) -> list[int]:
    """Packets before which the stream can be cut: all frames before are shown before all from there on."""
    before_P = np.concatenate([[np.iinfo(np.int64).min], np.maximum.accumulate(pts_P)[:-1]])
    behind_P = np.minimum.accumulate(pts_P[::-1])[::-1]
    return np.flatnonzero((starts_P != Start.NO.value) & (before_P < behind_P)).tolist()


def _pieces(cuts: list[int], pts_P: np.ndarray, starts_P: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Packets from each cut to the next, the last ones first; and a tail: an open picture behind them with its leading ones.

    Leading frames are shown before that picture and need what comes before the cut: the piece in front has them, too.
    """
    tail = np.arange(0)
    for first, stop in reversed(list(zip(cuts, [*cuts[1:], len(pts_P)], strict=True))):
        run = np.arange(first, stop)
        leading = run[pts_P[run] < pts_P[first]] if starts_P[first] == Start.OPEN.value else run[:0]
        yield np.setdiff1d(run, leading), tail
        tail = np.concatenate([[first], leading]) if len(leading) else np.arange(0)
