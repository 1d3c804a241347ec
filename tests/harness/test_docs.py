"""The pages tell the truth: commands exist, named tests and files exist, examples run, drawings are the registry's."""

from __future__ import annotations

import argparse
import ast
import fnmatch
import importlib
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from stageparity import run, store
from vidi import cli
from vidi.checkpoint import hub
from vidi.parity.stages import STAGES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
OWN = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "rfc-answers.md"]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


@pytest.fixture(scope="module")
def draw():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        yield importlib.import_module("draw_dataflow")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def commands(path: Path) -> list[list[str]]:
    """Commands in ```sh blocks and in inline code, without words that stand for something (DIR, …)."""
    text = path.read_text("utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += re.findall(
        r"`((?:vidi|python|tox|pytest) [^`\n]+|tools/\w+\.py[^`\n]*|\.ci/run)`",
        re.sub(r"```.*?```", "", text, flags=re.S),
    )
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if part.strip()]


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    below = [p for action in parser._actions if isinstance(action.choices, dict) for p in action.choices.values()]
    own = {option for action in parser._actions for option in action.option_strings}
    return own.union(*(options_of(verb) for verb in below))


def check_vidi(words: list[str]) -> None:
    assert words[1] in cli.COMMANDS or words[1] in ("--help", "--version"), f"vidi has no command {words[1]}"
    if words[1] in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"vidi.commands.{words[1]}").add_arguments(parser)
        given = {word.split("=")[0] for word in words[2:] if word.startswith("--")}
        assert given <= options_of(parser), f"vidi {words[1]} does not know {given - options_of(parser)}"
        values = dict(itertools.pairwise(words))
        if "--case" in values:
            cases = [ref for place in ("goldens", "goldens/large") for ref in store.list_cases(ROOT / place)]
            known = {n for ref in cases for n in (ref.name, f"{ref.set}/{ref.name}")}
            assert fnmatch.filter(known, values["--case"]), f"no case {values['--case']}"


def check_tool(words: list[str]) -> None:
    path = ROOT / words[0]
    assert path.is_file(), f"{words[0]} does not exist"
    known = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text("utf-8")))
    given = {word for word in words[1:] if word.startswith("--")}
    assert given <= known, f"{words[0]} does not know {given - known}"


def check(words: list[str]) -> None:
    words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))  # variables of the environment
    if words[0].startswith("env/bin/"):  # an environment that the page makes
        words[0] = words[0].removeprefix("env/bin/")
    if words[0] == "vidi":
        check_vidi(words)
    elif words[:2] == ["python", "-m"] and words[2] == "pytest":
        for word in words[3:]:
            assert not word.startswith("tests/") or (ROOT / word.split("::")[0]).exists(), word
        if "-m" in words[3:]:
            marker = words[words.index("-m", 3) + 1]
            assert f' "{marker}: ' in (ROOT / "pyproject.toml").read_text("utf-8"), f"no marker {marker}"
    elif words[0] == "python" and words[1].startswith("tools/"):
        check_tool(words[1:])
    elif words[0].startswith("tools/"):
        check_tool(words)
    elif words[0] == "tox":
        assert re.search(rf"^\[testenv:{words[2]}\]", (ROOT / "tox.ini").read_text("utf-8"), re.M), (
            f"no tox env {words[2]}"
        )
    elif words[0] == ".ci/run":
        assert (ROOT / ".ci" / "run").is_file()
    elif words[0] == "pip":
        extras = re.findall(r"\.\[(\w+)\]", " ".join(words))
        assert all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M) for extra in extras)
    elif words[0] == "cp" or (words[0] == "python" and words[1].startswith("tests/")):
        for word in words[1:]:
            assert not word.startswith("tests/") or (ROOT / word).exists(), word
    elif words[0] == "hf":
        assert words[1:] == ["download", hub.RELEASE]
    else:
        assert words[0] in ("python", ".", "cd"), f"unknown command {words}"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_commands_exist(path: Path) -> None:
    for words in commands(path):
        check(words)


def test_the_pages_name_commands_at_all() -> None:
    """The check above must see what it is for."""
    assert all(len(commands(path)) >= 5 for path in OWN)
    for wrong in (
        "vidi parity --cases x",
        "vidi look",
        "vidi parity --case small/none",
        "tools/regen_goldens.py --yes",
        "python -m pytest -m quick",
        "tools/none.py",
    ):
        with pytest.raises(AssertionError):
            check(shlex.split(wrong))


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_named_tests_exist(path: Path) -> None:
    for file, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", path.read_text("utf-8")):
        tree = ast.parse((ROOT / file).read_text("utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_named_files_and_links_exist(path: Path) -> None:
    text = path.read_text("utf-8")
    named = re.findall(r"`((?:vidi|tests|tools|goldens|docs)/[\w./]+?)/?`", text)
    assert [name for name in named if not (ROOT / name).exists()] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_every_answer_has_a_proof() -> None:
    """Each paragraph that opens with a bold question or claim names a test or a command."""
    text = (ROOT / "docs" / "rfc-answers.md").read_text("utf-8")
    answers = re.split(r"\n(?=\*\*)|\n(?=## )", text)
    bold = [part for part in answers if part.startswith("**")]
    assert len(bold) >= 12
    assert [part[:60] for part in bold if "Test: `tests/" not in part and "```sh" not in part] == []


def test_messages_on_the_page_are_those_of_the_code() -> None:
    """Each cause of the failed assertion is quoted as the test of the answers provokes it."""
    from tests.harness.test_rfc_answers import CAUSES

    text = (ROOT / "docs" / "rfc-answers.md").read_text("utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\| \([a-d]\)", line)]
    assert len(rows) == len(CAUSES) == 4
    for line, (_, _, said) in zip(rows, CAUSES.values(), strict=True):
        assert said in line


def test_the_example_of_a_port_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    script = tmp_path / "port.py"
    script.write_text(block, "utf-8")
    runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith("vision.space_to_depth: equal (125440 values")
    script.write_text(
        block.replace("(0, 1, 3, 5, 2, 4)", "(0, 3, 5, 1, 2, 4)"), "utf-8"
    )  # channels last, a known misreading
    with pytest.raises(AssertionError):
        runpy.run_path(str(script))


# ---- drawn from the registry ---------------------------------------------------------------------------------------------


def test_drawings_are_current(draw, capsys: pytest.CaptureFixture[str]) -> None:
    assert draw.main(["--check"]) == 0, capsys.readouterr().out


def test_an_old_drawing_is_seen(
    draw, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "dataflow.svg"
    old.write_text(draw.SVG.read_text("utf-8").replace("vision.pad", "vision.pat"), "utf-8")
    monkeypatch.setattr(draw, "SVG", old)
    monkeypatch.setattr(draw, "ROOT", tmp_path)
    monkeypatch.setattr(draw, "PAGE", tmp_path / "CONTRIBUTING.md")
    draw.PAGE.write_text(
        (ROOT / "CONTRIBUTING.md").read_text("utf-8").replace("| `logits` | §8", "| `logits` | §7"), "utf-8"
    )
    assert draw.main(["--check"]) == 1
    assert capsys.readouterr().out.count("is not what the registry says") == 2
    assert draw.main([]) == 0
    assert draw.main(["--check"]) == 0


def test_every_stage_is_drawn_once_above_what_it_feeds(draw) -> None:
    nodes = draw.layout()
    assert {draw.drawn_as(s.name) for s in draw.DRAWN} <= set(nodes)
    assert len({(node.lane, node.row) for node in nodes.values()}) == len(nodes)
    for stage in draw.DRAWN:
        for name in draw.feeds(stage):
            assert nodes[name].row < nodes[draw.drawn_as(stage.name)].row, f"{name} feeds {stage.name} from below"
    text = draw.dataflow_svg()
    assert all(text.count(f">{draw.drawn_as(stage.name)}</text>") == 1 for stage in draw.DRAWN)


@pytest.mark.parametrize("name", ["single", "batch", "longvideo"])
def test_shapes_on_the_drawing_are_those_of_the_goldens(draw, name: str) -> None:
    """Letters bind to one size each within a case."""
    case = store.open_case(ROOT / "goldens" / "official", name)
    config = case.config
    size = {"C": config["vision_config"]["hidden_size"], "D": config["hidden_size"], "U": config["vocab_size"]}
    seen = set()
    for stage in case.targets:
        found = STAGES.find(stage)
        assert found is not None
        if not found[0].shape:
            continue
        seen.add(found[0].name)
        shape = case.manifest["targets"]["recorded"][stage]["shape"]
        letters = found[0].shape.split()
        assert len(letters) == len(shape), f"{stage}: {letters} for {shape}"
        for letter, length in zip(letters, shape, strict=True):
            number, symbol = re.fullmatch(r"(\d*)(.*)", letter).groups()
            if symbol == "D/2":
                assert length == size["D"] // 2
            elif symbol == "·":
                continue
            elif not symbol:
                assert length == int(number), f"{stage}: {letters} for {shape}"
            else:
                assert length == size.setdefault(symbol, length) * int(number or 1), f"{stage}: {letter} is {length}"
    assert len(seen) >= 38


@pytest.mark.slow
def test_readme_holds_a_table_that_its_command_prints() -> None:
    """The rows of `tools/parity_table.py`: sets, dtypes, cases and stages as they are today, and no placeholder."""
    text = (ROOT / "README.md").read_text("utf-8")
    assert not re.search(r"\b[A-Z]+_(TABLE|SECTION)\b", text)
    refs = store.list_cases(ROOT / "goldens")
    rows = re.findall(r"^\| ([\w-]+) \| (\w+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.M)
    assert {row[0] for row in rows} == {ref.set for ref in refs}
    for name, dtype, cases, stages, different in rows:
        own = [store.open_case(ref.folder, ref.name) for ref in refs if ref.set == name]
        targets = [case.variant("none" if dtype == "float64" else case.variants[-1]) for case in own]
        judged = sum(len(run.ids(t, STAGES, alone=True)) for t in targets)
        assert (int(cases), int(stages), int(different)) == (len(own), judged, 0), (name, dtype)
