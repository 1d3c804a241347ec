"""The stored result of the mutation tool holds, and the tool itself makes edits that count."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.not_run import not_run
from tools import edits, mutate

ROOT = Path(__file__).resolve().parents[2]
STORED = json.loads((ROOT / "goldens" / "mutants.json").read_text("utf-8"))


def test_stored_result_reaches_its_goal() -> None:
    assert STORED["total"] >= 400
    assert STORED["killed"] >= 0.95 * STORED["total"]
    assert STORED["killed"] + len(STORED["survivors"]) == STORED["total"]
    assert [s["key"] for s in STORED["survivors"] if len(s["why"]) < 20] == []


def test_stored_result_is_of_these_sources() -> None:
    assert set(STORED["sources"]) == set(edits.SOURCES)
    changed = [file for file, sha in STORED["sources"].items() if mutate._sha(file) != sha]
    if changed:
        not_run(f"{', '.join(changed)} changed since the mutants ran: python tools/mutate.py --accept")


@pytest.mark.slow
def test_sample_is_drawn_by_seed() -> None:
    first, again = edits.sample(20, 3), edits.sample(20, 3)
    assert [m.spot for m, _ in first] == [m.spot for m, _ in again]
    assert [m.spot for m, _ in first] != [m.spot for m, _ in edits.sample(20, 4)]
    assert len({source for _, source in first}) == 20


@pytest.mark.slow
def test_edits_leave_words_alone() -> None:
    """No docstring, annotation, import, `__all__`, raised error or message differs in any mutant of a sample."""
    for mutant, source in edits.sample(60, 5):
        before = ast.parse((ROOT / mutant.file).read_text("utf-8"))
        assert _words(before) == _words(ast.parse(source)) or mutant.kind in (
            "condition",
            "statement",
            "call",
            "operand",
        )
        assert ast.unparse(before) != source


def _words(tree: ast.AST) -> list[str]:
    kept = (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr)
    found = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, kept)]
    found += [ast.unparse(node.annotation) for node in ast.walk(tree) if isinstance(node, ast.arg) and node.annotation]
    return sorted(found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a + b", {"a - b", "a"}),
        ("a < b", {"a <= b", "a > b"}),
        ("f(x, dim=1)", {"f(x)", "f(x, dim=0)", "f(x, dim=2)"}),
        ("not a", {"a"}),
        ("x[1:]", {"x[:]", "x[1 + 1:]"}),
        ("x.sum(0)", {"x.mean(0)", "x"}),
        ("a if b else c", {"a if not b else c", "a", "c"}),
    ],
)
def test_kinds_of_edit(before: str, after: set[str]) -> None:
    made = set()
    tree = ast.parse(f"y = {before}")
    for path, node, _ in edits.walk(tree):
        for index, _ in enumerate(edits.edits(node)):
            found = edits.made("x.py", tree, path, index, "")
            if found:
                made.add(found[1].removeprefix("y = "))
    assert after <= made


@pytest.mark.slow
def test_a_mutant_dies_and_is_not_run_twice(tmp_path: Path) -> None:
    """One sample, two calls: the second reads the log; an edit of arithmetic is killed by a golden."""
    log = tmp_path / "mutants.jsonl"
    command = [sys.executable, "tools/mutate.py", "--count", "6", "--seed", "2", "--no-unit", "--log", str(log)]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "0 in" in first.stderr
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert lines
    assert all(line["verdict"] for line in lines)
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f"{len(lines)} in" in second.stderr
