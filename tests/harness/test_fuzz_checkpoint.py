"""1,000 broken or hostile checkpoint folders, by seed: a documented error or a sound model, never anything else.

Each folder is a sound one with one to three mutations. `inspect_folder` and `load` may raise CheckpointError alone; a
model that loads has finite weights throughout. A failure names its seed: `mutate(folder, seed)` makes it again.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vidi.checkpoint import synthetic
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.folder import INDEX_NAME
from vidi.checkpoint.headers import MAX_JSON_BYTES
from vidi.checkpoint.inspect import Inspection, inspect_folder
from vidi.checkpoint.load import load
from vidi.config import VidiConfig

NUM_FOLDERS = 1000
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2**31,
        2**63,
        10**30,
        1.5,
        1e308,
        "",
        "BF16",
        "../x.safetensors",
        "/etc/passwd",
        "\x00",
        "\x1b",
    ),
    *([], {}, [0], [-1, 4], [2**62, 2**63], [[]], {"a": 1}, "é" * 300, "model-00001-of-00005.safetensors"),
)


def _shard(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("model-*.safetensors")))


def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.iterdir()))


def _bytes(change: Callable[[bytearray, random.Random], None], pick: Callable = _any_file) -> Callable:
    def mutation(folder: Path, rng: random.Random) -> None:
        path = pick(folder, rng)
        if not stat.S_ISREG(path.lstat().st_mode):
            return  # a pipe or /dev/zero would hold the test itself
        raw = bytearray(path.read_bytes())
        change(raw, rng)
        path.unlink()  # the other folders share the file by hard link
        path.write_bytes(raw)

    return mutation


def _flip_header(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4)):
        raw[rng.randrange(min(len(raw), 3000))] ^= 1 << rng.randrange(8)


def _flip_data(raw: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 64)):
        raw[-1 - rng.randrange(len(raw) // 3)] ^= 1 << rng.randrange(8)


def _nan(raw: bytearray, rng: random.Random) -> None:
    at = len(raw) - 2 * rng.randint(1, 40)
    raw[at : at + 2] = rng.choice((b"\xc0\x7f", b"\x80\x7f", b"\x80\xff"))


def _truncate(raw: bytearray, rng: random.Random) -> None:
    del raw[rng.randrange(len(raw)) :]


def _splice(raw: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(raw))
    raw[at : at + rng.randrange(20)] = rng.randbytes(rng.randrange(20))


def _append(raw: bytearray, rng: random.Random) -> None:
    raw += rng.randbytes(rng.randint(1, 100))


def _length(raw: bytearray, rng: random.Random) -> None:
    old = int.from_bytes(raw[:8], "little")
    new = rng.choice((0, 1, 2, old - 1, old + 1, old + 8, len(raw) - 8, len(raw), 2**31, 2**63, 2**64 - 1))
    raw[:8] = new.to_bytes(8, "little")


def _pickle(raw: bytearray, rng: random.Random) -> None:
    raw[:] = rng.choice((b"\x80\x04", b"PK\x03\x04")) + rng.randbytes(200)


def _header(change: Callable[[dict[str, Any], random.Random], Any]) -> Callable:
    """A mutation of the parsed header; it may return text to write instead."""

    def edit(raw: bytearray, rng: random.Random) -> None:
        try:
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            text = change(header, rng)
        except (ValueError, AttributeError, TypeError, KeyError, IndexError, RecursionError):
            return  # an earlier mutation has left no header to change
        encoded = (text if isinstance(text, str) else json.dumps(header)).encode()
        raw[: 8 + length] = len(encoded).to_bytes(8, "little") + encoded

    return _bytes(edit, _shard)


def _odd_field(header: dict[str, Any], rng: random.Random) -> None:
    header[rng.choice(sorted(header))][rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(ODD)


def _odd_entry(header: dict[str, Any], rng: random.Random) -> None:
    header[rng.choice((*sorted(header), "", "\x00", "model.layers.999999.mlp.up_proj.weight", "é" * 999))] = rng.choice(
        ODD
    )


def _odd_number(header: dict[str, Any], rng: random.Random) -> None:
    field = header[rng.choice(sorted(header))][rng.choice(("shape", "data_offsets"))]
    field[rng.randrange(len(field))] = rng.choice((-1, 0, 1, 3, 2**40, 2**63, 1.0, "1"))


def _swap_offsets(header: dict[str, Any], rng: random.Random) -> None:
    a, b = rng.sample(sorted(set(header) - {"__metadata__"}), 2)
    header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]


def _rename(header: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(sorted(header))
    header[rng.choice((name[:-1], "module." + name, name.replace("0", "1"), "lm_head.weight"))] = header.pop(name)


def _dtype(header: dict[str, Any], rng: random.Random) -> None:
    header[rng.choice(sorted(header))]["dtype"] = rng.choice(("F16", "I16", "F32", "F8_E4M3", "bf16", "C64"))


def _twice(header: dict[str, Any], rng: random.Random) -> str:
    name = rng.choice(sorted(header))
    return json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"


def _json(name: str, change: Callable[[dict[str, Any], random.Random], None]) -> Callable:
    def mutation(folder: Path, rng: random.Random) -> None:
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                return
            value = json.loads(path.read_bytes())
            change(value, rng)
        except (OSError, ValueError, AttributeError, TypeError, KeyError, IndexError):
            return
        path.unlink()
        path.write_text(json.dumps(value))

    return mutation


def _index_entry(index: dict[str, Any], rng: random.Random) -> None:
    names = sorted(index["weight_map"])
    for _ in range(rng.randint(1, 3)):
        index["weight_map"][rng.choice((*names, "", "new"))] = rng.choice(ODD)


def _index_drop(index: dict[str, Any], rng: random.Random) -> None:
    for name in rng.sample(sorted(index["weight_map"]), 3):
        del index["weight_map"][name]


def _index_shape(index: dict[str, Any], rng: random.Random) -> None:
    index[rng.choice(("weight_map", "metadata"))] = rng.choice(ODD)


def _config_value(config: dict[str, Any], rng: random.Random) -> None:
    config[rng.choice(sorted(config))] = rng.choice(ODD)


def _config_tower(config: dict[str, Any], rng: random.Random) -> None:
    tower = config[rng.choice(("vision_config", "audio_config"))]
    tower[rng.choice(sorted(tower))] = rng.choice(ODD)


def _config_drop(config: dict[str, Any], rng: random.Random) -> None:
    del config[rng.choice(sorted(config))]


def _link_out(folder: Path, rng: random.Random) -> None:
    path = _any_file(folder, rng)
    path.unlink()
    path.symlink_to(rng.choice(("/etc/passwd", "../../../etc/passwd", "/dev/zero", path.name, "nothing", "..")))


def _remove(folder: Path, rng: random.Random) -> None:
    _any_file(folder, rng).unlink()


def _folder(folder: Path, rng: random.Random) -> None:
    path = _any_file(folder, rng)
    path.unlink()
    path.mkdir()


def _pipe(folder: Path, rng: random.Random) -> None:
    path = _any_file(folder, rng)
    path.unlink()
    os.mkfifo(path)


def _exchange(folder: Path, rng: random.Random) -> None:
    a, b = _shard(folder, rng), _shard(folder, rng)
    a.rename(folder / "spare")
    if a != b:
        b.rename(a)
    (folder / "spare").rename(b)


MUTATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(_bytes(change) for change in (_flip_header, _truncate, _splice, _append, _pickle)),
    *(_bytes(change, _shard) for change in (_flip_header, _flip_data, _nan, _nan, _length)),
    *(_header(change) for change in (_odd_field, _odd_entry, _odd_number, _swap_offsets, _rename, _dtype, _twice)),
    *(_json(INDEX_NAME, change) for change in (_index_entry, _index_drop, _index_shape)),
    *(_json("config.json", change) for change in (_config_value, _config_value, _config_tower, _config_drop)),
    *(_link_out, _remove, _folder, _pipe, _exchange),
)


def mutate(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            rng.choice(MUTATIONS)(folder, rng)
        except (OSError, IndexError, ValueError):
            continue  # an earlier mutation has taken the file away


@pytest.mark.slow
def test_a_thousand_broken_folders(tmp_path: Path) -> None:
    tiny = VidiConfig.tiny()
    config = replace(
        tiny,
        vision=replace(tiny.vision, hidden_size=8, num_layers=2, intermediate_size=8),
        audio=replace(tiny.audio, hidden_size=8, num_layers=1, intermediate_size=8),
        decoder=replace(tiny.decoder, hidden_size=8, num_layers=2, intermediate_size=8, vocab_size=64),
    )
    sound = tmp_path / "sound"
    synthetic.synth(sound, config)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    for seed in range(NUM_FOLDERS):
        folder = tmp_path / str(seed)
        shutil.copytree(sound, folder, copy_function=os.link)
        mutate(folder, seed)
        outcomes[_outcome(folder, seed)] += 1
        shutil.rmtree(folder)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{dict(outcomes)}, peak memory grew by {grown:.0f} MiB")
    assert load(sound) is not None  # no mutation reached the files that the folders share
    assert sum(outcomes.values()) == NUM_FOLDERS
    assert all(outcomes[kind] >= 30 for kind in ("unusable", "does not fit", "fits, not loaded", "loaded")), outcomes
    assert grown < 256


def _outcome(folder: Path, seed: int) -> str:
    try:
        report = inspect_folder(folder)
        report.render()
        json.loads(report.to_json())
    except CheckpointError as error:
        report, text = None, str(error)
        if not text.isprintable() or len(text) > 3000:
            pytest.fail(f"seed {seed}: {text[:3000]!a}")
    except Exception as error:
        pytest.fail(f"seed {seed}: inspect raised {type(error).__name__}: {error}")
    if report is not None and report.fits and _parameters(report) > 1_000_000:
        return "does not fit"  # no folder of this size holds more
    try:
        model = load(folder)
    except CheckpointError as error:
        if error.file is None:
            pytest.fail(f"seed {seed}: {error} names no file")
        return "unusable" if report is None else "fits, not loaded" if report.fits else "does not fit"
    except Exception as error:
        pytest.fail(f"seed {seed}: load raised {type(error).__name__}: {error}")
    assert report is not None, f"seed {seed}: loaded what inspect refuses"
    assert report.fits, f"seed {seed}: loaded what inspect calls unfit"
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()), f"seed {seed}: NaN loaded"
    return "loaded"


def _parameters(report: Inspection) -> int:
    return sum(part.parameters for part in report.parts)


# ---- bounded memory ---------------------------------------------------------------------------------------------------


def _full(piece: str, limit: int = MAX_JSON_BYTES) -> str:
    return piece * ((limit - 100) // len(piece.encode()))


BOMBS = {
    "empty-lists": '{"a": [' + _full("[],") + "[]]}",
    "numbers": '{"a": [' + _full("0,") + "0]}",
    "objects": '{"a": [' + _full('{"":0},') + "0]}",
    "depth": '{"a": ' + _full("["),
    "long-name": '{"' + _full("a") + '": 0}',
    "metadata": '{"__metadata__": {' + ",".join(f'"{i}": ""' for i in range(300_000)) + "}}",
    "tensors": "{"
    + ",".join(f'"{i}": {{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(60_000))
    + "}",
    "index": '{"weight_map": {' + ",".join(f'"{i}":"m.safetensors"' for i in range(99_000)) + "}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("place", ["shard", "index", "config"])
def test_memory_stays_bounded(bomb: str, place: str, tmp_path: Path) -> None:
    """JSON as large as is read at all, shaped to be large in memory: a fresh process of 400 MiB address space copes."""
    text = BOMBS[bomb].encode()
    assert len(text) <= MAX_JSON_BYTES
    (tmp_path / "config.json").write_text(json.dumps(VidiConfig.tiny().to_official()))
    if place == "shard":
        (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    else:
        (tmp_path / "m.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (tmp_path / (INDEX_NAME if place == "index" else "config.json")).write_bytes(text)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))\n"
        "from vidi.cli import main; sys.exit(main(['inspect', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode in (1, 2), done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert len(done.stdout) + len(done.stderr) < 20_000
