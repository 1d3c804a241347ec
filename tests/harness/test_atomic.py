"""Files and folders that appear whole or not at all, also under kill -9 at any moment."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from stageparity import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    atomic.write_text(path, "é")
    assert path.read_bytes() == "é".encode()
    path.chmod(0o640)
    (tmp_path / "link").symlink_to("a.json")
    atomic.write_bytes(tmp_path / "link", b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
    assert (tmp_path / "link").is_symlink()
    atomic.write_bytes("/dev/null", b"gone")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic.write_bytes(path, b"newer")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.json", "link"]


def test_a_pipe_that_nobody_reads_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="a pipe that nobody reads; start its reader first") as told:
        atomic.write_text(pipe, "x")
    assert told.value.filename == str(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    found: list[bytes] = []

    def read_slowly() -> None:
        time.sleep(0.2)
        with open(reader, "rb") as file:
            found.append(file.read())

    thread = threading.Thread(target=read_slowly, daemon=True)
    thread.start()
    data = bytes(1_000_000)  # more than a pipe holds
    atomic.write_bytes(pipe, data)
    thread.join(10)
    assert found == [data]


def test_what_is_open_already_is_written_into(tmp_path: Path) -> None:
    """A pipe behind /dev/stdout has no name of its own, and a file there must keep what was printed before and after."""
    code = "from stageparity import atomic; print('a'); atomic.write_text('/dev/stdout', 'b\\n'); print('c')"
    code += "; atomic.write_text('/dev/fd/2', 'd')"
    with (tmp_path / "out").open("wb") as out:
        done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, check=True)
    assert ((tmp_path / "out").read_bytes(), done.stderr) == (b"a\nb\nc\n", b"d")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"a\nb\nc\n", b"d")
    assert names(tmp_path) == ["out"]


def test_what_fails_names_the_target_and_not_its_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk comes without a name, a folder that takes no file with the draft's."""
    (tmp_path / "a").write_text("old")
    code = (
        "import resource, sys; from pathlib import Path; from stageparity import atomic\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "def folder(path):\n"
        "    with atomic.replacing(path) as draft: (draft / 'x').write_bytes(bytes(2000))\n"
        "for write in (lambda: atomic.write_bytes(sys.argv[1] + '/a', bytes(2000)), lambda: folder(sys.argv[1] + '/b')):\n"
        "    try: write()\n"
        "    except OSError as error: print(error.errno, error.filename)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"{errno.EFBIG} {tmp_path}/a\n{errno.EFBIG} {tmp_path}/b\n"
    assert (names(tmp_path), (tmp_path / "a").read_text()) == (["a"], "old")

    def refused(*, prefix: str, dir: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", f"{dir}/{prefix}abcdefgh")

    monkeypatch.setattr(tempfile, "mkdtemp", refused)
    monkeypatch.setattr(tempfile, "mkstemp", refused)
    with pytest.raises(PermissionError) as told:
        atomic.write_text(tmp_path / "c", "x")
    assert told.value.filename == str(tmp_path / "c")
    with pytest.raises(PermissionError) as told, atomic.replacing(tmp_path / "d"):
        raise AssertionError("the block never runs")
    assert told.value.filename == str(tmp_path / "d")
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError) as told, atomic.replacing(tmp_path / "e"):
        Path("/nowhere/else").read_text()
    assert told.value.filename == "/nowhere/else"


def test_a_new_file_is_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "a", "x")
        with atomic.replacing(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o750


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "deep" / "new") as draft:
        (draft / "a").write_text("1")
        assert not (tmp_path / "deep" / "new").exists()
    assert names(tmp_path / "deep") == ["new"]
    (tmp_path / "empty").mkdir()
    with atomic.replacing(tmp_path / "empty") as draft:
        (draft / "a").write_text("1")
    assert names(tmp_path / "empty") == ["a"]
    with pytest.raises(FileExistsError), atomic.replacing(tmp_path / "empty"):
        raise AssertionError("the block never runs")
    with pytest.raises(KeyboardInterrupt), atomic.replacing(tmp_path / "other"):
        raise KeyboardInterrupt
    assert names(tmp_path) == ["deep", "empty"]


def test_what_came_into_the_old_folder_meanwhile_is_not_lost(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.mkdir()
    (target / "old").write_text("1")

    def check(folder: Path) -> None:
        if (folder / "thesis").exists():
            raise ValueError("holds a thesis")

    def run() -> None:
        with atomic.replacing(target, check) as draft:
            (draft / "new").write_text("2")
            (target / "thesis").write_text("do not lose me")

    with pytest.raises(ValueError, match="holds a thesis"):
        run()
    assert names(target) == ["old", "thesis"]
    assert names(tmp_path) == ["x"]


def test_leftovers_of_the_killed_are_collected_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    dead, alive = tmp_path / ".x.partial-1-abcdefgh", tmp_path / ".x.partial-1-abcdefgi"
    for folder in (dead, alive, tmp_path / ".x.partial-mine", tmp_path / ".y.partial-1-abcdefgh"):
        folder.mkdir()
        (folder / "shard").write_text("1")
    (tmp_path / ".x.partial-1-abcdefgj").symlink_to("/etc")
    handle = os.open(alive, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with atomic.replacing(tmp_path / "x"):
        assert not dead.exists()
        assert alive.exists()
    os.close(handle)
    assert atomic.collect(tmp_path / "x") == [alive]
    kept = [".x.partial-1-abcdefgj", ".x.partial-mine", ".y.partial-1-abcdefgh", "x"]
    assert names(tmp_path) == kept


def test_exchange(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    atomic.exchange(tmp_path / "a", tmp_path / "b")
    assert (names(tmp_path / "a"), names(tmp_path / "b")) == (["b"], ["a"])
    with pytest.raises(OSError, match="No such file"):
        atomic.exchange(tmp_path / "a", tmp_path / "missing")


WRITER = """
import sys
from stageparity import atomic
target, number = sys.argv[1], 0
while True:
    number += 1
    with atomic.replacing(target, lambda folder: None) as draft:
        for name in "abcdefgh":
            (draft / name).write_text(str(number))
    atomic.write_text(target + ".txt", str(number) * 1000)
    print(number, flush=True)
"""


def test_the_target_is_there_at_every_moment(tmp_path: Path) -> None:
    """An exchange, not two renames: whoever looks never finds nothing, so no kill can leave nothing."""
    target = tmp_path / "x"
    child = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    child.stdout.readline()
    end, looks = time.monotonic() + 0.5, 0
    while time.monotonic() < end:
        target.stat()
        looks += 1
    child.kill()
    rounds = child.communicate()[0].count("\n")
    assert rounds > 5
    assert looks > 1000


@pytest.mark.parametrize("kills", [5, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills: int, tmp_path: Path) -> None:
    """After each kill the folder holds the eight files of one round and the text is one round's; nothing else is left."""
    rng, target = random.Random(kills), tmp_path / "x"
    for _ in range(kills):
        child = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.random() * 0.02)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        texts = {path.name: path.read_text() for path in target.iterdir()}
        assert sorted(texts) == list("abcdefgh")
        assert len(set(texts.values())) == 1
        whole = (tmp_path / "x.txt").read_text()
        assert whole == whole[: len(whole) // 1000] * 1000
        assert len(names(tmp_path)) <= 4  # at most one draft of each kind is left, whatever the number of kills
    atomic.collect(target)
    atomic.collect(tmp_path / "x.txt")
    assert names(tmp_path) == ["x", "x.txt"]
