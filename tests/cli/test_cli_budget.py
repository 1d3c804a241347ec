"""`vidi budget`: what judges a stage, and that something does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vidi.cli import main
from vidi.parity.budgets import budgets
from vidi.parity.goldens import goldens_dir


def told(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    code = main(["budget", *words, "--json", str(tmp_path / "told.json")])
    return code, json.loads((tmp_path / "told.json").read_text("utf-8"))


def test_a_budget_is_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, (chained, isolated) = told(tmp_path, "layer.1.t2v", "--case", "small/base")
    assert code == 0
    assert (chained["pass"], isolated["pass"]) == ("chained", "isolated")
    for one in (chained, isolated):
        assert set(one["parts"]) == {"max", "rms", "row"}
        for metric, part in one["parts"].items():
            assert one["budgets"][metric] == pytest.approx(part["factor"] * part["baseline"])
        assert one["weakest_fault"]["margin"] > 1
        assert one["why"]
    assert (chained["bits"], isolated["bits"]) == (None, 0.02)
    assert "0 of 2 budgets in bfloat16 let a value err by more than one rms" in capsys.readouterr().out


def test_an_exact_stage_has_no_baseline(tmp_path: Path) -> None:
    _, found = told(tmp_path, "text.mask", "--case", "small/base")
    assert [(one["budgets"]["max_abs"], one["parts"]) for one in found] == [(0.0, {})]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "float32", "float16"])
def test_every_stage_is_judged_by_something(dtype: str) -> None:
    """An error as large as the values themselves is let through by no stage in all its passes."""
    found = list(budgets(goldens_dir(), None, dtype))
    judged = {(b.case, b.stage) for b in found if b.judges}
    assert len(judged) > 1000
    assert {(b.case, b.stage) for b in found} == judged


def test_a_budget_that_judges_nothing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    goldens = tmp_path / "goldens"
    (goldens / "small").mkdir(parents=True)
    for name in ("oneframe.json", "oneframe.h5"):
        shutil.copy(goldens_dir() / "small" / name, goldens / "small" / name)
    shutil.copytree(goldens_dir() / "measured", goldens / "measured")
    text = (goldens_dir() / "tolerances.toml").read_text("utf-8")
    wide = '[[gate.float32-cast.stage]]\nglob = "layer.1.t2v"\nwhy = "as wide as the values"\nmax = 1.5\n\n'
    first = text.index("[[gate.float32-cast.stage]]")
    (goldens / "tolerances.toml").write_text(text[:first] + wide + text[first:], "utf-8")
    assert main(["budget", "--goldens", str(goldens), "--dtype", "float32"]) == 1
    said = capsys.readouterr().out
    assert "judged by nothing else: small/oneframe layer.1.t2v, small/oneframe layer.1.t2v.cached\n" in said
    assert main(["budget", "logits", "--goldens", str(goldens), "--dtype", "float32"]) == 0


@pytest.mark.slow
def test_what_no_golden_has_is_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "layer.99.t2v"]) == 2
    assert "vidi budget: STAGE 'layer.99.t2v' matches none of the " in capsys.readouterr().err
