"""Commands in environments that nobody prepared: variables, folders, streams and a locale that are missing or wrong.

Each ends in time, in 0 to 2, without a traceback, and puts nothing but colours into a pipe; where the environment does not
matter for what is asked, the output is that of any other.
"""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from vidi.checkpoint import synthetic
from vidi.config import VidiConfig

ROOT = Path(__file__).parents[2]
#: Words behind the interpreter; $1 is a checkpoint.
COMMANDS = {
    "help": "-m vidi --help",
    "inspect": '-m vidi inspect "$1"',
    "parity": "-m vidi parity --case small/oneframe --stage 'text.*'",
}
#: What a shell does before, where it does not matter.
ODD = {
    "no home": "unset HOME USER LOGNAME TERM",
    "no folder": "export HOME=/nonexistent TMPDIR=/nonexistent XDG_CACHE_HOME=/nonexistent HF_HOME=/dev/null",
    "read-only folders": "export TMPDIR=/proc XDG_CACHE_HOME=/proc TORCHINDUCTOR_CACHE_DIR=/proc PYTHONPYCACHEPREFIX=/proc",
    "no such locale": "export LC_ALL=xx_YY LANG=nonsense PYTHONUTF8=1 2>/dev/null",
    "columns": "export COLUMNS=abc LINES=²",
    "no columns": "export COLUMNS=0 LINES=-1",
    "no colours": "export TERM=dumb NO_COLOR=1",
    "colours": "export FORCE_COLOR=1 TTY_COMPATIBLE=1 CLICOLOR_FORCE=1 TERM=xterm-256color",
    "numbers": "export OMP_NUM_THREADS=abc MKL_NUM_THREADS=-1 CUDA_VISIBLE_DEVICES=abc TZ=nonsense PYTHONHASHSEED=7",
    "warnings are errors": "export PYTHONWARNINGS=error",
    "optimised": "export PYTHONOPTIMIZE=2",
    "no permissions": "umask 0777",
    "stdin and stderr closed": "exec <&- 2>&-",
    "no git": "export PATH=/nonexistent",
    "no terminal": "exec setsid -w",
}
COLOUR = re.compile(r"\x1b\[[\d;]*m")
TIME = re.compile(r"\d+\.\d s$", re.MULTILINE)
MARKED = [pytest.param(name, marks=[] if name == "inspect" else pytest.mark.slow) for name in COMMANDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("environments") / "tiny"
    synthetic.synth(path, VidiConfig.tiny(), 3)
    return path


def run(before: str, command: str, folder: Path) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line behind what a shell does first. Fails for a hang, a traceback, an escape."""
    start = before if before.startswith("exec setsid") else f"{before}; exec"
    script = f'{start} "$0" {COMMANDS[command]}'
    words = ["bash", "-c", script, sys.executable, str(folder)]
    done = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, timeout=120, check=False, encoding="utf-8"
    )
    out, err = (COLOUR.sub("", text) for text in (done.stdout, done.stderr))
    assert done.returncode in (0, 1, 2)
    for text in (out, err):
        assert all(line.isprintable() for line in text.split("\n")), ascii(text)
        assert not re.search("Traceback|unexpected", text)
    return done.returncode, TIME.sub("", out), err


@cache
def plain(command: str, folder: Path) -> str:
    status, out, err = run(":", command, folder)
    assert (status, err) == (0, "")
    return out


@pytest.mark.parametrize("before", ODD.values(), ids=ODD)
@pytest.mark.parametrize("command", MARKED)
def test_what_does_not_matter(command: str, before: str, folder: Path) -> None:
    status, out, err = run(before, command, folder)
    assert (status, out) == (0, plain(command, folder)), err
    assert all(line.startswith("libgomp: ") for line in err.split("\n") if line), err


@pytest.mark.parametrize("command", MARKED)
@pytest.mark.parametrize(
    ("before", "statuses"),
    [
        ("unset PYTHONIOENCODING; export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0", (0,)),
        ("export PYTHONIOENCODING=ascii:strict", (0,)),
        ("export COLUMNS=1", (0,)),
        ('d=$(mktemp -d); cd "$d"; rmdir "$d"', (0, 2)),  # help needs no folder, parity says that it needs one
        ("exec >&-", (2,)),
        ("ulimit -f 0", (0, 2)),
        ("ulimit -n 20", (0, 2)),
    ],
)
def test_what_does(before: str, statuses: tuple[int, ...], command: str, folder: Path) -> None:
    if before.startswith("d="):
        before += f'; export PYTHONPATH="{ROOT}"'
    status, out, err = run(before, command, folder)
    assert status in statuses
    assert (err == "") is (status == 0), err
    assert err.count("\n") <= 1
    if "ascii" in before or "LC_ALL" in before:
        assert out.isascii()
