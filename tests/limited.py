"""Many cases in one child process under limits: seconds for each, memory for all, and no file opened that was not named.

A module of tests offers ``case(seed, folder) -> outcome``; a case may write into ``folder / "inside"`` and may read from there
alone. What lies in ``folder / "outside"`` is watched by the kernel: one opening fails the run.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import resource
import select
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

__all__ = ["ROOT", "one_line", "run_cases", "watched"]

ROOT = Path(__file__).parents[1]
SPARE_BYTES, SECONDS = 1 << 30, 10
_IN_OPEN = 0x20


def run_cases(
    module: str, number: int, folder: Path, *, first: int = 0, spare_bytes: int = SPARE_BYTES, seconds: int = SECONDS
) -> Counter[str]:
    """Outcomes of the cases ``first`` to ``first + number``. Fails with the seed of a case that ends the child."""
    command = [sys.executable, "-m", "tests.limited", module, str(first), str(first + number), str(folder)]
    command += [str(spare_bytes), str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    last = lines[-1] if lines else ["no case at all"]
    assert done.returncode == 0, f"seed {last[0]} ended the child ({done.returncode}):\n{done.stderr[-4000:]}"
    outcomes = Counter(outcome for _, outcome in (line for line in lines if len(line) == 2))
    assert outcomes.total() == number
    return outcomes


def one_line(error: BaseException, *names: object) -> None:
    """A refusal says in one line that a terminal can show, and no long one, what is wrong; it names ``names``."""
    text = str(error)
    assert text.isprintable(), ascii(text)
    assert 0 < len(text) < 1500, ascii(text)
    assert all(str(name) in text for name in names), ascii(text)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Raises AssertionError where anything in ``folder``, or the folder itself, is opened in the block (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert handle >= 0
    try:
        assert libc.inotify_add_watch(handle, os.fsencode(folder), _IN_OPEN) >= 0
        yield
        assert not select.select([handle], [], [], 0)[0], f"a file in {folder} was opened"
    finally:
        os.close(handle)


def _main(module: str, first: str, last: str, place: str, spare_bytes: str, seconds: str) -> None:
    case = importlib.import_module(module).case
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + int(spare_bytes),) * 2)
    for seed in range(int(first), int(last)):
        print(seed, end="", flush=True)
        folder = Path(place) / "case"
        inside, outside = folder / "inside", folder / "outside"
        inside.mkdir(parents=True)
        outside.mkdir()
        faulthandler.dump_traceback_later(int(seconds), exit=True)
        outcome = case(seed, folder)
        faulthandler.cancel_dump_traceback_later()
        print(f"\t{outcome}", flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    _main(*sys.argv[1:])
