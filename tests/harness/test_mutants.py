"""The stored result of the mutation tool holds, and the tool itself makes edits that count."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.studies import LEDGER, ROOT, edits, mutants

STORED = json.loads((ROOT / "goldens" / LEDGER["mutants"]).read_text("utf-8"))


def test_stored_result_reaches_its_goal() -> None:
    assert STORED["total"] >= 400
    assert STORED["killed"] + len(STORED["survivors"]) == STORED["total"]
    assert mutants.problems(STORED, ROOT) == []
    assert [key for key, why in mutants.reasons().items() if len(why) < 20] == []
    assert set(mutants.reasons()) == {survivor["key"] for survivor in STORED["survivors"]}


def test_a_survivor_without_a_reason_or_too_many_are_problems() -> None:
    alive = [{"key": "vidi/model.py f [swap] a -> b", "line": 1}]
    said = mutants.problems({"total": 400, "killed": 379, "survivors": alive}, ROOT)
    assert said == [
        "a survivor without a reason in survivors.toml: vidi/model.py f [swap] a -> b",
        "379 of 400 killed, 95% are asked",
    ]


def test_every_edited_file_is_there_and_none_is_for_a_gpu_alone() -> None:
    assert len(edits.SOURCES) > 20
    assert all((ROOT / file).is_file() for file in edits.SOURCES)
    assert not any(file.endswith(("flash.py", "flex.py")) or "/fast/" in file for file in edits.SOURCES)
    assert all((ROOT / path).exists() for paths in mutants.UNIT_TESTS.values() for path in paths)


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
    """One sample, two calls: the second reads the log; an edit of arithmetic is killed by a golden. The tool's own start shows
    that sources without any edit are not."""
    log = tmp_path / "mutants.jsonl"
    command = [
        sys.executable,
        "tools/study.py",
        "mutants",
        "--count",
        "6",
        "--seed",
        "2",
        "--no-unit",
        "--log",
        str(log),
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "0 in" in first.stderr
    lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    assert lines
    assert all(line["found"] for line in lines)
    assert sum(line["found"] != mutants.MISSED for line in lines) >= 4
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f"{len(lines)} in" in second.stderr
