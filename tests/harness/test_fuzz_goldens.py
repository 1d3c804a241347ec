"""1,000 damaged golden sets: only GoldenError, no hang, bounded memory."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import pytest

from stageparity import store
from stageparity.golden import GoldenError
from stageparity.manifest import parse, render
from tests.harness.golden_set import make_set, rebless

FILES = ("tiny.json", "tiny.h5", "weights.safetensors")


def _damage(raw: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, cut, repeat, overwrite, insert or empty."""
    data, kind = bytearray(raw), int(rng.integers(6))
    at = int(rng.integers(len(data)))
    if kind == 0:
        for place in rng.integers(len(data), size=int(rng.integers(1, 9))):
            data[place] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data = data[:at]
    elif kind == 2:
        data += data[at:]
    elif kind == 3:
        data[at : at + 8] = rng.bytes(min(8, len(data) - at))
    elif kind == 4:
        data[at:at] = rng.bytes(int(rng.integers(1, 64)))
    else:
        data = bytearray(rng.bytes(int(rng.integers(0, 200))))
    return bytes(data)


@pytest.mark.slow
def test_thousand_damaged_sets(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "set")
    whole = {name: (folder / name).read_bytes() for name in FILES}
    rng, start = np.random.default_rng(20261124), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = harmless = unhelpful = 0
    for _ in range(1000):
        name = FILES[int(rng.integers(3))]
        damaged = _damage(whole[name], rng)
        (folder / name).write_bytes(damaged)
        try:
            store.verify(folder)
        except GoldenError as error:
            refused += 1
            unhelpful += "restore it" not in str(error) and "update the package" not in str(error)
        else:
            # Nothing was lost: only bytes that carry no content can pass (spaces of a safetensors header).
            assert damaged == whole[name] or name == "weights.safetensors"
            harmless += 1
        (folder / name).write_bytes(whole[name])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert refused >= 980, f"{harmless} damaged sets passed"
    assert unhelpful == 0, "every refusal says what to do"
    assert grown < 200_000, f"memory grew by {grown} KiB"
    assert time.monotonic() - start < 60
    assert store.verify(folder)


LIES = (
    {"shape": [1 << 60, 3, 4]},
    {"dtype": "object"},
    {"form": "rows"},
    {"form": "nothing"},
    {"sha256": 5},
    {"shape": "abc"},
)


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_signed_manifest_that_lies(tmp_path: Path, lie: dict) -> None:
    folder = make_set(tmp_path / "set")
    targets = parse(folder / "tiny.json")["targets"]["none"]
    rebless(folder, targets={"none": targets | {"text.embeds": targets["text.embeds"] | lie}})
    with pytest.raises(GoldenError, match="tiny"):
        store.verify(folder)


@pytest.mark.parametrize("missing", ["targets", "inputs", "weights", "container", "case", "config"])
def test_a_signed_manifest_that_lacks_a_part(tmp_path: Path, missing: str) -> None:
    folder = make_set(tmp_path / "set")
    body = parse(folder / "tiny.json")
    (folder / "tiny.json").write_bytes(render({key: value for key, value in body.items() if key != missing}))
    with pytest.raises(GoldenError, match=f"manifest lacks {missing} or has it malformed"):
        store.verify(folder)
