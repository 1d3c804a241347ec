"""The pytest plugin: what its failures say, what a project may declare, and that it is nothing to those that do not use it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from stageparity import run
from stageparity.plugin import Held, Task
from stageparity.result import EXACT, Result
from stageparity.run import CaseRun, Row, Run
from stageparity.stage import Stages
from stageparity.store import CaseRef
from stageparity.subject import Subject
from stageparity.tolerance import Tolerances
from tests.harness.toy_project import Project

ROOT = Path(__file__).parents[2]


def failure(result: pytest.RunResult, stage: str) -> list[str]:
    """What the test of a stage said."""
    head = next(
        n for n, line in enumerate(result.outlines) if line.strip("_ ") == f"test_stage[base-{stage}-numpy-float64]"
    )
    end = next(n for n, line in enumerate(result.outlines) if n > head and line.startswith("rerun: "))
    return result.outlines[head + 1 : end + 1]


def broken(toy: Project, old: str, new: str) -> pytest.RunResult:
    """The toy's tests with a bug in its model."""
    toy.python("toy.make_goldens")
    toy.edit("model.py", old, new)
    result = toy.pytest("toy", "-q")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    return result


# ---- what a failure says ---------------------------------------------------------------------------------------------------


def test_a_wrong_stage(toy: Project) -> None:
    result = broken(toy, "return x_BTD + mix_BTNH.reshape(x_BTD.shape)", "return x_BTD - mix_BTNH.reshape(x_BTD.shape)")
    said = failure(result, "layer.0.output")
    assert said[0] == "its own error: fed its golden inputs alone, it differs"
    assert said[1].startswith("local ")
    assert said[1].endswith(", inherited 0×")
    assert said[2] == "alone, forced, chained: layer.0.output: DIFFERENT under float64-none"
    assert said[-2:] == [
        "looks like: join.alone",
        "rerun: python -m pytest 'toy/test_parity.py::test_stage[base-layer.0.output-numpy-float64]'",
    ]
    assert any("<-- over" in line for line in said)
    assert any(line.startswith("  budget: the same mathematics in double precision") for line in said)


def test_a_wrong_caller_is_named_by_its_file(toy: Project) -> None:
    result = broken(toy, "self.read(q_BTNH, y_BTD, keep_BT)", "self.read(q_BTNH[:, ::-1], y_BTD, keep_BT)")
    said = failure(result, "layer.0.mix")
    assert said[0] == (
        "an error of what feeds it or takes its result, toy/model.py: fed goldens in the run it differs and alone it does not"
    )
    assert said[2] == "forced, chained: layer.0.mix: DIFFERENT under float64-none"
    assert said[-2] == "looks like: layer.queries_turned"


def test_an_inherited_error_is_called_so(toy: Project) -> None:
    """And looks like no fault: those of its own code show when it is fed alone."""
    said = failure(broken(toy, "+ 1e-6)", "+ 1e-5)"), "layer.0.mix")
    assert said[0] == "inherited: fed its golden inputs, it is within its budget"
    assert said[2] == "chained: layer.0.mix: DIFFERENT under float64-none"
    assert not [line for line in said if line.startswith("looks like")]


def test_comparing_no_value_is_no_pass() -> None:
    empty = Row("logits", Result("logits", True, EXACT))
    ref = CaseRef(Path("small"), "base")
    told = Run((CaseRun("base", "small", "none", (empty,)),), "float64")
    held = Held("numpy", Subject, ["float64"], [ref], Tolerances(Stages((), {}), {}, {}))
    task = Task(held, ref, "float64", ("logits",), [told])
    assert task.failure("logits", "test_it.py") == "logits of small/base: nothing was compared"


def test_a_rerun_without_pytest_where_a_project_has_a_command(toy: Project) -> None:
    toy.edit("conftest.py", "faults=FAULTS", 'command=("toy", "check"), options=("--fast",)')
    result = broken(toy, "return x_BTD + mix_BTNH", "return x_BTD - mix_BTNH")
    result.stdout.fnmatch_lines(["   or: toy check --case small/base --stage layer.0.output --dtype float64 --fast"])


def test_a_missing_tensor_and_a_missing_budget(toy: Project) -> None:
    toy.python("toy.make_goldens")
    toy.edit("model.py", 'tap("embed", embed(ids_BT, self.table_UD))', "embed(ids_BT, self.table_UD)")
    toy.edit("goldens/tolerances.toml", "[gate.float32-none]", "[gate.float16-none]")
    result = toy.pytest("toy", "-q")
    result.stdout.fnmatch_lines(["*missing: the run produced no tensor of this id"])
    result.stdout.fnmatch_lines(["logits of small/base was not judged: no gate named 'float32-none'*"])


@pytest.mark.slow
def test_a_run_that_breaks_is_not_tried_again(toy: Project) -> None:
    toy.python("toy.make_goldens")
    toy.edit(
        "stages.py",
        "        built.forward(",
        "        open('ran', 'a').write('.')\n        1 / 0\n        built.forward(",
    )
    result = toy.pytest("toy", "-q", "-W", "ignore")
    assert result.parseoutcomes() == {"failed": 24, "errors": 2}
    result.stdout.fnmatch_lines(["E*ZeroDivisionError: division by zero"])
    result.stdout.fnmatch_lines(["E*RuntimeError: small/base in float64: ZeroDivisionError: division by zero"])
    assert (toy.pytester.path / "ran").read_text() == ".."  # once in each dtype


# ---- what a project may declare ----------------------------------------------------------------------------------------------


def test_marks_and_prefix(toy: Project) -> None:
    toy.python("toy.make_goldens")
    toy.edit("conftest.py", "from pathlib", "import pytest\nfrom pathlib")
    toy.edit("conftest.py", "faults=FAULTS", 'prefix="small.", marks={"base": [pytest.mark.long]}')
    toy.edit("conftest.py", '["float64", "float32"]', '["float64"]')
    result = toy.pytest("toy", "-o", "markers=long", "-m", "long", "-v")
    assert result.parseoutcomes() == {"passed": 13}
    result.stdout.fnmatch_lines(["*test_stage?small.base-logits-numpy-float64? PASSED*"])
    assert toy.pytest("toy", "-o", "markers=long", "-m", "not long").parseoutcomes() == {"deselected": 13}


def test_a_stage_that_falls_out_of_the_pass_alone_is_seen(toy: Project) -> None:
    toy.python("toy.make_goldens")
    toy.edit("conftest.py", "faults=FAULTS", 'not_alone="said"')
    toy.edit("stages.py", ", run=lambda s: model.logits(*s.inputs, s.model.table_UD)", "")
    result = toy.pytest("toy", "-q")
    assert result.parseoutcomes() == {"passed": 24, "failed": 2}
    result.stdout.fnmatch_lines(["logits: not run alone"])


def test_a_stage_that_nobody_judges_is_seen(toy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is promised, and the run leaves it out of its rows."""
    toy.python("toy.make_goldens")
    promised = run.promised
    monkeypatch.setattr(run, "promised", lambda *given: [*promised(*given), "layer.2.norm"])
    result = toy.pytest("toy", "-q")
    result.stdout.fnmatch_lines(["layer.2.norm of small/base was not judged: the run has no such stage"])
    assert result.parseoutcomes() == {"passed": 24, "failed": 4}


@pytest.mark.parametrize(
    ("conftest", "said"),
    [
        ("", "no golden case is held against anything"),
        ("def pytest_stageparity_subjects(): return []", "no golden case is held against anything"),
    ],
    ids=["no hook", "nothing"],
)
def test_nothing_to_compare_is_no_pass(toy: Project, conftest: str, said: str) -> None:
    (toy.toy / "conftest.py").write_text(conftest, "utf-8")
    result = toy.pytest("toy")
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*test_parity.py*{said}*pytest_stageparity_subjects in a conftest.py above it"])


def test_a_conftest_speaks_for_what_lies_below_it(toy: Project) -> None:
    toy.python("toy.make_goldens")
    other = toy.pytester.path / "other"
    other.mkdir()
    (other / "test_other.py").write_text("from stageparity.plugin import test_stage\n", "utf-8")
    result = toy.pytest("toy", "other")
    result.stdout.fnmatch_lines(["*other/test_other.py::test_stage: no golden case is held*"])


def test_tests_of_ones_own_read_the_same_run(toy: Project) -> None:
    toy.python("toy.make_goldens")
    (toy.toy / "test_mine.py").write_text(
        "def test_quick(parity_task, parity_run):\n"
        "    assert parity_run is parity_task.run.cases[0] and parity_run.name == 'small/base'\n"
        "def test_exact(parity_task, parity_stage):\n"
        "    assert parity_stage in parity_task.stages\n"
        "def test_alone_in_its_own_dtype(parity_task, parity_run):\n"
        "    (row,) = [row for row in parity_run.rows if row.stage == 'logits']\n"
        "    assert (row.alone.errors['max'] > 1e-9) == (parity_task.dtype == 'float32')\n",
        "utf-8",
    )
    toy.edit("stages.py", "        built.forward(", "        print(file=open('ran', 'a'))\n        built.forward(")
    result = toy.pytest("toy", "-W", "ignore")
    assert result.parseoutcomes() == {"passed": 26 + 2 + 24 + 2}
    assert (toy.pytester.path / "ran").read_text() == "\n" * 4


# ---- nothing to others -------------------------------------------------------------------------------------------------------


def test_the_package_announces_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"stageparity": "stageparity.plugin"}


@pytest.fixture
def announced(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project that has the package installed and does not use it, with pytest's plugins as they are found."""
    site = pytester.mkdir("site")
    info = site / "stageparity_alone-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stageparity-alone\nVersion: 1\n", "utf-8")
    (info / "entry_points.txt").write_text("[pytest11]\nstageparity = stageparity.plugin\n", "utf-8")
    pytester.makeini("[pytest]\nfilterwarnings = error\n")
    pytester.makepyfile(test_it="def test_a(): pass\n@__import__('unittest').skip('mine')\ndef test_b(): pass\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}:{ROOT}")
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", raising=False)
    return pytester


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["-p", "no:stageparity"]], ids=["unused", "off"])
def test_a_project_that_does_not_use_it(announced: pytest.Pytester, given: list[str]) -> None:
    result = announced.runpytest_subprocess(*given, "-v")
    assert (result.ret, result.parseoutcomes()) == (0, {"passed": 1, "skipped": 1})
    assert "tiers" not in result.stdout.str()


def test_it_is_found_by_its_entry_point(announced: pytest.Pytester) -> None:
    assert "--tiers-md" in announced.runpytest_subprocess("--help").stdout.str()
    assert "--tiers-md" not in announced.runpytest_subprocess("-p", "no:stageparity", "--help").stdout.str()


def test_loading_it_loads_nothing_that_costs_time() -> None:
    script = (
        "import sys, pytest, _pytest.junitxml; before = set(sys.modules); import stageparity.plugin;"
        "print(sorted(name for name in set(sys.modules) - before if '.' not in name))"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert told.stdout.strip() == "['stageparity']"
