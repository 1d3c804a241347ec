"""Two by two: what follows the environment, what the code, what only both together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import attribute
from tools.attribute import Cell, read, verdict

KEYS = [("official/single", stage) for stage in ("vision.tower", "layer.0.output", "logits")]


def cells(*ratios: tuple[float, float, float]) -> list[Cell]:
    """Cells of environments A, B at revisions old, new, in the order that a run makes them."""
    places = [("A", "old"), ("A", "new"), ("B", "old"), ("B", "new")]
    torch = {"A": "2.13.0", "B": "2.14.1"}
    return [
        Cell(env, rev, dict(zip(KEYS, row, strict=True)), {"torch": torch[env], "numpy": "2"})
        for (env, rev), row in zip(places, ratios, strict=True)
    ]


GOOD = (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    ("ratios", "line"),
    [
        (
            (GOOD, GOOD, (0.1, 2, 3), (0.1, 2, 3)),
            "follows the environment: layer.0.output of official/single and 1 more",
        ),
        ((GOOD, (0.1, 2, 3), GOOD, (0.1, 2, 3)), "follows the code: layer.0.output of official/single and 1 more"),
        ((GOOD, GOOD, GOOD, (9, 0.2, 0.3)), "follows both together: vision.tower of official/single (A old: 0.1"),
        (((5, 1, 1),) * 4, "differs everywhere: vision.tower of official/single"),
        ((GOOD,) * 4, "equal in all 4 cells; nearest to its budget: logits of official/single, 0.3"),
    ],
)
def test_what_a_difference_follows(ratios: tuple[tuple[float, float, float], ...], line: str) -> None:
    lines = verdict(cells(*ratios))
    assert lines[0] == "the environments differ in torch 2.13.0 against 2.14.1"
    assert lines[1].startswith(line)
    assert len(lines) == 2


def test_two_revisions_in_one_environment() -> None:
    lines = verdict([c for c in cells(GOOD, (0.1, 2, 0.3), GOOD, GOOD) if c.env == "A"])
    assert lines[0].startswith("follows the code: layer.0.output")


def test_stages_that_one_cell_lacks_are_said() -> None:
    found = cells(GOOD, GOOD, GOOD, GOOD)
    lacking = Cell("B", "new", {key: 0.1 for key in KEYS[:2]}, found[3].libraries)
    assert verdict([*found[:3], lacking])[-1] == "not compared in every cell: 1 stages, first logits of official/single"


def test_a_cell_is_read_from_the_json_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    from vidi import cli

    cli.main(["parity", "--case", "official/single", "--stage", "text.*", "--json", "-", "--quiet"])
    found = read(capsys.readouterr().out, "A", "old")
    assert set(found.ratios) == {("official/single", "text.embeds"), ("official/single", "text.mask")}
    assert "torch" in found.libraries
    text = json.dumps({"cases": [], "fingerprint": {}})
    assert read(text, "A", "old").ratios == {}


@pytest.mark.parametrize("argv", [[], ["--env", "a"], ["--env", "a", "--env", "b", "--env", "c"]])
def test_fewer_than_two_cells_are_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="nothing else tells one cause from the other"):
        attribute.run(argv)


def test_what_a_command_line_may_not_hold_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two = ["--env", "nowhere", "--env", "nowhere/else"]
    with pytest.raises(ValueError, match="there is no folder"):
        attribute.run([*two, "--json", str(tmp_path / "none" / "x.json")])
    with pytest.raises(SystemExit):
        attribute.run([*two, "--sage", "logits"])
    assert "did you mean --stage?" in capsys.readouterr().err


def test_an_environment_that_is_none() -> None:
    with pytest.raises(ValueError, match="the path of an interpreter is needed"):
        attribute.run(["--env", "/no/such/python", "--env", "/nor/this"])
