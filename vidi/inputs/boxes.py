"""Does an mp4 or mov file promise more samples than it can hold? FFmpeg makes room for all of them when it opens it.

An entry of its index takes some 36 bytes; a box that states 40 million samples takes 20. An edit, 12 bytes, can show all
samples of its track once more, and then each has an entry, and is decoded, as often as that. Only the counts are read here.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["promises_too_much"]

#: Of all fragments and tables of other than constant size: 92 hours at 60 a second, 0.7 GB of index.
MAX_SAMPLES = 20_000_000
MAX_BOXES = 1_000_000
#: FFmpeg decodes the first pictures of each when it opens a file: some 160 MB a track at the largest size.
MAX_PICTURE_TRACKS = 4
#: Boxes that FFmpeg looks into for others, wherever they stand.
_HOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex", b"edts", b"udta", b"dinf", b"tref"}
_HOLDERS |= {b"clip", b"ilst", b"meta", b"sinf", b"schi", b"wave", b"gmhd", b"tapt"}


def promises_too_much(file: BinaryIO, size: int) -> str | None:
    """What is wrong with the boxes of ``file`` (``size`` bytes, read from its start), or None."""
    # Of the tracks so far; of the track that is read: its samples or, of sound, its chunks, and how often edits show them.
    before, samples, edits, handler, pictures = 0, 0, 1, b"", 0
    for number, (kind, at) in enumerate(_boxes(file, size)):
        if number == MAX_BOXES:
            return f"more than {MAX_BOXES:,} boxes"
        if kind == b"cmov":
            return "a compressed header, which no program has written for twenty years"
        if kind == b"trak":
            before, samples, edits, handler = before + samples * edits, 0, 1, b""
        elif kind == b"hdlr" and (found := _read(file, at, 12)[8:]) in (b"vide", b"soun"):
            handler = found  # another one may follow, of how mov finds its data
            pictures += found == b"vide"
            if pictures > MAX_PICTURE_TRACKS:
                return f"more than {MAX_PICTURE_TRACKS} tracks of pictures"
        elif kind == b"elst":
            edits = max(edits, int.from_bytes(_read(file, at + 4, 4), "big"))
        elif kind in (b"stco", b"co64") and handler == b"soun":
            samples = max(samples, int.from_bytes(_read(file, at + 4, 4), "big"))
        elif kind in (b"stsz", b"trun"):
            _, first, count = struct.unpack(">III", _read(file, at, 12).ljust(12, b"\0"))
            constant = kind == b"stsz" and first
            if kind == b"trun":
                count = first
            if constant and first * count > size:
                return f"{count:,} samples of {first:,} bytes each in a file of {size:,}"
            # Sound of constant size is indexed by chunks.
            samples += 0 if constant and handler == b"soun" else count
        if (shown := before + samples * edits) > min(size, MAX_SAMPLES):
            often = f", shown by {edits:,} edits," if edits > 1 else ""
            return f"{shown if edits == 1 else samples:,} samples or more{often} in a file of {size:,} bytes"
    return None


def _boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int]]:
    """Type and first byte of the content of every box, holders before what they hold."""
    at, ends = 0, [size]
    while True:
        while at + 8 > ends[-1]:
            at = ends.pop()
            if not ends:
                return
        length, kind = struct.unpack(">I4s", _read(file, at, 8).ljust(8, b"\0"))
        content = at + 8
        if length == 1:
            length, content = int.from_bytes(_read(file, content, 8), "big"), content + 8
        end = min(at + length if length else ends[-1], ends[-1])
        yield kind, content
        if kind in _HOLDERS and len(ends) < 32:
            # `meta` has a version in front in mp4, and none in mov.
            at = content + (4 if kind == b"meta" and _read(file, content + 4, 4) != b"hdlr" else 0)
            ends.append(end)
        else:
            at = max(end, content)


def _read(file: BinaryIO, at: int, count: int) -> bytes:
    if file.tell() != at:
        file.seek(at, io.SEEK_SET)
    return file.read(count)
