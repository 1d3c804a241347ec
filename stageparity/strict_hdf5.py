"""Reading HDF5 files that someone else wrote: whole arrays of plain numbers, stored in the file itself.

The format can name other files (external links, external storage, virtual datasets), claim far more data than it holds
(unallocated datasets, giant chunks) and carry types that run code paths of their own. A file here may hold groups of
datasets of fixed shape, of booleans, integers and floats, whole and allocated, compressed by nothing but gzip, lzf, shuffle and
checksums. Everything else is `Refused` before its data are touched. No path is handed to the HDF5 library, only an
open file, so it cannot open another one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from stageparity import strict
from stageparity.strict import Refused

__all__ = ["H5File", "open_h5"]

MAX_FILE_BYTES, MAX_ARRAY_BYTES = 8 << 30, 4 << 30
MAX_PLACES, MAX_DEPTH, MAX_CHUNKS, MAX_CHUNK_BYTES = 10_000, 8, 100_000, 64 << 20
# Compressed data may promise more memory than they take on disk: beyond this many bytes, no more than so many times.
FREE_BYTES, MAX_RATIO = 64 << 20, 100
# Little-endian, as every writer of ours stores them: an array then has the dtype that it names.
DTYPES = {
    **{f"int{8 * n}": getattr(h5py.h5t, f"STD_I{8 * n}LE") for n in (1, 2, 4, 8)},
    **{f"uint{8 * n}": getattr(h5py.h5t, f"STD_U{8 * n}LE") for n in (1, 2, 4, 8)},
    **{f"float{8 * n}": getattr(h5py.h5t, f"IEEE_F{8 * n}LE") for n in (2, 4, 8)},
    "bool": h5py.h5t.py_create(np.dtype(bool)),
}
DEFLATE, LZF = h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_LZF
FILTERS = {DEFLATE, LZF, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}
# The library unpacks a chunk to whatever it holds, not to what it should hold. So many bytes come out of one at most; a chunk
# that could give more than MAX_UNPACKED is unpacked here first, no further than its size.
UNPACKED, MAX_UNPACKED = {DEFLATE: 1032, LZF: 88}, 256 << 20
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What h5py raises for damaged files shares no base class; MemoryError too is an answer to what a file claims.
_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    AttributeError,
    IndexError,
)


@contextmanager
def open_h5(path: str | Path, *, limit: int = MAX_FILE_BYTES, inside: str | Path | None = None) -> Iterator[H5File]:
    """Open a file of at most ``limit`` bytes for reading, found as by `strict.open_file`. Raises Refused, also for what h5py
    finds wrong inside."""
    path = Path(path)
    with strict.open_file(path, limit=limit, inside=inside) as raw:
        start = raw.read(9)
        if start[:8] != _SIGNATURE:
            raise Refused("is no HDF5 file", file=path)
        if len(start) < 9 or start[8] not in (2, 3):
            text = "an HDF5 file of the old format, without checksums; write it with h5py.File(..., libver='v110')"
            raise Refused(text, file=path)
        raw.seek(0)
        try:
            file = h5py.File(raw, "r")
        except _ERRORS as error:
            raise Refused(f"damaged HDF5 ({strict.reason(error)})", file=path) from None
        try:
            yield H5File(path, file)
        finally:
            file.close()


class H5File:
    """An open file; `places` names its datasets, `read` gives one."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path, self._file = path, file
        self._groups: dict[str, h5py.Group] = {}  # by path, once looked at

    def places(self) -> set[str]:
        """``group/name`` of every dataset. Raises Refused for links to elsewhere and for what is neither group nor dataset."""
        found: set[str] = set()
        try:
            self._walk(self._file, "", 1, found)
        except Refused:
            raise
        except _ERRORS as error:
            raise Refused(f"damaged HDF5 ({strict.reason(error)})", file=self.path) from None
        return found

    def read(self, place: str, *, dtype: str, shape: Sequence[int], max_bytes: int = MAX_ARRAY_BYTES) -> np.ndarray:
        """The array at ``place``, which must be of this dtype and shape and take at most ``max_bytes``.

        Raises Missing where nothing is, Refused for everything that is not such an array, whole and in this file.
        """
        try:
            data = self._dataset(place)
            self._check(place, data, dtype, tuple(shape), max_bytes)
            return np.asarray(data[()])
        except Refused:
            raise
        except _ERRORS as error:
            raise Refused(f"cannot be read ({strict.reason(error)})", file=self.path, field=place) from None

    def read_any(self, place: str) -> np.ndarray:
        """The array at ``place``, of whatever dtype and shape it says. Raises as `read`."""
        try:
            data = self._dataset(place)
            kind, shape = data.id.get_type(), data.shape or ()
        except Refused:
            raise
        except _ERRORS as error:
            raise Refused(f"cannot be read ({strict.reason(error)})", file=self.path, field=place) from None
        return self.read(
            place, dtype=next((name for name, known in DTYPES.items() if kind.equal(known)), ""), shape=shape
        )

    def _walk(self, group: h5py.Group, prefix: str, depth: int, found: set[str]) -> None:
        for name in group:
            place = f"{prefix}{name}"
            item = self._hard(group, name, place)
            if isinstance(item, h5py.Dataset):
                found.add(place)
            elif not isinstance(item, h5py.Group):
                raise Refused("is neither a group nor a dataset", file=self.path, field=place)
            elif depth == MAX_DEPTH:
                raise Refused(f"groups nested deeper than {MAX_DEPTH}", file=self.path, field=place)
            else:
                self._seen += 1
                self._walk(item, f"{place}/", depth + 1, found)
            if len(found) + self._seen > MAX_PLACES:
                raise Refused(f"more than {MAX_PLACES:,} groups and datasets", file=self.path)

    _seen = 0

    def _hard(self, group: h5py.Group, name: str, place: str) -> Any:
        """What a name in a group stands for; links by name are refused unopened."""
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise Refused("is a link into another file; refused", file=self.path, field=place)
        if not isinstance(link, h5py.HardLink):
            raise Refused("is a link by name; refused", file=self.path, field=place)
        return group[name]

    def _dataset(self, place: str) -> h5py.Dataset:
        item: Any = self._file
        at = ""
        for name in place.split("/"):
            at = f"{at}/{name}"
            if at not in self._groups:
                if not name or not isinstance(item, h5py.Group) or name not in item:
                    raise strict.Missing("is not in the file", file=self.path, field=place)
                item = self._hard(item, name, place)
                if isinstance(item, h5py.Group):
                    self._groups[at] = item
            item = self._groups.get(at, item)
        if not isinstance(item, h5py.Dataset):
            raise strict.Missing("is no dataset of the file", file=self.path, field=place)
        return item

    def _check(self, place: str, data: h5py.Dataset, dtype: str, shape: tuple[int, ...], max_bytes: int) -> None:
        def refuse(problem: str) -> None:
            raise Refused(problem, file=self.path, field=place)

        made = data.id.get_create_plist()
        layout = made.get_layout()
        if made.get_external_count():
            refuse("keeps its data in another file; refused")
        if layout == h5py.h5d.VIRTUAL:
            refuse("is put together from other files; refused")
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT, h5py.h5d.CHUNKED):
            refuse("is stored in an unknown layout")
        kind = data.id.get_type()
        found = next((name for name, known in DTYPES.items() if kind.equal(known)), None)
        if found is None:
            refuse(f"holds {_class_name(kind)}; read are {', '.join(DTYPES)}")
        if data.id.get_space().get_simple_extent_type() == h5py.h5s.NULL or data.shape is None:
            refuse("holds no data")
        if found != dtype or data.shape != shape:
            refuse(f"is {found} {list(data.shape)}, not {dtype} {list(shape)}")
        if data.maxshape != data.shape:
            refuse("can grow; a stored array has a fixed shape")
        nbytes = math.prod(shape) * kind.get_size()
        if nbytes > max_bytes:
            refuse(f"takes {nbytes:,} bytes; at most {max_bytes:,} are read")
        self._check_storage(data, made, nbytes, refuse)

    def _check_storage(self, data: h5py.Dataset, made: Any, nbytes: int, refuse: Any) -> None:
        filters = [made.get_filter(i)[0] for i in range(made.get_nfilters())]
        if unknown := sorted(set(filters) - FILTERS):
            refuse(f"is stored through filters {unknown}; known are gzip, lzf, shuffle and fletcher32")
        if len(set(filters)) < len(filters) or {*UNPACKED} <= set(filters):
            refuse(f"is packed twice, through filters {filters}; once is enough")
        stored = data.id.get_storage_size()
        if made.get_layout() == h5py.h5d.CHUNKED:
            chunk = made.get_chunk()
            chunk_bytes = math.prod(chunk) * data.dtype.itemsize
            if chunk_bytes > MAX_CHUNK_BYTES:
                refuse(f"has chunks of {chunk_bytes:,} bytes; at most {MAX_CHUNK_BYTES:,} are read")
            num_chunks = math.prod(-(-size // step) for size, step in zip(data.shape, chunk, strict=True))
            if num_chunks > MAX_CHUNKS:
                refuse(f"lies in {num_chunks:,} chunks; at most {MAX_CHUNKS:,} are read")
            if data.id.get_num_chunks() != num_chunks:
                refuse(f"holds {data.id.get_num_chunks():,} of its {num_chunks:,} chunks; the rest was never written")
            self._check_chunks(data, filters, chunk_bytes, refuse)
        elif stored < nbytes:
            refuse(f"claims {nbytes:,} bytes, of which {stored:,} were written")
        if nbytes > FREE_BYTES and nbytes > MAX_RATIO * stored:
            refuse(f"claims {nbytes:,} bytes out of {stored:,}; more than {MAX_RATIO} times is not read")

    def _check_chunks(self, data: h5py.Dataset, filters: list[int], chunk_bytes: int, refuse: Any) -> None:
        """Refuses a chunk that holds more than it should."""
        packed = next((one for one in filters if one in UNPACKED), None)
        found: list[Any] = []
        data.id.chunk_iter(found.append)
        for chunk in found:
            # What cannot be packed grows a little; each checksum takes four bytes.
            if chunk.size > chunk_bytes + chunk_bytes // 1000 + 64:
                refuse(f"keeps {chunk.size:,} bytes in a chunk of {chunk_bytes:,}")
            if packed is None or chunk.size * UNPACKED[packed] <= max(MAX_UNPACKED, chunk_bytes):
                continue
            if packed == LZF:
                refuse(f"has a chunk of {chunk.size:,} bytes packed by lzf; pack it by gzip")
            mask, raw = data.id.read_direct_chunk(chunk.chunk_offset)
            if not mask >> filters.index(packed) & 1 and len(_unzipped(raw, chunk_bytes + 5)) > chunk_bytes + 4:
                refuse(f"unpacks to more than the {chunk_bytes:,} bytes of its chunk")


def _unzipped(raw: bytes, limit: int) -> bytes:
    """The first ``limit`` bytes of what is packed. Raises ValueError where nothing is."""
    try:
        return zlib.decompressobj().decompress(raw, limit)
    except zlib.error as error:
        raise ValueError(str(error)) from None


def _class_name(kind: h5py.h5t.TypeID) -> str:
    names = {
        getattr(h5py.h5t, name): name.lower() for name in ("COMPOUND", "ENUM", "VLEN", "REFERENCE", "OPAQUE", "ARRAY")
    }
    return names.get(kind.get_class(), "numbers of another kind")
