"""`tools/` and `vidi faults` on files of others: by seed, in a child under limits, each as somebody would call it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stageparity import evidence, ledger, strict
from tests.harness.test_fuzz_parity import CASES, GOLDENS, HARM, VALUES, _folder
from tests.limited import run_cases, watched
from tools import compare_benchmarks, import_official, migrate_goldens, regen_goldens, study
from vidi import cli

STORED = ("alarms", "mutants", "noise", "baselines", "faults")
TOOLS: dict[str, Callable[[str], int]] = {
    "faults": lambda folder: cli.main(["faults", "--goldens", folder, "--fault", "masks.*", "--model", "9b"]),
    "check": lambda folder: study.main(["--check", "--goldens", folder]),
    "regen --check": lambda folder: regen_goldens.main(["--check", "--goldens", folder]),
    "regen": lambda folder: regen_goldens.main(["--goldens", folder, "--stage", "logits"]),
    "migrate": lambda folder: migrate_goldens.main([f"{folder}/small"]),
    **{name: lambda folder, name=name: study.main([name, "--stored", "--goldens", folder]) for name in STORED},
    **{f"{name} --json": lambda folder, name=name: study.main([name, "--stored", "--json", "--goldens", folder])
       for name in STORED},
}  # fmt: skip
FORMS = (
    b"[]",
    b"{}",
    b"1",
    b"",
    b"entry = 1",
    b"[[entry]]\nsubject = 1",
    b'{"measured_on":1}',
    b'{"measured_on":{"code":1}}',
)


def case(seed: int, folder: Path) -> str:
    """One hostile folder, one tool, and its status."""
    rng, inside, outside = random.Random(seed), folder / "inside", folder / "outside"
    name = rng.choices(list(CASES), list(CASES.values()))[0]
    at = _folder(inside, name)
    for file in ("measured/alarms.json", "measured/mutants.json", "ledger.toml"):
        shutil.copyfile(GOLDENS / file, inside / file)
    with contextlib.suppress(LookupError):  # two lies of which one took the place of the other
        HARM[rng.choice(list(HARM))](rng, at, name, outside)
    if rng.random() < 0.4:
        _spoil(rng, inside / rng.choice(["ledger.toml", *(f"measured/{name}.json" for name in STORED)]))
    linked = (inside / "small").is_symlink()  # what a tool is given by name may be a link
    tool = rng.choice([tool for tool in TOOLS if tool != "migrate" or not linked])
    with watched(outside):
        said(TOOLS[tool], str(inside))
    return tool


def said(run: Callable[[str], int], given: str) -> tuple[int, str]:
    """Status and stderr. Fails for what no tool may do, whatever it is given."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = run(given)
    text, told = out.getvalue(), err.getvalue()
    assert status in (0, 1, 2), told
    assert "Traceback" not in told
    assert not re.search("unexpected|memory|allocate", told), told
    assert all(line.isprintable() for line in (text + told).split("\n")), ascii(text + told)
    assert status != 2 or told.count("\n") == 1, told
    return status, told


def _spoil(rng: random.Random, path: Path) -> None:
    """Cut, damage or exchange a file; or change one field of a result."""
    if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 24:
        return
    data, kind = path.read_bytes(), rng.randrange(4)
    if kind == 0:
        data = data[: rng.randrange(len(data) + 1)]
    elif kind == 1:
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.choice((b"\xff\x1b", b"\x1b[2J", b"\0")) + data[place + 3 :]
    elif kind == 2 or path.suffix == ".toml":
        data = rng.choice(FORMS)
    else:
        with contextlib.suppress(ValueError):
            body = json.loads(data)
            body[rng.choice(sorted(body))] = rng.choice(VALUES)
            data = json.dumps(body).encode()
    path.write_bytes(data)


@pytest.mark.parametrize("number", [5, pytest.param(300, marks=[pytest.mark.slow, pytest.mark.timeout(1500)])])
def test_hostile_files_of_a_golden_folder(number: int, tmp_path: Path) -> None:
    assert len(run_cases("tests.harness.test_fuzz_tools", number, tmp_path)) > len(TOOLS) // 4


BENCHMARKS = {
    "no json": b"{",
    "a list": b"[]",
    "no benchmarks": b"{}",
    "of another form": b'{"benchmarks": [1]}',
    "of no form": b'{"benchmarks": 1}',
    "without figures": b'{"benchmarks": [{"name": "a", "extra_info": 1}]}',
    "no number": b'{"benchmarks": [{"name": "a\\u001b[2J", "extra_info": {"to_floor": "1"}}]}',
    "no text": b"\xff",
    "a giant": b'{"benchmarks": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("kind", [*BENCHMARKS, "pipe", "device", "sparse"])
def test_benchmarks_of_others(kind: str, tmp_path: Path) -> None:
    _make(tmp_path / "a.json", BENCHMARKS.get(kind), kind)
    assert said(lambda given: compare_benchmarks.main([given, given]), str(tmp_path / "a.json"))[0] == 2


def test_names_in_benchmarks_reach_no_terminal(tmp_path: Path) -> None:
    info = {"to_floor": 1.0, "device": "x\x1b[2J"}
    entries = [{"name": "b\x9b2J\u202e", "extra_info": info}]
    (tmp_path / "a.json").write_text(json.dumps({"benchmarks": entries}), "utf-8")
    assert said(lambda given: compare_benchmarks.main([given, given]), str(tmp_path / "a.json")) == (0, "")


@pytest.mark.parametrize("kind", ["pipe", "device", "sparse", "no file"])
def test_a_candidate_of_others(kind: str, tmp_path: Path) -> None:
    _make(tmp_path / "new.safetensors", b"x", kind)
    assert said(
        lambda given: regen_goldens.main(["--case", "oneframe", "--candidate", given]), str(tmp_path / "new.safetensors")
    )[0] == 2  # fmt: skip


@pytest.mark.parametrize("kind", ["no json", "a list", "no benchmarks", "pipe", "device", "sparse"])
@pytest.mark.parametrize("file", ["a.f32.json", "a.f32.safetensors", "weights.safetensors"])
def test_recordings_of_others(file: str, kind: str, tmp_path: Path) -> None:
    source = tmp_path / "recordings"
    source.mkdir()
    for name in ("a.f32.json", "a.f32.safetensors", "weights.safetensors"):
        (source / name).write_bytes(b'{"tensors": {}}' if name.endswith("json") else (2).to_bytes(8, "little") + b"{}")
    (source / file).unlink()
    _make(source / file, BENCHMARKS.get(kind), kind)
    assert said(lambda given: import_official.main([given, str(tmp_path / "out")]), str(source))[0] == 2
    assert not (tmp_path / "out").exists()


def _make(path: Path, data: bytes | None, kind: str) -> None:
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(data or b"")
    if kind == "sparse":
        os.truncate(path, 1 << 36)


def test_a_document_of_another_form_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}", "utf-8")
    document = evidence.read(tmp_path / "a.json")
    assert document == {}
    refused = pytest.raises(strict.Refused, match=r"a.json: is not of the form that is read here \(KeyError: 'rows'\)")
    with refused, strict.shaped(tmp_path / "a.json"):
        document["rows"]


@pytest.mark.parametrize("text", ["entry = 1", "[[entry]]\nsubject = 1", "[entry]\nsubject = 'a'"])
def test_a_ledger_of_another_form_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.toml").write_text(text, "utf-8")
    with pytest.raises(strict.Refused, match=r"ledger.toml: entry: tables of texts are needed"):
        ledger.entries(tmp_path)
