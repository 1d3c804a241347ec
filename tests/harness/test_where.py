"""`tools/where.py` finds stage, golden, test and fault of a line, and says so where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import where

ROOT = Path(__file__).parents[2]


def line_of(file: str, text: str) -> str:
    """FILE:LINE of the one line that holds the text."""
    found = [n for n, line in enumerate((ROOT / file).read_text("utf-8").splitlines(), 1) if text in line]
    assert len(found) == 1
    return f"{file}:{found[0]}"


def test_a_line_of_a_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert where.main([line_of("vidi/bridge/fold.py", "def pad(")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "code    vidi.bridge.fold.pad"
    assert [line.split()[1] for line in told if line.startswith(("stage", "wiring"))] == ["vision.pad"]
    assert "  tests   python -m pytest tests/parity -k 'vision.pad'" in told
    assert "official/single" in next(line for line in told if line.startswith("  goldens"))
    assert any(line.startswith("fault   bridge.pad_top_left: ") for line in told)
    assert "unit    tests/unit/bridge/test_bridge_stages.py" in told
    file, number = next(line for line in told if line.startswith("stage")).rpartition(": ")[2].split(":")
    assert '"vision.pad"' in (ROOT / file).read_text("utf-8").splitlines()[int(number) - 1]


def test_a_line_between_stages_is_wiring_of_the_one_that_it_hands_over() -> None:
    told = list(where.told(line_of("vidi/bridge/visual.py", "bridge.image_norm(x)")))
    assert [line.split()[:2] for line in told if line.startswith(("stage", "wiring"))] == [["wiring", "vision.norm{g}"]]


def test_a_stage_by_its_id_finds_its_own_code() -> None:
    told = list(where.told("layer.2.t2v"))
    assert "  again   vidi parity --stage 'layer.2.t2v'" in told
    assert any(line.startswith("fault   attention.no_softcap_cross") for line in told)


@pytest.mark.parametrize("place", ["vidi/device.py:3", "vidi/none.py:3", "bridge.fold.pat", "tools/where.py",
                                   "docs/video.md:1", "vidi/cli.py:x", "vidi/../x.py:\x1b", "/", "."])  # fmt: skip
def test_what_belongs_to_no_stage_is_said(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert where.main([place]) == 2
    err = capsys.readouterr().err
    assert err.startswith("where.py: ")
    assert "unexpected" not in err
    assert err.removesuffix("\n").isprintable()
