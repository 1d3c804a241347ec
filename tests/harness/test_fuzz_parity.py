"""`vidi parity --goldens DIR` on folders of others: by seed, in a child under limits, through the command itself."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from stageparity.manifest import content_sha256, parse, render, weights_sha256
from tests.harness import test_strict_hdf5
from tests.limited import ROOT, run_cases, watched
from vidi import cli

GOLDENS = ROOT / "goldens"
CASES = {"oneframe": 0.7, "decode": 0.1, "train": 0.1, "novideo": 0.1}  # and how often each is taken
STAGES = {"oneframe": "logits,text.*", "decode": "*.tokens,*.nocache.logits", "train": "loss.*", "novideo": "logits"}
ESCAPE = "\x1b]0;owned\x07\x9b2J\u202e[red]"
VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 3, 2**31 - 1, 2**40, 2**62, -(2**62), 0.5, -0.0, 1e308, 1e-308, "", "x", ESCAPE, "../x", "/dev/zero",
    "float64", "int8", "object", "whole", "rows", "sketch", [], [[]], [1 << 60, 3], [-1], [0], ["a"], {}, {"": {}}, {"a": 1},
    "x" * 5000, [0] * 5000,
)  # fmt: skip


def case(seed: int, folder: Path) -> str:
    """One hostile folder, and what the command made of it: its status, and how the refusal begins."""
    rng, inside, outside = random.Random(seed), folder / "inside", folder / "outside"
    name = rng.choices(list(CASES), list(CASES.values()))[0]
    at = _folder(inside, name)
    kind = rng.choice(list(HARM))
    with contextlib.suppress(LookupError):  # two lies of which one took the place of the other
        HARM[kind](rng, at, name, outside)
    with watched(outside):
        status, out, err = _parity(inside, "--stage", STAGES[name], *(["--chained"] if rng.random() < 0.7 else []))
    assert status in (0, 1, 2, 3), (kind, status, err)
    assert "Traceback" not in out + err, (kind, err)
    assert "unexpected" not in err, (kind, err)
    assert not re.search("memory|allocate", err), (kind, err)
    assert all(line.isprintable() for line in (out + err).split("\n")), (kind, ascii(out + err))
    if status == 2:
        assert (out, err.count("\n")) == ("", 1), (kind, out, err)
        assert len(err) < 1600, (kind, err)
    return f"{kind}: {status}"


def _parity(folder: Path, *more: str) -> tuple[int, str, str]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = cli.main(["parity", "--goldens", str(folder), *more])
    return status, out.getvalue(), err.getvalue()


def _folder(inside: Path, name: str) -> Path:
    """A golden folder with one case of the embedded ones, their tolerances and what was measured of it."""
    at = inside / "small"
    at.mkdir(parents=True, exist_ok=True)
    for file in (f"{name}.json", f"{name}.h5", parse(GOLDENS / "small" / f"{name}.json")["weights"]["file"]):
        shutil.copyfile(GOLDENS / "small" / file, at / file)
    (inside / "measured").mkdir()
    shutil.copyfile(GOLDENS / "tolerances.toml", inside / "tolerances.toml")
    for file in ("baselines", "noise", "faults"):
        shutil.copyfile(GOLDENS / "measured" / f"{file}.json", inside / "measured" / f"{file}.json")
    return at


def _bless(at: Path, name: str, body: dict[str, Any]) -> None:
    """The manifest with its own hash and the data file's right, as somebody writes it who lies on purpose."""
    raw = (at / f"{name}.h5").read_bytes()
    if isinstance(body.get("container"), dict):
        body["container"] = {**body["container"], "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (at / f"{name}.json").write_bytes(render(body))


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    return [path] * bool(path) + [p for key, item in inner for p in _places(item, (*path, key))]


def _lie(rng: random.Random, document: Any) -> None:
    """Change, drop or add one field; fields near the top as often as those of the many tensors below."""
    places = _places(document)
    depth = rng.choice(sorted({len(place) for place in places}))
    *path, last = rng.choice([place for place in places if len(place) == depth])
    owner = document
    for key in path:
        owner = owner[key]
    what = rng.random()
    if what < 0.1:
        del owner[last]
    elif what < 0.2 and isinstance(owner, dict):
        owner[rng.choice([ESCAPE, "", "a/b", "logits", "x" * 300, "loss_thresholds", "generate"])] = owner[last]
    else:
        owner[last] = rng.choice(VALUES)


# ---- what is done to a folder -------------------------------------------------------------------------------------------


def _manifest(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    body = parse(at / f"{name}.json")
    for _ in range(rng.choice((1, 1, 1, 2))):
        _lie(rng, body)
    container = body.get("container")
    if rng.random() < 0.9 and isinstance(container, dict):
        _bless(at, name, body)
    else:
        (at / f"{name}.json").write_bytes(render(body))


def _values(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """An input or a golden of other values, shape or dtype, with every hash right."""
    body = parse(at / f"{name}.json")
    group = rng.choice(["inputs", "inputs", *body["targets"]])
    table = body["inputs"] if group == "inputs" else body["targets"][group]
    stage = rng.choice(sorted(table))
    with h5py.File(at / f"{name}.h5", "r+", libver="v110") as file:
        place = f"{group}/{stage}"
        array = file[place][()]
        changed = _other(rng, np.asarray(array))
        del file[place]
        file.create_dataset(place, data=changed)
    table[stage] |= {"dtype": changed.dtype.name, "shape": list(changed.shape), "sha256": content_sha256(changed)}
    _bless(at, name, body)


def _other(rng: random.Random, x: np.ndarray) -> np.ndarray:
    kind = rng.randrange(7)
    if kind == 0:
        return np.ascontiguousarray(np.concatenate([x.reshape(-1)] * 3))
    if kind == 1:
        return x.reshape(-1)[:0]
    if kind == 2:
        return np.ascontiguousarray(x[None])
    if kind == 3:
        return x.astype(rng.choice(["float64", "int8", "uint8", "bool", "float16", "int64"]))
    if kind == 4 and x.dtype.kind in "iu":
        top = np.iinfo(x.dtype)
        return np.full_like(x, rng.choice([top.max, top.min, top.max // 2, 10**9 % (int(top.max) + 1), 0]))
    if kind == 5 and x.size:
        return np.ascontiguousarray(x.repeat(3, axis=-1)) if x.ndim else x.reshape(1)
    if x.dtype.kind == "f":
        return np.full_like(x, rng.choice([0, np.nan, np.inf, np.finfo(x.dtype).max, np.finfo(x.dtype).tiny]))
    return ~x if x.dtype.kind == "b" else np.zeros_like(x)


def _container(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """One dataset becomes what the format allows and a golden file may not hold."""
    body = parse(at / f"{name}.json")
    make = rng.choice([m for m in test_strict_hdf5.BAD if m.__name__ not in ("_bomb", "_tiny_chunks", "_giant_chunk")])
    stage = rng.choice(sorted(body["inputs"]))
    with h5py.File(at / f"{name}.h5", "r+", libver="v110") as file:
        make(file, outside)
        if rng.random() < 0.8:
            del file[f"inputs/{stage}"]
            file.move("inputs/bad", f"inputs/{stage}")
    body["inputs"][stage] |= {"dtype": "int64", "shape": rng.choice([[4, 6], [10**13], [10**7, 10**6]])}
    _bless(at, name, body)


def _bytes(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """Damage of any file; a data file's own hash is set right after it."""
    path = rng.choice([p for p in at.parent.rglob("*") if p.is_file()])
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 8)):
        at_byte = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(min(len(data), 3000))
        data[at_byte] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
    if path.suffix == ".h5":
        _bless(at, name, parse(at / f"{name}.json"))


def _links(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """A file, or a folder, is a link out, a pipe, a device, a folder, a loop, or huge and sparse."""
    files = [p for p in at.parent.rglob("*") if p.name != f"{name}.json" or rng.random() < 0.3]
    path = rng.choice(files)
    elsewhere = outside / path.name
    kind = rng.choice(("out", "out", "pipe", "device", "folder", "loop", "sparse"))
    if kind == "out":
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        return
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to(rng.choice(("/dev/zero", "/dev/tty", "/dev/random")))
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    else:
        path.touch()
        os.truncate(path, 1 << rng.choice((33, 36)))


def _weights(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """Other weights with the right hash, or a name for them that leaves the folder."""
    body = parse(at / f"{name}.json")
    file = body["weights"]["file"]
    if rng.random() < 0.3:
        (at / file).rename(outside / "w")
        body["weights"]["file"] = rng.choice(
            ["../../outside/w", str(outside / "w"), "", ".", "a\x00b", ESCAPE, "x/../w"]
        )
    else:
        tensors = load_file(at / file)
        stage = rng.choice(sorted(tensors))
        changed = _other(rng, tensors.pop(stage))
        tensors[rng.choice([stage, stage, stage, ESCAPE, "lm_head.weight"])] = changed
        (at / file).write_bytes(save(tensors))
        body["weights"]["sha256"] = weights_sha256(tensors)
    _bless(at, name, body)


def _measured(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """Budgets and references of other types and values."""
    path = at.parent / "measured" / f"{rng.choice(('baselines', 'noise', 'faults'))}.json"
    body = json.loads(path.read_text("utf-8"))
    _lie(rng, body)
    path.write_text(json.dumps(body), "utf-8")


def _tolerances(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    path = at.parent / "tolerances.toml"
    lines = path.read_text("utf-8").splitlines()
    numbers = [n for n, line in enumerate(lines) if "=" in line or line.startswith("[")]
    n = rng.choice(numbers)
    key = lines[n].split("=")[0].strip()
    values = [
        "0",
        "-1",
        "true",
        '"x"',
        "[]",
        "{}",
        "1e308",
        "inf",
        "nan",
        "2020-01-01",
        "1" * 5000,
        "[[1]]",
        '"@"',
        '",,"',
    ]
    lines[n] = rng.choice([f"{key} = {rng.choice(values)}", "[" * 3000, "", f"[{key}", 'gate = "x"', "[[gate]]"])
    path.write_text("\n".join(lines), "utf-8")


def _names(rng: random.Random, at: Path, name: str, outside: Path) -> None:
    """Names that a terminal would obey: of the set, the case, a stage."""
    body = parse(at / f"{name}.json")
    new = rng.choice([f"x{ESCAPE}", "a;touch b", "$(x)", "'", "-x", "é" * 60])
    if rng.random() < 0.5:
        body["case"] = new
        for suffix in ("json", "h5"):
            (at / f"{name}.{suffix}").rename(at / f"{new}.{suffix}")
        _bless(at, new, body)
    else:
        at.rename(at.parent / new)


HARM: dict[str, Callable[[random.Random, Path, str, Path], None]] = {
    "manifest": _manifest, "values": _values, "container": _container, "bytes": _bytes, "links": _links, "weights": _weights,
    "measured": _measured, "tolerances": _tolerances, "names": _names,
}  # fmt: skip


# ---- tests --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_thousand_hostile_golden_folders(tmp_path: Path) -> None:
    outcomes = run_cases("tests.harness.test_fuzz_parity", 1000, tmp_path, first=1000)
    refused = {kind for kind in HARM if outcomes[f"{kind}: 2"]}
    # Any name is a name: it is shown as text (`test_report`), not refused.
    assert refused == set(HARM) - {"names"}, outcomes
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith(": 2")) > 333, outcomes


@pytest.mark.parametrize("file", ["small/oneframe.json", "small/oneframe.h5", "small/weights.safetensors",
                                  "tolerances.toml", "measured/baselines.json", "measured/noise.json"])  # fmt: skip
@pytest.mark.parametrize("kind", ["out", "pipe", "device"])
def test_every_file_of_a_golden_folder_is_opened_strictly(
    kind: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    _folder(inside, "oneframe")
    (inside / file).rename(outside / "moved")
    if kind == "out":
        (inside / file).symlink_to(outside / "moved")
    elif kind == "pipe":
        os.mkfifo(inside / file)
    else:
        (inside / file).symlink_to("/dev/zero")
    with watched(outside):
        assert cli.main(["parity", "--goldens", str(inside), "--stage", "logits", "--chained"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert Path(file).name in err
    assert re.search(r"link to a place outside|is a pipe", err), err


@pytest.mark.parametrize("name", ["small", "measured"])
def test_no_folder_of_a_golden_folder_is_a_link_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    outside.mkdir()
    _folder(inside, "oneframe")
    (inside / name).rename(outside / name)
    (inside / name).symlink_to(outside / name)
    with watched(outside / name):
        assert cli.main(["parity", "--goldens", str(inside), "--stage", "logits", "--chained"]) == 2
    assert "outside" in capsys.readouterr().err


def test_a_configuration_larger_than_its_weights_is_refused_before_a_model_is_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = _folder(tmp_path, "oneframe")
    for field, value in (("hidden_size", 1 << 24), ("num_hidden_layers", 900), ("vocab_size", 1 << 30)):
        body = parse(GOLDENS / "small" / "oneframe.json")
        body["config"][field] = value
        _bless(at, "oneframe", body)
        assert cli.main(["parity", "--goldens", str(tmp_path)]) == 2
        assert "the weights do not fit the configuration" in capsys.readouterr().err
