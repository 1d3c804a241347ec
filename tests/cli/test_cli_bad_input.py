"""What is wrong with a command line is said before any work begins."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch

from stageparity import dump
from stageparity import run as runs
from tests import released
from tests.media import make_video
from vidi import device
from vidi.checkpoint import load, synthetic
from vidi.cli import INTERRUPTED, main
from vidi.commands import outputs
from vidi.config import VidiConfig
from vidi.inputs import prompt


@pytest.mark.parametrize(
    ("name", "said"),
    [("nonsense", "is no device"), ("cuda:99", "CUDA devices"), ("meta", "runs on cpu and cuda")],
)
def test_a_device_that_is_not_there(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        device.check(name)
    assert device.check("cpu") == torch.device("cpu")


def test_a_path_that_cannot_become_a_file(tmp_path: Path) -> None:
    outputs.check(None, tmp_path / "new.json")
    with pytest.raises(ValueError, match="is a folder"):
        outputs.check(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        outputs.check(tmp_path / "missing" / "new.json")


@pytest.mark.parametrize("command", ["parity", "faults", "bench"])
def test_a_wrong_output_path_ends_a_command_at_its_start(command: str, tmp_path: Path, capsys) -> None:
    before = torch.get_num_threads()
    assert main([command, "--json", str(tmp_path / "missing" / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"vidi {command}: " in err
    assert "there is no folder" in err
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_no_output_takes_the_place_of_an_input_or_of_another_output(tmp_path: Path, capsys) -> None:
    goldens, film = tmp_path / "goldens", make_video(tmp_path / "film.mp4")
    goldens.mkdir()
    for suffix in ("json", "h5"):
        (goldens / f"a.{suffix}").touch()
    read, twice = "nothing is written into", "is named twice"
    for words, said in (
        (["parity", "--goldens", goldens, "--json", goldens / "a.json"], read),
        (["parity", "--goldens", goldens, "--html", goldens / "new.html"], read),
        (["parity", "--goldens", goldens, "--dump", goldens], read),
        (["parity", "--goldens", goldens, "--json", tmp_path / "x", "--html", tmp_path / "goldens/../x"], twice),
        (["faults", "--goldens", goldens, "--json", goldens / "a.json"], read),
        (["faults", "--json", "-"], "- is no file"),
        (["bench", "--video", film, "--json", film], read),
        (["bench", "--json", "-"], "- is no file"),
        (["budget", "logits", "--goldens", goldens, "--json", goldens / "a.json"], read),
        (["port", "explain", goldens, "--json", goldens / "a.json"], read),
        (["parity", "--candidate", tmp_path / "c", "--budget", film, "--json", film], read),
        (["port", "run", film, "--case", "official/single", "--json", film], read),
        (["port", "run", film, "--case", "official/single", "--html", tmp_path / "candidate.toml"], read),
        (["parity", "--stage", ","], "matches none of"),
        (["parity", "--stage", "logits,"], "matches none of"),
        (["faults", "--fault", ","], "no fault matches"),
    ):
        before = film.read_bytes()
        assert main(list(map(str, words))) == 2, words
        assert said in capsys.readouterr().err
        assert film.read_bytes() == before
    assert sorted(path.name for path in goldens.iterdir()) == ["a.h5", "a.json"]
    outputs.apart(goldens, "/dev/null", "/dev/null", None)


@pytest.mark.parametrize(
    "words",
    [
        ["parity", "--dump"],
        ["parity", "--candidate", "nowhere", "--capsule"],
        ["port", "run", "ADAPTER", "--case", "official/single", "--out"],
        ["port", "run", "ADAPTER", "--case", "official/single", "--capsule"],
        ["port", "init", "official/single"],
        ["synth"],
    ],
    ids=lambda words: f"{words[0]}-{words[-1]}",
)
def test_a_wrong_folder_ends_a_command_at_its_start(words: list[str], tmp_path: Path, capsys) -> None:
    adapter = tmp_path / "adapter.py"
    adapter.touch()
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("absent")
    given = [str(adapter) if word == "ADAPTER" else word for word in words]
    assert main([*given, "-"]) == 2
    assert "- is no folder; choose another name" in capsys.readouterr().err
    for place in ("file", "pipe", "nowhere", "file/below", "pipe/far/below"):
        assert main([*given, str(tmp_path / place)]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert "is no folder; choose another place" in err
    assert (tmp_path / "file").read_text() == "mine"


def test_a_stream_may_lie_in_a_folder_that_is_not_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev is nobody's but root's, and /dev/null everybody's."""
    monkeypatch.setattr(os, "access", lambda path, mode: not Path(path).is_dir())
    outputs.check("/dev/null", "/dev/full", "/dev/stdout")
    with pytest.raises(ValueError, match="cannot be written to"):
        outputs.check(tmp_path / "x")
    with pytest.raises(ValueError, match="cannot be written to; choose another place"):
        outputs.check_folder(tmp_path / "x")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="/dev/null cannot be written to"):
        outputs.check("/dev/null")


@pytest.mark.parametrize("command", ["parity", "bench"])
def test_a_wrong_device_ends_a_command_at_its_start(command: str, capsys) -> None:
    assert main([command, "--device", "nonsense"]) == 2
    assert "is no device" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--video", "nowhere\x1b[2J.mp4"], "nowhere\\x1b[2J.mp4: no such file"),
        (["--video", "/dev/zero"], "no regular file"),
        (["--plain-backend", "nonsense"], "unknown attention backend"),
        (["--frames", "5,999999999999999999"], "from 1 to 10,000,000"),
        (["--frames", "5,,6"], "from 1 to 10,000,000"),
        (["--plain", "9" * 5000], "from 1 to 10,000,000"),
        (["--max-new-tokens", "0"], "from 1 to 10,000,000"),
        (["--frame-batch", "-1"], "from 1 to 10,000,000"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bench_names_it_before_it_makes_weights(
    change: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def made(*_args: object, **_options: object) -> None:
        raise AssertionError("weights were made first")

    monkeypatch.setattr(synthetic, "create", made)
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(["bench", *change]))
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in err
    assert all(line.isprintable() for line in err.split("\n"))


def test_more_memory_than_there_is_is_no_fault_of_the_program(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(runs, "run", lambda *_args, **_options: torch.empty(1 << 60))
    assert main(["parity", "--case", "small/base"]) == 2
    err = capsys.readouterr().err
    assert "not enough memory" in err
    assert "unexpected" not in err


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A command that would run: a video, a question, a checkpoint."""
    folder = tmp_path_factory.mktemp("asked")
    video = make_video(folder / "film.mp4")
    tokenizer = {"tokenizer.json": prompt.tiny_tokenizer().to_str()}
    synthetic.synth(folder / "tiny", VidiConfig.tiny(), extra=tokenizer)
    return ["retrieve", str(video), "a car", "--checkpoint", str(folder / "tiny")]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--device", "nonsense"], "is no device"),
        (["--fps", "0"], "fps is 0.0"),
        (["--fps", "nan"], "fps is nan"),
        (["--max-new-tokens", "9000"], "8192 positions"),
        (["--backend", "nonsense"], "unknown attention backend"),
        (["--backend", "sdpa"], "cannot cap attention scores"),
        (["--path", "fast", "--backend", "flex"], "kernels of its own"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else "",
)
def test_retrieve_names_it_before_it_reads_weights(
    asked: list[str], change: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def loaded(*_args: object, **_options: object) -> None:
        raise AssertionError("weights were read first")

    monkeypatch.setattr(load, "load", loaded)
    assert main([*asked, *change]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err


def test_both_paths_give_one_answer(asked: list[str], capsys) -> None:
    answers = []
    for path in ("plain", "fast"):
        assert main([*asked, "--max-new-tokens", "3", "--dtype", "float32", "--path", path]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_an_interrupted_command_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def stopped(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", stopped)
    assert main(["parity", "--case", "small/base"]) == INTERRUPTED
    assert "vidi parity: interrupted" in capsys.readouterr().err


def test_a_dump_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "single.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path / "single.safetensors"))):
        dump.Dump(tmp_path, ["single"]).write("single", {"logits": torch.zeros(2)})
    assert [path.name for path in tmp_path.iterdir()] == ["single.safetensors"]


@pytest.mark.filterwarnings("always::vidi.release.ReleaseWarning")
def test_a_config_that_contradicts_the_release_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = json.dumps(released.config(num_attention_heads=32))
    (tmp_path / "config.json").write_text(raw, encoding="utf-8")
    film = make_video(tmp_path / "film.mp4", num_frames=1, fps=1)
    before = warnings.showwarning
    assert main(["retrieve", str(film), "a cat", "--checkpoint", str(tmp_path)]) == 2  # there is no tokenizer
    told, refused = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: ")
    assert "num_attention_heads = 32 (the release has 16)" in told
    assert "tokenizer.json" in refused
    assert warnings.showwarning is before
