"""The stored result of the mutation tool holds, and the tool itself makes edits that count."""

from __future__ import annotations

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stageparity import evidence
from tools import study
from tools.studies import LEDGER, ROOT, edits, mutants, seen_by, trial
from tools.studies.log import Log

STORED = json.loads((ROOT / "goldens" / LEDGER["mutants"]).read_text("utf-8"))


def test_stored_result_reaches_its_goal() -> None:
    assert STORED["total"] >= 600
    assert STORED["killed"] + len(STORED["survivors"]) == STORED["total"]
    assert mutants.problems(STORED, ROOT) == []
    assert [key for key, why in mutants.reasons().items() if len(why) < 20] == []


def test_no_reason_is_left_for_an_edit_that_nobody_can_make() -> None:
    known = set(mutants.reasons())
    today = {m.key for file in {key.split()[0] for key in known} for m, _ in edits.collect(file)}
    assert known - today - {survivor["key"] for survivor in STORED["survivors"]} == set()


def test_a_survivor_without_a_reason_or_too_many_are_problems() -> None:
    alive = [{"key": "vidi/model.py f [swap] a -> b", "line": 1}]
    said = mutants.problems({"total": 400, "killed": 379, "survivors": alive}, ROOT)
    assert said == [
        "a survivor without a reason in survivors.toml: vidi/model.py f [swap] a -> b",
        "379 of 400 killed, 97% are asked",
    ]


def test_every_edited_file_is_there_and_none_is_for_a_gpu_alone() -> None:
    assert len(edits.SOURCES) > 50
    assert all((ROOT / file).is_file() for file in edits.SOURCES)
    assert not any(file.endswith(("flash.py", "flex.py")) or "/kernels/" in file for file in edits.SOURCES)


def test_every_file_meets_tests_that_are_there_and_no_pattern_is_dead() -> None:
    met = {seen_by.tests_of(file) for file in edits.SOURCES}
    assert met == set(seen_by.TESTS.values())
    assert {trial.runs_of(file) for file in edits.SOURCES} == set(trial.RUNS.values())
    assert [path for tests in met for path in tests if not mutants._files(path)] == []


# ---- the sample ---------------------------------------------------------------------------------------------------------

BEFORE = """
def f(x):
    return x + 1 if x > 1 else g(x, 1)
"""
ELSEWHERE = """
# a line more
LIMIT = 1 + 1

def g(x, y):
    return x + 1 if x > 1 else y
"""


def test_a_change_elsewhere_moves_no_rank() -> None:
    alone = [m for m, _ in edits.collect("x.py", BEFORE)]
    beside = [m for m, _ in edits.collect("x.py", ELSEWHERE + BEFORE) if m.place == "f"]
    assert len(alone) > 10
    assert [m.line for m in alone] != [m.line for m in beside]
    assert [edits.rank(m, 1) for m in alone] == [edits.rank(m, 1) for m in beside]
    assert [edits.rank(m, 2) for m in alone] != [edits.rank(m, 1) for m in alone]


def test_equal_edits_of_a_function_are_told_apart() -> None:
    keys = [m.key for m, _ in edits.collect("x.py", "def f():\n    g(1)\n    h(1)\n") if m.after == "2"]
    assert keys == ["x.py f [constant] 1 -> 2", "x.py f [constant] 1 -> 2 #2"]


def test_a_file_more_only_moves_up_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(count: int, *files: str) -> list[str]:
        monkeypatch.setattr(edits, "SOURCES", files)
        return [m.key for m, _ in edits.sample(count, 3)]

    before, after = drawn(30, "vidi/loss.py"), drawn(60, "vidi/cache.py", "vidi/loss.py")
    kept = [key for key in after if key.startswith("vidi/loss.py")]
    assert 20 < len(kept) < 60
    assert kept[:30] == before[: len(kept)]
    assert drawn(12, "vidi/loss.py") == before[:12]
    assert len(set(after)) == 60


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


@pytest.mark.parametrize(
    "source",
    [
        "KEY_CHUNK = 2 * 4096",
        "def f(*, stream_chunk: int = 32768): ...",
        "self.frame_batch = 4",
        "Noise = Callable[[int], None]",
        "def _captured(self):\n    return 1 + 2",
        "if x.is_cuda:\n    y = 1",
        "self.graph = 1 if x.is_cuda else None",
        "def tiny(cls):\n    return cls(width=16 + 1)",
    ],
)
def test_what_changes_no_result_on_a_cpu_is_left_alone(source: str) -> None:
    assert edits.collect("x.py", source) == []


def test_arguments_that_change_no_value_are_left_alone() -> None:
    made = {m.after for m, _ in edits.collect("x.py", "zip(a, strict=True)\nf(device=x, dtype=y)\nz.contiguous()")}
    assert made == {"pass", "f(device=x)"}
    swapped = {
        m.after for m, _ in edits.collect("x.py", "f(max(a, b), g(a, b), x.transpose(a, b))") if m.kind == "swap"
    }
    assert swapped == {"g(b, a)", "f(g(a, b), max(a, b), x.transpose(a, b))"}


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
            found = edits.made(tree, (path, index))
            if found:
                made.add(found.removeprefix("y = "))
    assert after <= made


# ---- the trial ----------------------------------------------------------------------------------------------------------


def test_a_new_test_calls_back_who_had_faced_the_old_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown, lived = (edits.Mutant("vidi/loss.py", 1, "swap", "f", text, "") for text in "ab")
    log = Log(tmp_path / "log", mutants._before_tests(ROOT / "goldens"))
    assert mutants._waits(shown, log, tests=False)
    log.add(shown.key, "goldens: x")
    log.add(lived.key, mutants.MISSED)
    assert not mutants._waits(lived, log, tests=False)
    assert mutants._waits(lived, log, tests=True)
    log.add(mutants._faced(lived), "")
    assert [mutants._waits(m, log, tests=True) for m in (shown, lived)] == [False, False]
    monkeypatch.setattr(mutants, "_tests_today", lambda tests: "other tests")
    assert [mutants._waits(m, log, tests=True) for m in (shown, lived)] == [False, True]


def test_deaths_are_counted_by_what_came_first() -> None:
    said = {"a": "goldens: x", "b": "tests: y", "c": "import: z", "d": "time: no end", "e": ""}
    all_five = [edits.Mutant("vidi/loss.py", 1, "swap", "f", name, "") for name in said]
    found = mutants.summary(all_five, {m.key: said[m.before] for m in all_five})
    assert found["killed_by"] == {"goldens": 1, "tests": 1, "import": 1, "time": 1}
    assert (found["total"], found["killed"], [s["before"] for s in found["survivors"]]) == (5, 4, ["e"])
    assert found["files"] == {"vidi/loss.py": {"total": 5, "killed": 4}}


def test_counts_by_file_are_kept_beside_what_is_written_beside_them(tmp_path: Path) -> None:
    counted, raw = {"vidi/loss.py": {"total": 5, "killed": 4}}, {Path("a.h5"): b"1"}
    module: Any = SimpleNamespace(
        basis=lambda goldens: evidence.Basis({}), measure=lambda *_: {"files": counted, "beside": raw, "device": "here"}
    )
    document, files = study._measured(module, argparse.Namespace(goldens=tmp_path, study="any"), None)
    assert (document["files"], "beside" in document, files) == (counted, False, raw)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = 1", "? ''"),
        ("1 / 0", "'import: ZeroDivisionError in <module>: division by zero'"),
        ("while True: pass", "'time: no end within 1 s'"),
        ("import os; os.kill(os.getpid(), 11)", "'goldens: the process crashed'"),
    ],
)
def test_how_a_child_ends(source: str, said: str) -> None:
    script = f"""
from tools.studies import edits, trial
trial.LIMIT = 1
child = trial.Child(edits.Mutant("vidi/tap.py", 1, "", "", "", ""), {source!r}, None, runs=False, tests=False)
while not child.ended():
    pass
print("?" * child.missed, repr(child.verdict))
assert child.seconds < 3, "of processor time"
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == (said, 0), done.stderr


@pytest.mark.slow
def test_a_mutant_dies_and_is_not_run_twice(tmp_path: Path) -> None:
    """One sample, two calls: the second reads the log; an edit of arithmetic is killed by a golden. A death counts only where
    sources without any edit live, which the log says too."""
    log = tmp_path / "mutants.jsonl"
    command = [
        sys.executable,
        "tools/study.py",
        "mutants",
        "--count",
        "100",
        "--seed",
        "2",
        "--only",
        "vidi/[bdt]*",
        "--no-tests",
        "--log",
        str(log),
    ]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "0 in" in first.stderr
    entered = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    lines = [line for line in entered if not line["key"].startswith("unharmed")]
    assert 1 <= len(entered) - len(lines) <= len(trial.RUNS)
    assert len(lines) >= 8
    assert all(line["found"] for line in lines)
    assert sum(line["found"].startswith("goldens") for line in lines) >= 4
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert f"{len(lines)} in" in second.stderr
