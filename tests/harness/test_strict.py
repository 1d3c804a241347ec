"""The opener of foreign files, and its JSON and TOML: what it refuses, in what words, and broken files by seed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from stageparity import strict
from tests.limited import ROOT, one_line, run_cases, watched

# ---- opening ----------------------------------------------------------------------------------------------------------


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    import socket

    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name has 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _giant(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(8 << 30)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_pipe, "is a pipe, no regular file"),
        (_socket, "is a socket, no regular file"),
        (Path.mkdir, "is a folder, no regular file"),
        (_giant, "8,589,934,592 bytes; at most 1,000 are read"),
        (lambda path: path.symlink_to("/dev/zero"), "a link to a place outside the folder"),
        (lambda path: path.symlink_to("../outside/secret.json"), "a link to a place outside the folder"),
        (lambda path: path.symlink_to(path.name), "cannot be opened"),
        (lambda path: path.symlink_to("nothing"), "no such file"),
        (lambda path: None, "no such file"),
    ],
)
def test_what_is_no_file_of_the_folder(make: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    (tmp_path / "inside").mkdir()
    path = tmp_path / "inside" / "a.json"
    make(path)
    with watched(tmp_path / "outside"), pytest.raises(strict.Refused, match=said) as refused:
        strict.read_json(path, limit=1000)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.json", "a/../../b.json", "a\x00b", "..", "", "a\\b"])
def test_a_name_that_leaves_the_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(strict.Refused, match="a path that leaves the folder"):
        strict.locate(tmp_path, name)


def test_links_that_are_followed(tmp_path: Path) -> None:
    """Inside the folder; and the hub's cache, only where it is asked for."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_text('{"a": 1}')
    (snapshot / "a.json").symlink_to("../../blobs/0123")
    (snapshot / "b.json").symlink_to("a.json")
    assert strict.read_json(snapshot / "a.json", hub_cache=True) == {"a": 1}
    assert strict.read_json(snapshot / "b.json", hub_cache=True) == {"a": 1}
    with pytest.raises(strict.Refused, match="outside the folder"):
        strict.read_json(snapshot / "a.json")
    (snapshot / "real").write_text('{"b": 2}')
    (snapshot / "c.json").symlink_to("real")
    assert strict.read_json(snapshot / "c.json") == {"b": 2}


def test_text_of_others_is_shown_without_its_controls() -> None:
    assert strict.printable("a\x1b]0;owned\x07b") == "a\\x1b]0;owned\\x07b"
    assert strict.printable("two\nlines\r", keep="\n") == "two\nlines\\r"
    assert strict.printable("\udcff\u202eabc\x9b2J") == "\\udcff\\u202eabc\\x9b2J"
    assert strict.printable("Zürich 東京") == "Zürich 東京"


def test_it_needs_the_standard_library_alone() -> None:
    code = "import sys, stageparity.strict, stageparity.atomic; print({'numpy', 'h5py', 'torch', 'vidi'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


# ---- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"b": [0, 1%s]}}' % ("0" * 400), r"a\.b\[1\]: 10{39}… is no number"),
        ('{"a": 9223372036854775808}', "a: 9223372036854775808 is no number"),
        ('{"a": 1e400}', "a: 1e400 is no number"),
        ('{"a": -1e400}', "a: -1e400 is no number"),
        ('{"a": [NaN]}', r"a\[0\]: NaN is no number"),
        ('{"a": -Infinity}', "a: -Infinity is no number"),
        ('{"a": 1.%s}' % ("0" * 500), "a: 1.0+… is no number"),
        ('{"a": 1, "b": 2, "a": 3}', "a: appears twice"),
        ("[" * 65 + "]" * 65, "nested deeper than 64"),
        ("[" * 100_000, "nested too deeply"),
        ("[1, 2", "damaged JSON"),
        ('{"a": "\x01"}', "damaged JSON"),
        ("[" + "0," * 1_000_000 + "0]", "more than 1,000,000 values"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_json_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(strict.Refused, match=said):
        strict.parse_json(text.encode())


def test_json_that_is_read() -> None:
    text = json.dumps({"a": [2**63 - 1, -(2**63) + 1, 1e308, -0.0, "1e400", None, True], "b": {"a": {}}})
    assert strict.parse_json(text.encode()) == json.loads(text)
    assert strict.parse_json(b"[" * 64 + b"]" * 64)
    with pytest.raises(strict.Refused, match="damaged JSON"):
        strict.parse_json(b'{"a": "\xff"}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[a]\nb = 1" + "0" * 30, "a.b: 10+ is no number"),
        ("a = 1" + "0" * 5000, "damaged TOML"),
        ("a = [1.0, inf]", r"a\[1\]: inf is no number"),
        ("a = nan", "a: nan is no number"),
        ("a = 1\na = 2", "damaged TOML"),
        ("a = " + "[" * 900, "damaged TOML|nested"),
        ("a = " + "[" * 9000, "nested"),
        (".".join("a" * 3000) + " = 1", "nested deeper than 64"),
        (".".join("a" * 9000) + " = 1", "a line of more than 10,000 bytes"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_toml_that_is_refused(text: str, said: str) -> None:
    with pytest.raises(strict.Refused, match=said):
        strict.parse_toml(text.encode())


# ---- by seed ----------------------------------------------------------------------------------------------------------

WHOLE = json.dumps(
    {
        "format": 3,
        "case": "base",
        "config": {"hidden_size": 40, "eps": 1e-6, "names": ["a", "é", ""], "none": None, "yes": True},
        "inputs": {f"inputs.{i}": {"shape": [i, 3, 4], "dtype": "float32", "sha256": "0f" * 32} for i in range(20)},
    }
)
TOML = 'title = "x"\n[a."b.c"]\nd = [1, 2.5, true]\ne = 1979-05-27\n[[list]]\nf = {g = "h"}\n'
ODD = ("1" + "0" * 400, "1e400", "NaN", "[" * 70 + "]" * 70, "{" * 2000, '"\\ud800"', '"\x00"', "[]" * 3, "-", "1e-400")


def case(seed: int, folder: Path) -> str:
    """One broken file: read as Python's own readers do, or refused in one printable line."""
    rng = random.Random(seed)
    path, is_json = folder / "inside" / "file", rng.random() < 0.6
    (folder / "outside" / "secret").write_text(WHOLE)
    raw = bytearray((WHOLE if is_json else TOML).encode())
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(raw) or 1)
        kind = rng.randrange(6)
        if kind == 0 and raw:
            raw[at % len(raw)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del raw[at:]
        elif kind == 2:
            raw[at:at] = rng.choice(ODD).encode("utf-8", "surrogatepass")
        elif kind == 3:
            raw[at : at + rng.randrange(30)] = rng.randbytes(rng.randrange(30))
        elif kind == 4:
            raw += raw[at:]
        else:
            raw[at:at] = rng.choice((b"[", b"{", b'"a":', b",", b"a.")) * rng.choice((1, 100, 10_000, 3_000_000))
    special = rng.randrange(12)
    if special == 0:
        path.symlink_to(rng.choice(("../outside/secret", "/dev/zero", "/dev/tty", "file", "nothing", "..")))
    elif special == 1:
        os.mkfifo(path)
    elif special == 2:
        path.write_bytes(raw)
        os.truncate(path, rng.choice((0, 1 << 20, 1 << 40)))
    else:
        path.write_bytes(raw)
    try:
        with watched(folder / "outside"):
            found: Any = strict.read_json(path) if is_json else strict.read_toml(path)
    except strict.Refused as error:
        one_line(error, path)
        return "refused"
    assert found == (json.loads(path.read_bytes()) if is_json else tomllib.loads(path.read_text("utf-8")))
    return "read"


@pytest.mark.parametrize("number", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_broken_files(number: int, tmp_path: Path) -> None:
    outcomes = run_cases("tests.harness.test_strict", number, tmp_path)
    assert outcomes["refused"] > number // 2
    assert outcomes["read"] > number // 10


def test_the_watch_sees_an_opening(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(AssertionError, match="was opened"), watched(tmp_path):
        (tmp_path / "secret").read_text()


@pytest.mark.parametrize(
    ("seed", "said"), [(0, "MemoryError"), (1, "Timeout"), (2, "-6"), (3, "AssertionError: wrong"), (4, "was opened")]
)
def test_the_limits_hold(seed: int, said: str, tmp_path: Path) -> None:
    """A case that takes too much, hangs, ends the process or fails is named."""
    with pytest.raises(AssertionError, match=f"(?s)seed {seed} ended the child.*{said}"):
        run_cases("tests.harness.greedy", 1, tmp_path, first=seed, seconds=1)
