"""The command line as a process: exit status, one line, no traceback, whatever is done to its streams, names and locale."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cli import talking
from tests.limited import one_line
from tests.media import make_video
from tests.unit.checkpoint.breaking import write_shard
from tools import demo_video, study
from vidi import cli
from vidi.checkpoint import synthetic
from vidi.commands import arguments, inspect, traced
from vidi.config import VidiConfig
from vidi.inputs import prompt

ROOT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}


def vidi(
    *arguments: str | bytes, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run `python -m vidi`; a hang fails after 60 s."""
    options = {"capture_output": True, "cwd": ROOT, "timeout": 60, "errors": "surrogateescape"} | options
    return subprocess.run(
        [sys.executable, "-m", "vidi", *arguments], env={**os.environ, **(env or {})}, text=True, **options
    )


def shell(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", script, sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("process") / "tiny"
    synthetic.synth(path, VidiConfig.tiny(), 3, extra={"tokenizer.json": prompt.tiny_tokenizer().to_str()})
    return path


def test_as_a_module(folder: Path) -> None:
    done = vidi("inspect", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert "synthetic weights (version 1, seed 3)" in done.stdout


# ---- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False])
def test_debug_shows_the_traceback_and_nothing_else_does(before: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["retrieve", "missing.mp4", "a car", "--checkpoint", "nowhere"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "vidi retrieve: missing.mp4: no such file\n"
    assert cli.main(["--debug", *words] if before else [*words, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("vidi retrieve: missing.mp4: no such file\n")


def test_debug_after_two_dashes_is_a_word_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["retrieve", "--checkpoint", "nowhere", "--", "--debug", "a car"]) == 2
    assert capsys.readouterr().err == "vidi retrieve: --debug: no such file\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "unexpected KeyError: 'x'; a fault of this program: --debug shows where"),
        (RecursionError("maximum depth\nand more"), "unexpected RecursionError: maximum depth and more; a fault"),
        (ValueError("\x1b[2Jhostile"), "\\x1b[2Jhostile"),
        (OSError(28, "No space left on device", "out.json"), "out.json: No space left on device; make room there, or"),
        (OSError(27, "File too large"), "standard output: File too large; raise the limit (ulimit -f)"),
        (OSError(30, "Read-only file system", "a"), "a: Read-only file system; write to another place"),
        (OSError(13, "Permission denied", "a"), "a: Permission denied\n"),
        (cli.Ended(15), "ended by SIGTERM\n"),
        (MemoryError(), "not enough memory"),
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory"), "not enough memory (CUDA out of memory)"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), "unexpected UnicodeDecodeError"),
    ],
)
def test_whatever_is_raised_is_one_line(error: BaseException, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(given: list[str]) -> int:
        raise error

    assert cli.guarded(run, [], name="tool") == (143 if isinstance(error, cli.Ended) else 2)
    err = capsys.readouterr().err
    one_line(ValueError(err.removesuffix("\n")))
    assert err.startswith(f"tool: {said}")


def test_a_tool_is_guarded_alike(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(lambda given: None, ["--debug", "x"]) == 0
    assert cli.guarded(lambda given: len(given), ["--debug", "x", "y"]) == 2
    with pytest.raises(SystemExit):
        cli.guarded(lambda given: sys.exit(3), [])


def test_fps_that_no_video_has(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = make_video(tmp_path / "film.mp4")
    for fps in ("1e-308", "1e-7", "1e300"):
        assert cli.main(["retrieve", str(video), "x", "--checkpoint", str(folder), "--fps", fps]) == 2
        assert f"fps is {float(fps)}; from" in capsys.readouterr().err


# ---- streams ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_behind_the_output(folder: Path) -> None:
    done = shell('"$0" -m vidi inspect "$1" >/dev/full', folder)
    assert done.returncode == 2
    full = "standard output: No space left on device; make room there, or write to another place\n"
    assert done.stderr == f"vidi inspect: {full}"
    for buffering in ("", "1"):
        done = shell(f'PYTHONUNBUFFERED={buffering} "$0" -m vidi --help >/dev/full')
        assert (done.returncode, done.stderr) == (2, f"vidi: {full}")


@pytest.mark.slow
def test_closed_streams(folder: Path) -> None:
    done = shell('"$0" -m vidi inspect "$1" >&-', folder)
    assert done.returncode == 2
    assert done.stderr == "vidi inspect: standard output is closed; send it to a file or to /dev/null\n"
    done = shell('"$0" -m vidi inspect "$1/nothing" --json 2>&-', folder)
    assert done.returncode == 2
    assert json.loads(done.stdout)["unusable"] is True
    done = shell('"$0" -m vidi retrieve nothing x --checkpoint "$1" 2>&-', folder)
    assert (done.returncode, done.stdout) == (2, "")
    done = shell('"$0" -m vidi inspect "$1" <&-', folder)
    assert done.returncode == 0


def test_whoever_reads_may_leave(folder: Path) -> None:
    """As cat does where head has gone: silent, and the status of a process that SIGPIPE ended."""
    for words in ('inspect "$1"', "--help", 'inspect "$1" --json'):
        done = shell(f'"$0" -m vidi {words} | true; echo "${{PIPESTATUS[0]}}"', folder)
        assert (done.stdout, done.stderr) in (("141\n", ""), ("0\n", "")), words
    read, write = os.pipe()
    os.close(read)
    done = vidi("inspect", str(folder), capture_output=False, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_rich_output_that_nobody_reads_is_no_verdict() -> None:
    """rich turns a broken pipe into exit 1, which `parity` defines as different."""
    code = (
        "import sys; from vidi.cli import guarded\n"
        "from rich.console import Console\n"
        "sys.exit(guarded(lambda given: Console().print('x ' * 50_000, soft_wrap=True)))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


# ---- names and locales ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/caf\xe9\x1b[2J"
    os.mkdir(odd)
    for path in folder.iterdir():
        os.link(path, odd + b"/" + os.fsencode(path.name))
    for env in ({}, ASCII):
        done = vidi("inspect", odd, env=env)
        assert done.returncode == 0, done.stderr
        assert "caf\\udce9\\x1b[2J: Vidi 1.5" in done.stdout
        done = vidi("inspect", odd, "--json", env=env)
        assert json.loads(done.stdout)["fits"] is True
        done = vidi("inspect", odd + b"/nothing", env=env)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "caf\\udce9\\x1b[2J/nothing: no such folder" in done.stderr
    done = vidi("retrieve", odd + b"/config.json", b"caf\xe9", "--checkpoint", odd, env=ASCII)
    assert (done.returncode, done.stderr) == (2, "vidi retrieve: 'caf\\udce9' holds bytes that are no UTF-8\n")


TOOLS = {
    "../bench/probe_fast.py": ["--only", "steps"],
    "../bench/read_video.py": ["--video", "nowhere.mp4"],
    "attribute.py": [],
    "compare_benchmarks.py": ["nowhere.json", "nowhere.json"],
    "demo_video.py": ["nowhere/a.mp4"],
    "draw_dataflow.py": ["--check", "--json"],
    "import_official.py": ["nowhere", "nowhere"],
    "make_full_golden.py": ["--goldens", "nowhere", "--restate", "x"],
    "margins.py": ["nowhere"],
    "migrate_goldens.py": ["nowhere"],
    "parity_table.py": ["nowhere"],
    "regen_goldens.py": ["--candidate", "nowhere"],
    "stage_table.py": ["nowhere"],
    "study.py": ["noise", "--goldens", "nowhere"],
    "where.py": ["vidi/cli.py:999999"],
}


def test_every_tool_is_here() -> None:
    files = {path.name for folder in ("tools", "bench") for path in (ROOT / folder).glob("*.py")}
    commands = {name for name in files if name not in ("__init__.py", "regen_plan.py")}
    assert commands == {Path(tool).name for tool in TOOLS}


@pytest.mark.slow
@pytest.mark.parametrize("words", [["../bench/probe_fast.py"], ["make_full_golden.py", "--goldens", "nowhere"]])
def test_a_tool_without_a_gpu_says_so(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / words[0]), *words[1:]]
    done = subprocess.run(
        command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, cwd=tmp_path
    )
    said = f"{Path(words[0]).name}: --device cuda: this machine shows 0 CUDA devices to torch {torch.__version__}\n"
    assert (done.returncode, done.stderr) == (2, said)


@pytest.mark.slow
def test_reports_under_an_ascii_locale(tmp_path: Path) -> None:
    """Goldens, budgets and ledger hold letters that such a terminal has not."""
    html, result = tmp_path / "página.html", tmp_path / "página.json"
    words = ("parity", "--case", "oneframe", "--dtype", "float32")
    done = vidi(*words, "--html", str(html), "--json", str(result), env=ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert json.loads(result.read_text("utf-8"))["verdict"] == "equal"
    assert "§" in html.read_text("utf-8")
    done = vidi("faults", "--list", env=ASCII)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run(
        [sys.executable, "tools/draw_dataflow.py", "--check"],
        env={**os.environ, **ASCII},
        capture_output=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) in ((0, b""), (1, b""))


@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_ends_in_one_line(tool: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / tool), *TOOLS[tool]]
    done = subprocess.run(command, env={**os.environ, **ASCII}, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith(f"{Path(tool).name}: ")
    assert "unexpected" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_film_that_is_not_finished_takes_no_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("a:b.mp4")  # FFmpeg would look for a protocol `a`
    demo_video.make(path, 0.1)
    before = path.read_bytes()
    monkeypatch.setattr(demo_video, "picture", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo_video.make(path, 0.2)
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("a:b.mp4", before)]


@pytest.mark.slow
def test_a_whole_run_under_an_ascii_locale(tmp_path: Path) -> None:
    video, checkpoint = make_video(tmp_path / "fílm.mp4"), tmp_path / "chéckpoint"
    done = vidi("synth", str(checkpoint), env=ASCII)
    assert done.returncode == 0, done.stderr
    words = ("retrieve", str(video), "é", "--checkpoint", str(checkpoint), "--max-new-tokens", "8")
    for env in ({}, ASCII):
        done = vidi(*words, env=env)
        assert done.returncode == 0, done.stderr
        assert "NOTE: synthetic weights (version 1, seed 0): this model speaks nonsense\n" in done.stderr
        assert "Traceback" not in done.stderr
    assert done.stdout.isascii()
    done = vidi(*words, "--json", env=ASCII)
    assert json.loads(done.stdout)["query"] == "é"


def test_hostile_names_reach_no_terminal(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b]0;owned\x07\x9b2J\u202e"
    path = tmp_path / f"x{escape}"
    path.mkdir()
    config = json.loads((folder / "config.json").read_text())
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    metadata = {"vidi_synthetic": escape}
    write_shard(path / "model.safetensors", {"__metadata__": metadata, f"model.{escape}": entry}, bytes(4))
    (path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    shown: list[bool] = []
    for changes in ({}, {f"new{escape}": 1}, {"model_type": escape}, {"vocab_size": escape}):
        (path / "config.json").write_text(json.dumps(config | changes))
        for words in (
            ["inspect", str(path)],
            ["retrieve", str(make_video(path / "a.mp4")), "x", "--checkpoint", str(path)],
        ):
            assert cli.main(words) in (1, 2)
            out, err = capsys.readouterr()
            shown += ["NOTE: synthetic weights (\\x1b" in err]
            assert all(line.isprintable() for line in (out + err).split("\n")), ascii(out + err)
    assert any(shown)
    assert cli.main(["bench", "--json", str(path / "missing" / "x.json")]) == 2
    assert capsys.readouterr().err.removesuffix("\n").isprintable()


@pytest.mark.parametrize("main", [cli.main, study.main])
@pytest.mark.parametrize("words", [[], ["--check"], ["inspect", "a"], ["synth", "a", "--size"], ["noise", "--accept"]])
def test_hostile_arguments_reach_no_terminal(main: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("\x1b]0;owned\x07\x9b2J\u202e\udcff", "--\x1b[2J"):
        with pytest.raises(SystemExit) as ended:
            main([*words, word])
        assert ended.value.code == 2
        err = capsys.readouterr().err
        assert all(line.isprintable() for line in err.split("\n")), ascii(err)


def test_an_answer_is_shown_without_its_controls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model may say anything: the words of its tokenizer come out of a file."""
    pieces = ["0.25-0.50", "\x1b[2J", " \n", "\u202e", "é"]
    talking.write(tmp_path / "talking", list(map(prompt_bytes, pieces)))
    words = ["retrieve", str(make_video(tmp_path / "film.mp4")), "a", "--checkpoint", str(tmp_path / "talking")]
    assert cli.main([*words, "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("0.25-0.50\\x1b[2J \n\\u202eé\n")
    assert cli.main([*words, "--dtype", "float32", "--json"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert json.loads(out)["text"] == "".join(pieces)


def prompt_bytes(text: str) -> str:
    """A text as the byte-level vocabulary spells it."""
    from tokenizers import pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


# ---- Ctrl-C -----------------------------------------------------------------------------------------------------------

#: SIGINT is ignored where a shell started the tests in the background, and would be here too. Before its first line the
#: process is Python's own, which starts and reads one file.
LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
PROGRAM = LISTENS + "import os, sys; from vidi.cli import main; os.write(1, b'!'); sys.exit(main())"


def _interrupted(delay: float) -> tuple[int, str]:
    """Exit status and stderr of a run that gets SIGINT ``delay`` seconds after its first line."""
    command = [sys.executable, "-c", PROGRAM, "parity"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as child:
        assert child.stdout is not None
        child.stdout.read(1)
        time.sleep(delay)
        child.send_signal(signal.SIGINT)
        try:
            return child.wait(60), child.communicate()[1]
        finally:
            child.kill()


@pytest.mark.parametrize("times", [1, pytest.param(40, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_moment(times: int) -> None:
    """Also while modules are imported: of numpy and torch, whose half-done imports raise other exceptions or crash."""
    rng = random.Random(times)
    for number in range(times):
        delay = 0.01 + rng.random() * (0.1 if number % 2 else 3)
        status, err = _interrupted(delay)
        assert status == 130, (delay, err)
        assert err == "vidi parity: interrupted\n", (delay, err)


# ---- SIGTERM and SIGHUP -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "ended by SIGTERM"), (signal.SIGHUP, 129, "ended by SIGHUP: its terminal has gone")],
)
def test_a_signal_ends_long_work_without_a_leftover(number: int, status: int, said: str, tmp_path: Path) -> None:
    """`timeout`, a scheduler or a closed terminal: gigabytes of a draft must not stay behind."""
    command = [sys.executable, "-m", "vidi", "synth", str(tmp_path / "x"), "--size", "full"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True) as child:
        try:
            _wait_for(lambda: any(path.is_file() for path in tmp_path.rglob("*")))
            child.send_signal(number)
            err = child.communicate(timeout=60)[1]
        finally:
            child.kill()
    assert (child.returncode, err) == (status, f"vidi synth: {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_what_a_port_leaves_running_ends_with_it(tmp_path: Path) -> None:
    """A worker that goes on would hold the device while the next case runs."""
    folder = tmp_path / "one" / "case"
    folder.mkdir(parents=True)
    left = tmp_path / "left"
    left.write_text('#!/bin/sh\nsleep 99 & echo $! > "$0.pid"\nexit 3\n')
    left.chmod(0o755)
    (tmp_path / "adapter.py").write_text("")
    words = argparse.Namespace(python=str(left), timeout=30)
    said = traced.run_port(words, tmp_path / "adapter.py", tmp_path / "one")
    assert said is not None
    assert "ended with status 3" in said.text
    _wait_for(lambda: not _runs(int((tmp_path / "left.pid").read_text())))


def test_a_signal_ends_the_port_as_well(tmp_path: Path) -> None:
    """Who ends `vidi port run` does not know the process id of the port's interpreter, which may be behind a wrapper."""
    assert cli.main(["port", "init", "official/single", str(tmp_path)]) == 0
    waiting = "import os, pathlib, time\npathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\ntime.sleep(99)\n"
    (tmp_path / "adapter.py").write_text(waiting)
    wrapper = tmp_path / "wrapper"
    wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit $?\n')
    wrapper.chmod(0o755)
    command = [sys.executable, "-m", "vidi", "port", "run", str(tmp_path / "adapter.py"), "--python", str(wrapper)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, text=True) as child:
        try:
            _wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
            child.send_signal(signal.SIGTERM)
            assert (child.wait(60), child.communicate()[1]) == (143, "vidi port: ended by SIGTERM\n")
        finally:
            child.kill()
    _wait_for(lambda: not _runs(int((tmp_path / "pid").read_text())))  # an orphan's end is its new parent's to take


def _runs(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_what_the_caller_wants_ignored_stays_ignored(folder: Path) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import os, sys; from vidi import cli\n"
    code += "def run(given): os.kill(os.getpid(), signal.SIGHUP); print('on')\nsys.exit(cli.guarded(run))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "on\n", "")


def _wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- one vocabulary ---------------------------------------------------------------------------------------------------


def test_dtypes_have_one_spelling_and_two_short_ones() -> None:
    parse = arguments.dtype()
    assert [parse(word) for word in ("bf16", "fp16", *arguments.DTYPES)] == ["bfloat16", "float16", *arguments.DTYPES]
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in arguments.DTYPES)
    for word in ("fp8", "BF16", "", "float8"):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match=r"choose float64.*\(bf16, fp16 for short\)"):
            parse(word)
    with pytest.raises(arguments.argparse.ArgumentTypeError, match="choose float32"):
        arguments.dtype("float32")("float64")


def test_amounts_of_memory() -> None:
    assert arguments.memory("24GiB") == 24 << 30
    assert arguments.memory("1.5 GB") == 1_500_000_000
    for word in ("24", "24G", "-1GiB", "1e9GiB", "nanGiB", "9999999GiB", "١GiB"):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match="with its unit"):
            arguments.memory(word)
    for word in ("0", "-1", "1.5", "10000001", "x", "1_0"):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match="a whole number"):
            arguments.positive(word)


@pytest.mark.parametrize(
    ("memory", "status", "said"), [("1GiB", 0, "fits in 1.00 GiB"), ("500MiB", 1, "does not fit in")]
)
def test_what_a_run_needs(
    memory: str, status: int, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["inspect", str(folder), "--frames", "60", "--memory", memory]) == status
    out = capsys.readouterr().out
    assert said in out
    assert "weights in a second layout" in out
    assert cli.main(["inspect", str(folder), "--frames", "60", "--memory", memory, "--json"]) == status
    needs = json.loads(capsys.readouterr().out)["needs"]
    assert needs["fits"] is (status == 0)
    assert sum(needs["terms"].values()) == needs["peak_bytes"]
    assert inspect.FITS == 0
