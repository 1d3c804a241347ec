"""What a compressed packet says of itself without being decoded: can decoding start here, does anyone need it.

Only what a codec's specification guarantees is used, so that decoding from such a place, or without such a packet,
gives every other frame bit for bit. A codec without a rule here, or a packet that does not fit one, raises Odd: the
file is then decoded from start to end, as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

__all__ = ["Look", "Odd", "Start", "looker"]


class Odd(Exception):
    """Something that the rules for parallel reading do not cover; the text ends the sentence "read in sequence: "."""


class Start(Enum):
    """CLOSED: no later packet needs anything before this one. OPEN: that holds for later frames in time alone."""

    NO = 0
    OPEN = 1
    CLOSED = 2


@dataclass(frozen=True)
class Look:
    """disposable: no other frame needs this one. shown: it yields a frame."""

    start: Start
    disposable: bool = False
    shown: bool = True


Looker = Callable[[bytes, bool], Look]

_FOLLOWS = Look(Start.NO)
_ALONE = Look(Start.CLOSED, disposable=True)


def looker(codec: str, extradata: bytes | None, pixel_format: str | None) -> Looker:
    """A function for the packets of one stream, in order: (data, flagged as a key frame) -> Look.

    ``codec``: FFmpeg's name. Raises Odd for a codec without a rule.
    """
    extradata = extradata or b""
    if codec == "h264":
        return _H264(extradata, pixel_format or "")
    if codec == "hevc":
        return _Hevc(extradata)
    if codec in ("mjpeg", "prores"):
        return _Mjpeg() if codec == "mjpeg" else lambda data, key: _ALONE
    rules = {"vp8": _vp8, "vp9": _vp9, "av1": _av1, "libdav1d": _av1}
    if codec not in rules:
        raise Odd(f"no rule for the codec {codec}")
    return rules[codec]


# ---- H.264 and HEVC: NAL units --------------------------------------------------------------------------------------


def _units(data: bytes, length_size: int) -> Iterator[bytes]:
    """NAL units: behind a length each, or (``length_size`` 0) between the start codes of Annex B."""
    at = 0
    if length_size:
        while at < len(data):
            end = at + length_size + int.from_bytes(data[at : at + length_size], "big")
            unit = data[at + length_size : end]
            if end > len(data) or not unit:
                raise Odd("a packet's parts do not add up to its size (damage)")
            yield unit
            at = end
        return
    at = data.find(b"\0\0\1")
    if at < 0:
        raise Odd("a packet without a start code")
    while at >= 0:
        following = data.find(b"\0\0\1", at + 3)
        if unit := data[at + 3 : following if following >= 0 else None].rstrip(b"\0"):
            yield unit
        at = following


class _ParameterSets:
    """Parameter sets in the packets themselves: decoding may start only where all that were ever sent are sent anew."""

    def __init__(self) -> None:
        self._sent: set[bytes] = set()

    def complete(self, here: set[bytes]) -> bool:
        complete = self._sent <= here
        self._sent |= here
        return complete


class _H264:
    def __init__(self, extradata: bytes, pixel_format: str) -> None:
        self._length_size = (extradata[4] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 4 else 0
        self._sets, self._pixel_format, self._first = _ParameterSets(), pixel_format, True

    def __call__(self, data: bytes, key: bool) -> Look:
        if self._first:
            self._first = False
            self._refuse_old_encoder(data)
        sets, slices = set(), []
        for unit in _units(data, self._length_size):
            kind = unit[0] & 31
            if 1 <= kind <= 5:
                slices.append(unit[0])
            elif kind in (7, 8, 13, 15):
                sets.add(unit)
        if not slices or any(head & 31 in (2, 3, 4) for head in slices):
            raise Odd("an H.264 packet without a whole picture")
        complete = self._sets.complete(sets)
        # An IDR picture empties the decoder; a key frame that is none (open GOP, recovery point) may not.
        if complete and all(head & 31 == 5 for head in slices):
            return Look(Start.CLOSED)
        return Look(Start.NO, disposable=not sets and all(head >> 5 & 3 == 0 for head in slices))

    def _refuse_old_encoder(self, data: bytes) -> None:
        """FFmpeg mends bugs of early x264 by its number, which stands in the first packet alone."""
        found = re.search(rb"x264 - core (\d+)", data)
        if found and int(found[1]) < (151 if "444" in self._pixel_format else 34):
            raise Odd(f"x264 of build {int(found[1])}, whose streams FFmpeg decodes by rules of their own")


class _Hevc:
    def __init__(self, extradata: bytes) -> None:
        self._length_size = (extradata[21] & 3) + 1 if extradata[:1] == b"\1" and len(extradata) > 21 else 0
        self._sets = _ParameterSets()

    def __call__(self, data: bytes, key: bool) -> Look:
        sets, slices = set(), []
        for unit in _units(data, self._length_size):
            kind = unit[0] >> 1 & 63
            layer = (unit[0] & 1) << 5 | unit[1] >> 3 if len(unit) > 1 else 0
            if kind < 32 and layer == 0:
                slices.append((kind, unit[1] & 7 if len(unit) > 1 else 1))
            elif kind in (32, 33, 34):
                sets.add(unit)
        if not slices:
            raise Odd("an HEVC packet without a picture")
        complete = self._sets.complete(sets)
        kinds = {kind for kind, _ in slices}
        if complete and kinds <= {19, 20}:  # IDR
            return Look(Start.CLOSED)
        if complete and kinds <= {21}:  # CRA: frames shown before it may need what came before
            return Look(Start.OPEN)
        # Sub-layer non-reference pictures (even types below 16) are needed by higher sub-layers at most: in a stream
        # that has such layers nothing is taken for disposable.
        if any(layer > 1 for _, layer in slices):
            raise Odd("HEVC with temporal layers")
        return Look(Start.NO, disposable=not sets and all(kind < 16 and kind % 2 == 0 for kind in kinds))


# ---- the others -----------------------------------------------------------------------------------------------------


def _vp8(data: bytes, key: bool) -> Look:
    shown = bool(data[0] >> 4 & 1)
    return Look(Start.CLOSED if not data[0] & 1 else Start.NO, shown=shown)


def _vp9(data: bytes, key: bool) -> Look:
    head = data[0]
    if head >> 6 != 2 or head >> 4 & 3 == 3:
        raise Odd("VP9 of profile 3" if head >> 6 == 2 else "a VP9 packet without its mark (damage)")
    existing, inter, shown = head >> 3 & 1, head >> 2 & 1, head >> 1 & 1
    if data[-1] >> 5 == 6:  # several frames in one packet, the last of them shown
        return _FOLLOWS if existing or inter or not shown else Look(Start.CLOSED)
    return Look(Start.CLOSED if not (existing or inter) and shown else Start.NO, shown=bool(existing or shown))


def _av1(data: bytes, key: bool) -> Look:
    """A key frame that is shown, behind a sequence header: both in the first units of the packet."""
    at, sequence = 0, False
    while at < len(data):
        kind, extended, sized = data[at] >> 3 & 15, data[at] >> 2 & 1, data[at] >> 1 & 1
        at += 1 + extended
        size = shift = 0
        while sized and at < len(data):
            size |= (data[at] & 127) << shift
            shift, at = shift + 7, at + 1
            if not data[at - 1] & 128:
                break
        if kind == 1:
            sequence = True
        if kind in (3, 6):  # frame header, frame: show_existing_frame 0, frame_type key 00, show_frame 1
            return Look(Start.CLOSED) if sequence and at < len(data) and data[at] >> 4 == 1 else _FOLLOWS
        if not sized:
            break
        at += size
    return _FOLLOWS


class _Mjpeg:
    """Each picture by itself, if it brings its own tables; Huffman tables are left out where they are the usual ones."""

    def __init__(self) -> None:
        self._huffman: bool | None = None

    def __call__(self, data: bytes, key: bool) -> Look:
        head = data[: data.find(b"\xff\xda")]
        huffman = b"\xff\xc4" in head
        self._huffman = huffman if self._huffman is None else self._huffman
        if b"\xff\xdb" not in head or huffman != self._huffman:
            raise Odd("JPEG pictures that share tables")
        return _ALONE
