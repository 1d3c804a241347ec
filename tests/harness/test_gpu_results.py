"""What a GPU run leaves is stored only when it is whole and green."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools.studies import gpu

TEST = '<testcase classname="tests.gpu.test_fast" name="{}">{}</testcase>'
ERROR = '<properties><property name="rms over budget" value="{}"/></properties>'


def junit(path: Path, *tests: str) -> str:
    path.write_text(f"<testsuites><testsuite>{''.join(tests)}</testsuite></testsuites>", "utf-8")
    return str(path)


def test_a_whole_run_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "num_tests", lambda: 3)
    tests = [
        TEST.format("a", ERROR.format(0.25)),
        TEST.format("b", ERROR.format("nan")),
        TEST.format("c", "<skipped/>"),
    ]
    out, halves = tmp_path / "out.json", (junit(tmp_path / "x", *tests[:1]), junit(tmp_path / "y", *tests[1:]))
    assert gpu.main([*halves, "--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    held = {"passed": 2, "failed": [], "not_run": ["c"], "worst_error_over_budget": 0.25}
    assert stored["files"] == {"tests.gpu.test_fast": held}
    assert "tests/gpu/test_fast.py" in stored["measured_on"]["code"]


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ([TEST.format("a", ""), TEST.format("b", "<failure/>")], "1 tests failed, the first is tests.gpu.test_fast::b"),
        ([TEST.format("a", "")], "1 tests ran and there are 2: all of them are needed"),
        ([TEST.format("a", "")] * 2, "tests.gpu.test_fast::a ran twice"),
        ([], "0 tests ran and there are 2"),
    ],
)
def test_what_is_not_whole_and_green_is_refused(
    tmp_path: Path, monkeypatch, capsys, tests: list[str], said: str
) -> None:
    monkeypatch.setattr(gpu, "num_tests", lambda: 2)
    out = tmp_path / "out.json"
    assert gpu.main([junit(tmp_path / "x.xml", *tests), "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.slow
def test_the_tests_of_a_gpu_are_counted_by_collecting_them() -> None:
    assert gpu.num_tests() > 400
