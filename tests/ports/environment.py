"""An interpreter of its own for a foreign port: a virtual environment under `build/ports/`, made once and kept."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.not_run import not_run

ENVIRONMENTS = Path(__file__).parents[2] / "build" / "ports"
SECONDS = 240  # to download and install


def interpreter(name: str, *packages: str) -> Path:
    """The Python of the environment ``name`` with these packages (`mlx==0.32.4`). A test that cannot have it is NOT RUN."""
    folder, wanted = ENVIRONMENTS / name, "\n".join(packages)
    python, made = folder / "bin" / "python", folder / "packages.txt"
    folder.mkdir(parents=True, exist_ok=True)
    with open(ENVIRONMENTS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of pytest want the same one
        if not made.exists() or made.read_text() != wanted:
            _run(sys.executable, "-m", "venv", "--clear", folder)
            _run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--only-binary=:all:", *packages)
            made.write_text(wanted)
    return python


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        not_run(f"{command[2]} did not end within {SECONDS} s")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:]
        not_run(f"{' '.join(map(str, command[1:4]))} failed: {' '.join(said)}")
