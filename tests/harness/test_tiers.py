"""Tiers of the harness's plugin, with what is ours of them: a run says of each whether it passed, failed or was NOT RUN, and a
silent gap fails it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

TIERS = "-o", "stageparity_tiers=cpu\nslow: long\ngpu: needs a GPU\nfull\nbench"
TESTS = """
import pytest
from stageparity.plugin import not_run

def test_good(): pass

@pytest.mark.slow
def test_slow(): pass

@pytest.mark.gpu
def test_gpu(): pass

def test_without_data():
    not_run("no data here; get some")
"""


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """run(text of a test file, *arguments) -> result, on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("VIDI_REHEARSE", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def go(text: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(test_it=text)
        return pytester.runpytest_inprocess("-p", "stageparity.plugin", "-p", "tests.plugin.tiers", *TIERS, *arguments)

    return go


def test_a_default_run_is_the_cpu_tier(run):
    result = run(TESTS)
    assert result.ret == 0
    result.assert_outcomes(passed=1, skipped=1, deselected=2)
    result.stdout.fnmatch_lines(
        [
            "NOT RUN, no data here; get some:",
            "  test_it.py::test_without_data",
            "cpu: passed (1 passed, 1 NOT RUN)",
            "slow: NOT RUN (not selected; pytest -m slow)",
            "gpu: NOT RUN (no CUDA device)",
            "full: NOT RUN (no CUDA device)",
            "bench: NOT RUN (no such test among those collected)",
        ]
    )


def test_other_tiers_by_marker(run):
    result = run(TESTS, "-m", "not gpu")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["slow: passed (1 passed)"])


def test_a_test_named_by_its_id_runs_whatever_its_tier(run):
    result = run(TESTS, "test_it.py::test_slow")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["slow: passed (1 passed)"])


def test_a_gpu_run_without_gpu_fails(run):
    result = run(TESTS, "-m", "gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["gpu: NOT RUN (no CUDA device)", "FAILED: no test ran"])


def test_a_rehearsal_is_no_gpu_run(run, monkeypatch):
    monkeypatch.setenv("VIDI_REHEARSE", "1")
    result = run(TESTS, "-m", "gpu")
    assert result.ret == 1
    result.assert_outcomes(passed=1, deselected=3)
    result.stdout.fnmatch_lines(["FAILED: only a rehearsal: no CUDA device"])


def test_whatever_needs_a_gpu_beside_its_tier_is_not_run(run):
    """A benchmark with the marker of a tier that this machine lacks."""
    text = "import pytest\n@pytest.mark.gpu\n@pytest.mark.bench\ndef test_a(): pass\ndef test_b(): pass"
    result = run(text, "-m", "bench or not bench")
    result.stdout.fnmatch_lines(["cpu: passed (1 passed)", "bench: NOT RUN (no CUDA device)"])


def test_a_gpu_run_with_gpu_passes(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    result = run(TESTS, "-m", "gpu")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["gpu: passed (1 passed)"])


def test_markers_are_those_of_the_tiers(run):
    result = run(TESTS, "--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.slow: long", "@pytest.mark.gpu: needs a GPU"])
    assert "@pytest.mark.cpu" not in result.stdout.str()


@pytest.mark.parametrize("option", ["--rehearse", "--tiers-md=tiers.md"])
def test_an_option_of_tiers_without_tiers_is_an_error(run, option):
    result = run(TESTS, "-o", "stageparity_tiers=", option)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*declare them in the ini entry stageparity_tiers"])


def test_nothing_selected_is_no_success(run):
    assert run(TESTS, "-m", "bench").ret == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import pytest\ndef test_a(): pytest.skip('NOT RUN: out of habit')", "skipped outside not_run"),
        (
            "import pytest\n@pytest.mark.skip(reason='later')\ndef test_a(): pass",
            "skipped outside not_run: later",
        ),
        ("import pytest\npytest.importorskip('no_such_module')\ndef test_a(): pass", "skipped outside not_run"),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): assert False", "expected failures are not used here"),
        ("import pytest\n@pytest.mark.xfail\ndef test_a(): pass", "expected failures are not used here"),
    ],
    ids=["skip", "skip-marker", "importorskip", "xfail", "xpass"],
)
def test_other_ways_to_pass_over_a_test_fail_the_run(run, text, said):
    result = run(text + "\ndef test_b(): pass\n")
    assert result.ret != 0
    result.stdout.fnmatch_lines([f"*{said}*"])


def test_a_failure_fails_its_tier(run):
    result = run(TESTS.replace("def test_slow(): pass", "def test_slow(): assert 1 == 2"), "-m", "not gpu")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["cpu: passed (1 passed, 1 NOT RUN)", "slow: failed (0 passed, 1 failed)"])


def test_tiers_in_junit_and_markdown(run, pytester):
    run(TESTS, "--junitxml", "report.xml", "--tiers-md", "tiers.md")
    properties = ElementTree.parse(pytester.path / "report.xml").iterfind(".//testsuite/properties/property")
    told = {p.get("name"): p.get("value") for p in properties}
    assert told["tier.cpu"] == "cpu: passed (1 passed, 1 NOT RUN)"
    assert told["tier.gpu"] == "gpu: NOT RUN (no CUDA device)"
    text = Path(pytester.path / "tiers.md").read_text()
    assert "| cpu | passed | 1 | 0 | 1 |" in text
    assert "| gpu | NOT RUN: no CUDA device | 0 | 0 | 0 |" in text
    assert "- `test_it.py::test_without_data`" in text
