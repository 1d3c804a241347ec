"""Every word of a command line is read or refused, in one line that says what was probably meant."""

from __future__ import annotations

import glob
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from stageparity import manifest
from stageparity import run as runs
from tests.media import make_video
from tools import compare_benchmarks, study
from vidi.checkpoint import synthetic
from vidi.cli import COMMANDS, main
from vidi.commands import retrieve, traced
from vidi.config import VidiConfig
from vidi.parity.goldens import goldens_dir

#: The fewest words that a command takes, of things that are not there: nothing is computed, whatever is added.
LEAST = {
    "retrieve": ["nowhere.mp4", "a car", "--checkpoint", "nowhere"],
    "parity": ["--case", "nowhere"],
    "port": ["run", "nowhere/adapter.py"],
    "faults": ["--list"],
    "budget": ["nowhere"],
    "inspect": ["nowhere"],
    "synth": ["/dev/null/nowhere"],
    "bench": ["--video", "nowhere.mp4"],
}
HOSTILE = [
    "\x1b[2J\x9b2J", "\udcff\udcfe", "\u202e", "9" * 5000, "-1", "nan", "-inf", "1e308", "1e-308", "[", "?!", " ",
    "\r\n", "--", "-", "nowhere/\x07", "a" * 100_000,
]  # fmt: skip


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which a command line ends in exit 2, within 10 s."""
    start = time.perf_counter()
    try:
        status = main(words)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else -1
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), (ascii(words)[:200], out, err)
    assert err.endswith("\n"), ascii(words)[:200]
    assert err[:-1].isprintable(), ascii(err)
    assert "unexpected" not in err
    assert len(err) < 1500, len(err)
    assert time.perf_counter() - start < 10, ascii(words)[:200]
    return err


def options(command: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The options that take a value, as a command's own help lists them."""
    with pytest.raises(SystemExit):
        main([command, *(["run"] if command == "port" else []), "--help"])
    return sorted(set(re.findall(r"^  (--[a-z-]+) (?=[A-Z{])", capsys.readouterr().out, re.MULTILINE)))


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_word_is_no_option_left_out(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--candidate "$DUMP"` without DUMP judged the model itself, and said that all is equal."""
    found = options(command, capsys)
    assert len(found) >= {"synth": 4, "inspect": 2}.get(command, 4), found
    for option in found:
        least = LEAST[command]
        if option in least:  # once, or it would be refused for that
            at = least.index(option)
            least = [*least[:at], *least[at + 2 :]]
        for empty in ([option, ""], [f"{option}="]):
            assert re.search("is empty|''", refused([command, *least, *empty], capsys)), (option, empty)


def lines(seed: int, command: str, known: list[str]) -> Iterator[list[str]]:
    """Command lines of one command with hostile words in the place of a value, of a word, or of an option."""
    rng = random.Random(f"{seed} {command}")
    least = LEAST[command]
    for option in known:
        for word in rng.sample(HOSTILE, 4):
            yield [command, *least, option, word]
    for word in HOSTILE:
        yield [command, *least, f"--{word}x"]
    for place in (place for place, word in enumerate(least) if "nowhere" in word):
        for word in rng.sample(HOSTILE, 6):
            yield [command, *least[:place], least[place].replace("nowhere", f"nowhere{word}"), *least[place + 1 :]]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=pytest.mark.slow if name == "budget" else ()) for name in COMMANDS]
)
def test_hostile_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    known = [
        option for option in options(command, capsys) if command != "faults" or option not in {"--json", "--goldens"}
    ]
    made = list(lines(7, command, known))
    assert len(made) >= 25
    for words in made:
        refused(words, capsys)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("partiy", "did you mean parity?"),
        ("", "one of retrieve, parity, port"),
        ("port rnu", "vidi port: argument VERB: invalid choice: 'rnu'"),
        ("port rnu", "did you mean run?"),
        ("parity --dtpye bf16", "vidi parity: unknown: --dtpye (did you mean --dtype?)"),
        ("parity --dtpye=bf16", "did you mean --dtype?"),
        ("parity --model 9B", "did you mean 9b?"),
        ("parity --case small/bsae", "did you mean small/base?"),
        ("parity --case oneframes", "did you mean oneframe?"),
        ("port init official/singel OUT", "did you mean official/single?"),
        ("parity --case small/base --stage visoin.pad", "did you mean vision.pad?"),
        ("budget laeyr.0.t2v --case small/base", "did you mean layer.0.t2v?"),
        ("faults --list --fault bridge.pda_top_left", "did you mean bridge.pad_top_left?"),
        ("faults --list --fault bridge.*,nothing", "no fault matches 'nothing'"),
        ("inspect x --farmes 3", "did you mean --frames?"),
        ("synth x --size tniy", "did you mean tiny?"),
    ],
)
def test_what_was_meant(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(words.split(), capsys)


def test_nothing_near_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["xyzzy"],
        ["parity", "--xyzzy"],
        ["parity", "--case", "xyzzy"],
        ["faults", "--list", "--fault", "xyzzy"],
    ):
        assert "did you mean" not in refused(words, capsys)


def test_a_tool_says_it_alike(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        study.main(["nosie"])
    assert ended.value.code == 2
    assert re.fullmatch("tools/study.py: .*did you mean noise.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("parity --require 90%", "--require means nothing without --candidate"),
        ("parity --budget x.toml", "--budget means nothing"),
        ("parity --capsule x", "--capsule means nothing"),
        ("parity --candidate x --backend flex", "--backend means nothing beside --candidate"),
        ("parity --candidate x --dump y", "--dump means nothing beside"),
        ("parity --candidate x --model 7b", "--model means nothing beside"),
        ("parity --candidate x --chained", "--chained means nothing beside"),
        ("parity --path fast --backend flex", "--backend flex: the fast path has kernels of its own"),
        ("parity --path fast --backend eager", "--backend eager: the fast path has kernels of its own"),
        ("parity --size full --dtype bf16", "--dtype means nothing with --size full"),
        ("parity --size full --html x", "--html means nothing with --size full"),
        ("parity --size full --stage logits", "--stage means nothing with --size full"),
        ("parity --json a --json b", "is given twice"),
        ("port run x --html a --html b", "is given twice"),
        ("budget --json a --json b", "is given twice"),
        ("budget --dtype float32 --dtype float16", "argument --dtype: is given twice"),
        ("retrieve v.mp4 q --checkpoint a --checkpoint b", "argument --checkpoint: is given twice"),
        ("bench --video x --plain 5", "--plain means nothing with --video"),
        ("faults --list --json x", "--json means nothing with --list"),
        ("faults --list --dtype bf16", "--dtype means nothing with --list"),
    ],
)
def test_what_would_not_be_read_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(words.split(), capsys)


def test_a_second_stage_is_added_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def ran(*_args: object, globs: str, **_options: object) -> None:
        asked.append(globs)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", ran)
    main(["parity", "--case", "small/oneframe", "--stage", "text.*", "--stage", "pos.freq,logits"])
    assert asked == ["text.*,pos.freq,logits"]


@pytest.mark.parametrize(
    "words",
    [
        "VIDEO one two --checkpoint C",
        "VIDEO --checkpoint C one two",
        "VIDEO one --checkpoint C two",
        "--checkpoint C VIDEO one two",
        "VIDEO --checkpoint C -- one two",
    ],
)
def test_questions_may_follow_options(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(retrieve, "run", lambda args: asked.append(args.query) or 0)
    assert main(["retrieve", *words.split()]) == 0
    assert asked == [["one", "two"]]


def test_a_question_that_begins_with_a_dash_needs_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown: -x" in refused(["retrieve", "film.mp4", "--checkpoint", "c", "one", "-x"], capsys)


@pytest.mark.parametrize("word", ["nan", "inf", "-0.1"])
def test_no_slack_opens_or_shuts_the_gate(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compare_benchmarks.main(["nowhere.json", "nowhere.json", f"--slack={word}"])
    assert ended.value.code == 2
    assert "a number from 0 on" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["--max-frames", "--max-new-tokens"])
def test_a_count_is_checked_before_anything_is_opened(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("0", "-1", "1e3", "1_0", "٣", "9" * 5000):
        assert "a whole number" in refused(
            ["retrieve", "nowhere.mp4", "x", "--checkpoint", "nowhere", name, word], capsys
        )


def test_a_file_of_questions_is_not_called_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.synth(tmp_path / "tiny", VidiConfig.tiny())
    words = ["retrieve", str(make_video(tmp_path / "film.mp4")), "--checkpoint", str(tmp_path / "tiny"), "--queries"]
    for name in (str(tmp_path), "/dev/zero"):
        assert "video" not in refused([*words, name], capsys).removeprefix("vidi retrieve: ")


def test_the_mark_of_an_editor_is_no_part_of_a_question(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_bytes("\ufeffa car\r\n\r\na cat\u2028that\x0bsits\n".encode())
    assert retrieve._queries(tmp_path / "questions.txt") == ["a car", "a cat\u2028that\x0bsits"]


def test_no_memory_at_all_is_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0 GiB was taken for no question, and "fits" said of it."""
    synthetic.synth(tmp_path / "tiny", VidiConfig.tiny())
    assert main(["inspect", str(tmp_path / "tiny"), "--memory", "0GiB"]) == 1
    assert "does not fit in 0.00 GiB, which has room for no video at all" in capsys.readouterr().out


def test_a_ports_budget_and_requirement_are_read_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ran(*_args: object, **_options: object) -> None:
        raise AssertionError("the port was run first")

    monkeypatch.setattr(traced, "run_port", ran)
    assert main(["port", "init", "small/oneframe", str(tmp_path)]) == 0
    capsys.readouterr()
    for words, said in (
        (["--budget", str(tmp_path / "missing.toml")], "missing.toml: no such file"),
        (["--budget", str(tmp_path / "candidate.toml")], "[[group]] tables are needed"),
        (["--require", "9000%"], "a share (0.9, 90%), all, or a path is needed"),
        (["--require", "padding,colour"], "--require colour"),
    ):
        assert said in refused(["port", "run", str(tmp_path / "adapter.py"), *words], capsys)
        assert said in refused(["parity", "--candidate", str(tmp_path), *words], capsys)


@pytest.mark.slow
def test_a_hostile_case_is_shown_and_obeyed_by_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names of golden folders come from others: no control reaches the terminal, and `[/]` is no markup of ours."""
    name = "x\x1b[2J\x9b[bold]["
    source, goldens = goldens_dir(), tmp_path / "goldens"
    (goldens / name).mkdir(parents=True)
    body = manifest.parse(source / "small" / "oneframe.json")
    shutil.copy(source / "small" / "oneframe.h5", goldens / name / "]oneframe.h5")
    (goldens / name / "]oneframe.json").write_bytes(manifest.render(body | {"case": "]oneframe"}))
    for shared in (*(source / "small").glob("*.safetensors"), source / "tolerances.toml", *source.glob("pos_freq*")):
        shutil.copy(shared, goldens / name if shared.parent.name == "small" else goldens)
    shutil.copytree(source / "measured", goldens / "measured")
    case, out = f"{glob.escape(name)}/*", tmp_path / "o\x1b[2J u"
    for words, status in (
        (["budget", "logits", "--dtype", "float64", "--goldens", str(goldens)], 0),
        (["budget", "logits", "--dtype", "float64", "--goldens", str(goldens), "--case", case], 0),
        (["parity", "--stage", "pos.freq", "--goldens", str(goldens)], 0),
        (["port", "init", case, str(out), "--goldens", str(goldens)], 0),
        (["port", "run", str(out / "adapter.py"), "--case", case, "--goldens", str(goldens)], 2),
    ):
        assert main(words) == status, (words, capsys.readouterr().err)
        said = capsys.readouterr()
        assert all(line.isprintable() for line in (said.out + said.err).split("\n")), ascii(said.out + said.err)
        assert "]oneframe" in said.out + said.err or words[:2] == ["port", "init"] or words[0] == "budget"
        if words[:2] == ["port", "init"]:
            assert f"vidi port run '{tmp_path}/o\\x1b[2J u/adapter.py'" in said.out


def test_a_folder_that_is_gone_is_said_to_be(tmp_path: Path) -> None:
    """torch's libraries ended the process with "Cannot load libtorch_cpu.so"."""
    gone = tmp_path / "gone"
    script = f'mkdir "{gone}" && cd "{gone}" && rmdir "{gone}" && exec "$0" -m vidi "$@"'
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for words, status, said in (
        (["synth", "out"], 2, "vidi synth: the folder that this runs in is gone"),
        (["--help"], 0, ""),
    ):
        command = ["bash", "-c", script, sys.executable, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
        assert (done.returncode, done.stderr.startswith(said), done.stderr.count("\n")) == (
            status,
            True,
            status // 2,
        ), done
