"""The header reader refuses every malformed file, naming file and tensor, and reads what safetensors writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.checkpoint.breaking import write_shard
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.headers import MAX_JSON_BYTES, read_json, read_shard, safe_file


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


MALFORMED: dict[str, tuple[dict[str, Any] | bytes, bytes, str]] = {
    "no-object": (b"[1, 2]", b"", "the header is no JSON object"),
    "bad-json": (b'{"a": ', b"", "damaged JSON"),
    "not-utf8": (b'{"\xff": 1}', b"", "damaged JSON"),
    "nan": (b'{"a": NaN}', b"", "tensor a: NaN is no number"),
    "nested": (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
    "huge-integer": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "tensor a: 9+… is no number"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
        bytes(8),
        "tensor a: appears twice",
    ),
    "key-twice-inside": (b'{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', bytes(8), "twice"),
    "no-offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "tensor a: a header entry has exactly"),
    "not-a-map": ({"a": 3}, bytes(8), "tensor a: a header entry has exactly"),
    "unknown-dtype": ({"a": entry(dtype="F33")}, bytes(8), "tensor a: unknown dtype 'F33'"),
    "dtype-no-string": ({"a": entry(dtype=["F32"])}, bytes(8), "tensor a: unknown dtype"),
    "dtype-lie": ({"a": entry(dtype="BF16")}, bytes(8), r"BF16 \[2\] takes 4 bytes, data_offsets give 8"),
    "negative-shape": ({"a": entry(shape=(-2,))}, bytes(8), r"shape \[-2\] is no list"),
    "float-shape": ({"a": entry(shape=(2.0,))}, bytes(8), "is no list"),
    "bool-shape": ({"a": entry(shape=(True, 2))}, bytes(8), "is no list"),
    "shape-no-list": ({"a": entry(shape="2")}, bytes(8), "is no list"),
    "many-axes": ({"a": entry(shape=(1,) * 9 + (2,))}, bytes(8), "at most 8"),
    "overflowing-shape": (
        {"a": entry(shape=(1 << 40, 1 << 40))},
        bytes(8),
        "takes 4,835,703,278,458,516,698,824,704 bytes",
    ),
    "negative-offset": ({"a": entry(-8, 0)}, bytes(8), "are no two byte positions"),
    "backwards": ({"a": entry(8, 0)}, bytes(8), "run backwards"),
    "beyond-file": ({"a": entry(0, 80, (20,))}, bytes(8), "tensor a: ends 72 bytes past the end of the file"),
    "overlap": ({"a": entry(), "b": entry(4, 12)}, bytes(12), "tensor b: overlaps a"),
    "same-bytes": ({"a": entry(), "b": entry()}, bytes(8), "tensor b: overlaps a"),
    "gap": ({"a": entry(), "b": entry(12, 20)}, bytes(20), "tensor b: leaves 4 unused bytes after a"),
    "leading-gap": ({"a": entry(4, 12)}, bytes(12), "leaves 4 unused bytes after the header"),
    "trailing": ({"a": entry()}, bytes(11), "3 bytes after the last tensor belong to none"),
    "metadata-no-map": ({"__metadata__": [1], "a": entry()}, bytes(8), "__metadata__ is no map of strings"),
    "metadata-number": ({"__metadata__": {"x": 1}, "a": entry()}, bytes(8), "__metadata__ is no map of strings"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers(case: str, tmp_path: Path) -> None:
    header, data, message = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    write_shard(path, header, data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_shard(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are no safetensors file"),
        (b"\x01\x02", "2 bytes are no safetensors file"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "header of 9,223,372,036,854,775,808 bytes in a file of 10"),
        ((100).to_bytes(8, "little") + b"{}", "header of 100 bytes in a file of 10"),
        (b"\x80\x02}q\x00X\x01\x00" * 4, "is a pickle under a safetensors name"),
        (b"PK\x03\x04" + bytes(range(60)), "is a pickle under a safetensors name"),
    ],
    ids=["empty", "short", "absurd", "beyond", "pickle", "zip"],
)
def test_no_header_at_all(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_shard(path)


def test_a_header_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_JSON_BYTES + 1).to_bytes(8, "little"))
    os.truncate(path, 1 << 33)
    with pytest.raises(CheckpointError, match="header of 4,194,305 bytes; at most 4,194,304 are read"):
        read_shard(path)


def test_a_length_byte_that_looks_like_a_pickle_is_fine(tmp_path: Path) -> None:
    """0x80 0x02 as a header length (640 bytes) starts a valid file."""
    text = json.dumps({"a": entry()}).encode()
    path = tmp_path / "model.safetensors"
    write_shard(path, text + b" " * (0x0280 - len(text)), bytes(8))
    assert read_shard(path).tensors["a"].shape == (2,)


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.arange(4, dtype=np.float16),
        "e": np.zeros((0, 3)),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    shard = read_shard(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert set(shard.tensors) == set(arrays)
    for name, array in arrays.items():
        stored = shard.tensors[name]
        assert stored.shape == array.shape
        assert raw[stored.start : stored.stop] == array.tobytes()


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A data section of 20 GB, sparse on disk, costs nothing."""
    numel = 10_000_000_000
    path = tmp_path / "big.safetensors"
    write_shard(path, {"a": entry(0, 2 * numel, (numel,), "BF16")}, b"")
    os.truncate(path, path.stat().st_size + 2 * numel)
    assert read_shard(path).tensors["a"].nbytes == 2 * numel


# ---- files beside the shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../outside.json", "/etc/hostname", "sub/../../outside.json", "..", "a\x00b", "c\\..\\d", ""]
)
def test_paths_that_leave(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside.json").write_text("{}")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(CheckpointError, match="leaves the folder"):
        safe_file(folder, name)


def test_links(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret").write_text("{}")
    (folder / "out.json").symlink_to(tmp_path / "secret")
    (folder / "loop.json").symlink_to(folder / "loop.json")
    (folder / "real.json").write_text("{}")
    (folder / "in.json").symlink_to("real.json")
    (folder / "dangling.json").symlink_to("nothing")
    os.mkfifo(folder / "pipe.json")
    with pytest.raises(CheckpointError, match="a link to a place outside the folder"):
        safe_file(folder, "out.json")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        safe_file(folder, "loop.json")
    with pytest.raises(CheckpointError, match="is a pipe, no regular file"):
        safe_file(folder, "pipe.json")
    assert safe_file(folder, "dangling.json") is None
    assert safe_file(folder, "in.json") == folder / "in.json"


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/REVISION/config.json -> ../../blobs/HASH, and nothing further up."""
    (tmp_path / "repo" / "blobs").mkdir(parents=True)
    snapshot = tmp_path / "repo" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "repo" / "blobs" / "hash").write_text("{}")
    (tmp_path / "secret").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "bad.json").symlink_to("../../../secret")
    assert safe_file(snapshot, "config.json") is not None
    with pytest.raises(CheckpointError, match="outside the folder"):
        safe_file(snapshot, "bad.json")


def test_json_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(b" ")
    os.truncate(path, 1 << 34)
    with pytest.raises(CheckpointError, match="17,179,869,184 bytes; at most 4,194,304 are read"):
        read_json(path)
