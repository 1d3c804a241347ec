"""HDF5 files of others: whole arrays of plain numbers are read, everything else refused, by seed."""

from __future__ import annotations

import functools
import os
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from stageparity import strict_hdf5
from stageparity.strict import Missing, Refused
from stageparity.strict_hdf5 import H5File, open_h5
from tests.limited import one_line, run_cases, watched

ARRAYS = {
    "inputs/ids": np.arange(24, dtype=np.int64).reshape(4, 6),
    "inputs/mask": np.array([True, False, True]),
    "recorded/logits": np.linspace(-1, 1, 3000, dtype=np.float32).reshape(3, 1000),
    "recorded/scalar": np.float64(2.5),
    "recorded/half": np.ones((2, 2), np.float16),
    "recorded/none": np.zeros((0, 4), np.uint8),
}


def write(path: Path, *also: Callable[[h5py.File, Path], None]) -> None:
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        for place, value in ARRAYS.items():
            array = np.asarray(value)
            filters: dict[str, Any] = {}
            if array.ndim and array.size:
                filters = {"chunks": array.shape, "fletcher32": True, "shuffle": True, "compression": "gzip"}
            file.create_dataset(place, data=array, track_times=False, **filters)
        for change in also:
            change(file, path.parent.parent / "outside")


def read(path: Path, place: str) -> np.ndarray:
    array = np.asarray(ARRAYS.get(place, np.zeros((4, 6), np.int64)))
    with open_h5(path) as file:
        return file.read(place, dtype=array.dtype.name, shape=array.shape)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write(tmp_path / "a.h5")
    with open_h5(tmp_path / "a.h5") as file:
        assert file.places() == set(ARRAYS)
        for place, value in ARRAYS.items():
            array = np.asarray(value)
            found = file.read(place, dtype=array.dtype.name, shape=array.shape)
            assert found.dtype == array.dtype
            assert np.array_equal(found, array)
        with pytest.raises(Missing, match="inputs/other: is not in the file"):
            file.read("inputs/other", dtype="int64", shape=(1,))
        with pytest.raises(Missing, match="is no dataset"):
            file.read("inputs", dtype="int64", shape=(1,))
        with pytest.raises(Refused, match=r"inputs/ids: is int64 \[4, 6\], not int32 \[4, 6\]"):
            file.read("inputs/ids", dtype="int32", shape=(4, 6))
        with pytest.raises(Refused, match="takes 192 bytes; at most 100 are read"):
            file.read("inputs/ids", dtype="int64", shape=(4, 6), max_bytes=100)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    path.write_bytes(b"not HDF5 at all")
    with pytest.raises(Refused, match="is no HDF5 file"), open_h5(path):
        pass
    with h5py.File(path, "w", libver="earliest") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(Refused, match="of the old format"), open_h5(path):
        pass
    write(path)
    with pytest.raises(Refused, match="at most 100 are read"), open_h5(path, limit=100):
        pass


# ---- what a file may not hold -----------------------------------------------------------------------------------------


def _low(file: h5py.File, kind: Any, shape: tuple[int, ...], setup: Callable[[Any], None], grow: bool = False) -> Any:
    """A dataset ``inputs/bad`` with creation properties that h5py's own arguments do not offer."""
    made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    setup(made)
    space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED,) * len(shape) if grow else shape)
    return h5py.h5d.create(file.id, b"inputs/bad", kind, space, made)


def _external(file: h5py.File, outside: Path) -> None:
    os.mkfifo(outside / "raw")
    _low(file, h5py.h5t.NATIVE_INT64, (4, 6), lambda p: p.set_external(os.fsencode(outside / "raw"), 0, 192))


def _virtual(file: h5py.File, outside: Path) -> None:
    os.mkfifo(outside / "source.h5")
    layout = h5py.VirtualLayout((4, 6), "int64")
    layout[:] = h5py.VirtualSource(str(outside / "source.h5"), "x", shape=(4, 6))
    file.create_virtual_dataset("inputs/bad", layout)


def _virtual_unlimited(file: h5py.File, outside: Path) -> None:
    """The extent of such a dataset is asked of its source as soon as it is opened."""
    os.mkfifo(outside / "source.h5")
    layout = h5py.VirtualLayout((4, 6), "int64", maxshape=(None, 6))
    source = h5py.VirtualSource(str(outside / "source.h5"), "x", shape=(4, 6), maxshape=(None, 6))
    layout[: h5py.h5s.UNLIMITED, :] = source[: h5py.h5s.UNLIMITED, :]
    file.create_virtual_dataset("inputs/bad", layout)


def _external_link(file: h5py.File, outside: Path) -> None:
    os.mkfifo(outside / "other.h5")
    file["inputs/bad"] = h5py.ExternalLink(str(outside / "other.h5"), "x")


def _soft_link(file: h5py.File, outside: Path) -> None:
    file["inputs/bad"] = h5py.SoftLink("/inputs/ids")


def _dangling(file: h5py.File, outside: Path) -> None:
    file["inputs/bad"] = h5py.SoftLink("/inputs/bad")


def _group_link(file: h5py.File, outside: Path) -> None:
    file["inputs/bad"] = file["/"]


def _unallocated(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", shape=(10**13,), dtype="int64")


def _unallocated_chunks(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", shape=(10**7, 10**6), dtype="int64", chunks=(1000, 1000))


def _half_written(file: h5py.File, outside: Path) -> None:
    data = file.create_dataset("inputs/bad", shape=(4, 6), dtype="int64", chunks=(2, 6))
    data[0] = 1


def _giant_chunk(file: h5py.File, outside: Path) -> None:
    data = file.create_dataset("inputs/bad", shape=(20 << 20,), dtype="int64", chunks=(20 << 20,), compression="gzip")
    data[:3] = 1


def _tiny_chunks(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros(1001, np.int8), chunks=(1,))


def _growing(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), np.int64), maxshape=(None, 6))


def _empty(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=h5py.Empty("int64"))


def _strings(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=["a" * 100] * 24, dtype=h5py.string_dtype())


def _compound(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), [("a", "i4"), ("b", "f4")]))


def _enumeration(file: h5py.File, outside: Path) -> None:
    kind = h5py.enum_dtype({"FALSE": 0, "TRUE": 2}, basetype="i1")
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), np.int8), dtype=kind)


def _references(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=[file.ref] * 3, dtype=h5py.ref_dtype)


def _region_references(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=[file["inputs/ids"].regionref[:2]], dtype=h5py.regionref_dtype)


def _lists(file: h5py.File, outside: Path) -> None:
    """24 lists of a length of their own each."""
    file.create_dataset("inputs/bad", shape=(24,), dtype=h5py.vlen_dtype(np.int64))[0] = np.arange(1000)


def _opaque(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), "V8"))


def _big_endian(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), ">i8"))


def _lossy(file: h5py.File, outside: Path) -> None:
    file.create_dataset("inputs/bad", data=np.zeros((4, 6), np.int64), chunks=(4, 6), scaleoffset=3)


def _secret(file: h5py.File, outside: Path) -> None:
    """External storage whose content is there and fits: it would be read as the golden."""
    (outside / "secret").write_bytes(bytes(192))
    _low(file, h5py.h5t.STD_I64LE, (4, 6), lambda p: p.set_external(os.fsencode(outside / "secret"), 0, 192))


def _odd_float(file: h5py.File, outside: Path) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(19, 12, 7, 0, 12)
    kind.set_precision(20)
    _low(file, kind, (4, 6), lambda p: None).write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros((4, 6), np.float32))


def _filter(file: h5py.File, outside: Path) -> None:
    def setup(made: Any) -> None:
        made.set_chunk((4, 6))
        made.set_filter(305, h5py.h5z.FLAG_OPTIONAL, ())  # a plug-in that is loaded by its number

    _low(file, h5py.h5t.NATIVE_INT64, (4, 6), setup).write(h5py.h5s.ALL, h5py.h5s.ALL, np.zeros((4, 6), np.int64))


def _bomb(file: h5py.File, outside: Path) -> None:
    data = file.create_dataset(
        "inputs/bad", shape=(16 << 20,), dtype="int64", chunks=(8 << 20,), compression="gzip", compression_opts=9
    )
    data[:] = 0


@functools.cache
def _zeros() -> bytes:
    """64 MiB of them, packed into 290 KB."""
    return zlib.compress(bytes(64 << 20), 1)


def _chunk(file: h5py.File, shape: tuple[int, ...], packed: bytes, *filters: int) -> None:
    """One chunk that holds what it is given, whatever the dataset says."""

    def setup(made: Any) -> None:
        made.set_chunk(shape)
        for number in filters:
            made.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (9,) if number == strict_hdf5.DEFLATE else ())

    _low(file, h5py.h5t.NATIVE_INT64, shape, setup).write_direct_chunk((0,) * len(shape), packed)


def _bomb_in_a_chunk(file: h5py.File, outside: Path) -> None:
    _chunk(file, (64, 1024), _zeros(), strict_hdf5.DEFLATE)


def _overfull_chunk(file: h5py.File, outside: Path) -> None:
    _chunk(file, (4, 6), zlib.compress(bytes(1 << 20)), strict_hdf5.DEFLATE)


def _packed_twice(file: h5py.File, outside: Path) -> None:
    _chunk(file, (4, 6), zlib.compress(zlib.compress(bytes(192))), strict_hdf5.DEFLATE, strict_hdf5.DEFLATE)


def _much_of_lzf(file: h5py.File, outside: Path) -> None:
    _chunk(file, (512, 1024), bytes(4 << 20), strict_hdf5.LZF)


def _named_type(file: h5py.File, outside: Path) -> None:
    file["inputs/bad"] = np.dtype("int64")


BAD: dict[Callable[[h5py.File, Path], None], str] = {
    _external: "keeps its data in another file",
    _virtual: "is put together from other files",
    _virtual_unlimited: "is put together from other files",
    _external_link: "is a link into another file",
    _soft_link: "is a link by name",
    _dangling: "is a link by name",
    _group_link: "is no dataset",
    _unallocated: "claims 80,000,000,000,000 bytes, of which 0 were written",
    _unallocated_chunks: r"lies in 10,000,000 chunks; at most 1,000",
    _half_written: "holds 1 of its 2 chunks",
    _giant_chunk: "has chunks of 167,772,160 bytes",
    _tiny_chunks: "lies in 1,001 chunks; at most 1,000",
    _growing: "can grow",
    _empty: "holds no data|not int64",
    _strings: "holds (vlen|numbers of another kind)",
    _compound: "holds compound",
    _enumeration: "holds enum",
    _references: "holds reference",
    _region_references: "holds reference",
    _lists: "holds vlen",
    _opaque: "holds opaque",
    _big_endian: "holds numbers of another kind",
    _lossy: r"is stored through filters \[6\]",
    _secret: "keeps its data in another file",
    _odd_float: "holds numbers of another kind",
    _filter: r"is stored through filters \[305\]",
    _bomb: "claims 134,217,728 bytes out of",
    _bomb_in_a_chunk: "unpacks to more than the 524,288 bytes of its chunk",
    _overfull_chunk: r"keeps 1,\d\d\d bytes in a chunk of 192",
    _packed_twice: "is packed twice",
    _much_of_lzf: "packed by lzf; pack it by gzip",
    _named_type: "is no dataset",
}


def _claims(path: Path) -> tuple[str, tuple[int, ...]]:
    """What a manifest that lies along would say of ``inputs/bad``."""
    try:
        with h5py.File(path, "r") as file:
            link = file.get("inputs/bad", getlink=True)
            data = file.get("inputs/bad") if isinstance(link, h5py.HardLink) else None
            if isinstance(data, h5py.Dataset) and not data.is_virtual and data.shape is not None:
                return data.dtype.name, data.shape
    except (OSError, TypeError):
        pass
    return "int64", (4, 6)


@pytest.mark.parametrize("make", BAD, ids=lambda make: make.__name__.strip("_"))
def test_refused_before_it_is_read(
    make: Callable[[h5py.File, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_hdf5, "MAX_CHUNKS", 1000)  # a file of 100,001 chunks takes seconds to write
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "a.h5"
    write(path, make)
    dtype, shape = _claims(path)
    with watched(tmp_path / "outside"), open_h5(path) as file:
        with pytest.raises(Refused, match=BAD[make]) as refused:
            file.read("inputs/bad", dtype=dtype, shape=shape, max_bytes=1 << 62)
        assert str(refused.value).startswith(f"{path}: inputs/bad: ")
        assert np.array_equal(file.read("inputs/ids", dtype="int64", shape=(4, 6)), ARRAYS["inputs/ids"])


def test_a_few_groups_under_many_names(tmp_path: Path) -> None:
    """Hard links make six groups a tree of 299,592 places; walking it would take a minute."""

    def linked(file: h5py.File, outside: Path) -> None:
        for level in range(6):
            group = file.create_group(f"level{level}")
            for n in range(8):
                group[f"link{n}"] = file[f"level{level - 1}" if level else "inputs"]

    path = tmp_path / "set" / "a.h5"
    path.parent.mkdir()
    write(path, linked)
    with open_h5(path) as file, pytest.raises(Refused, match="more than 10,000 groups and datasets"):
        file.places()


@pytest.mark.parametrize("make", [_external_link, _soft_link, _group_link, _named_type])
def test_a_walk_stays_in_the_file(make: Callable[[h5py.File, Path], None], tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "inside").mkdir()
    write(tmp_path / "inside" / "a.h5", make)
    with (
        watched(tmp_path / "outside"),
        open_h5(tmp_path / "inside" / "a.h5") as file,
        pytest.raises(Refused, match=r"refused|neither|nested deeper|more than"),
    ):
        file.places()


# ---- by seed ----------------------------------------------------------------------------------------------------------


def case(seed: int, folder: Path) -> str:
    """A file with bits flipped, cut, or made with up to three things that it may not hold, then read whole."""
    rng = random.Random(seed)
    path, makes = folder / "inside" / "a.h5", [make for make in BAD if make not in (_bomb, _giant_chunk, _tiny_chunks)]
    write(path, *([rng.choice(makes)] if rng.random() < 0.5 else []))
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice((0, 1, 1, 3))):
        at = rng.randrange(len(raw))
        kind = rng.randrange(5)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[max(at, 1) :]
        elif kind == 2:
            raw[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), rng.randbytes(8), (1 << 40).to_bytes(8, "little")))
        elif kind == 3:
            raw[at:at] = rng.randbytes(rng.randint(1, 64))
        else:
            other = rng.randrange(len(raw))
            raw[at : at + 64] = raw[other : other + 64]
    path.write_bytes(raw)
    outcomes = set()
    with watched(folder / "outside"):
        try:
            with open_h5(path) as file:
                for place in (*ARRAYS, "inputs/bad"):
                    outcomes.add(_try(file, place))
                file.places()
        except Refused as error:
            one_line(error, path)
            outcomes.add("refused")
    return "wrong" if "wrong" in outcomes else "refused" if "refused" in outcomes else "read"


def _try(file: H5File, place: str) -> str:
    array = np.asarray(ARRAYS.get(place, np.zeros((4, 6), np.int64)))
    try:
        found = file.read(place, dtype=array.dtype.name, shape=array.shape)
    except Missing:
        return "missing"
    except Refused as error:
        one_line(error, place)
        return "refused"
    # Arrays in chunks carry checksums; what has none may read back changed, which a manifest's hash tells.
    sums = array.ndim and array.size and place in ARRAYS
    return "wrong" if sums and not np.array_equal(found, array) else "read"


@pytest.mark.parametrize("number", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_broken_files(number: int, tmp_path: Path) -> None:
    outcomes = run_cases("tests.harness.test_strict_hdf5", number, tmp_path)
    assert outcomes["wrong"] == 0
    assert outcomes["refused"] > number // 2
    assert outcomes["read"] > number // 20
