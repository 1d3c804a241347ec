"""What a foreign port runs in: environments of their own under `build/ports/`, made once and kept."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.not_run import not_run

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "ports"
SECONDS = 240  # to download and install
INSTALL = ("install", "-q", "--disable-pip-version-check", "--only-binary=:all:")


def interpreter(name: str, *packages: str) -> Path:
    """The Python of a virtual environment with these packages (`mlx==0.32.4`). A test that cannot have it is NOT RUN."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"
    with _making(name, packages) as missing:
        if missing:
            _run(sys.executable, "-m", "venv", "--clear", folder)
            _run(python, "-m", "pip", *INSTALL, *packages)
    return python


def folder_of(name: str, *packages: str) -> Path:
    """A folder for PYTHONPATH with these packages alone, to stand beside what this interpreter has. As `interpreter`."""
    folder = ENVIRONMENTS / name
    with _making(name, packages) as missing:
        if missing:
            _run(sys.executable, "-m", "pip", *INSTALL, "--no-deps", "--upgrade", "--target", folder, *packages)
    return folder


@contextmanager
def _making(name: str, packages: Sequence[str]) -> Iterator[bool]:
    """Whether an environment must be made: one process at a time, and once for a list of packages."""
    ENVIRONMENTS.mkdir(parents=True, exist_ok=True)
    made, wanted = ENVIRONMENTS / f"{name}.txt", " ".join(packages)
    with open(ENVIRONMENTS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of pytest may want the same one
        missing = not made.exists() or made.read_text() != wanted
        yield missing
        if missing:
            made.write_text(wanted)


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        not_run(f"{' '.join(map(str, command[1:4]))} did not end within {SECONDS} s")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        not_run(f"{' '.join(map(str, command[1:4]))} failed: {' '.join(said)}")
