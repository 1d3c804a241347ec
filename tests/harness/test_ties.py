"""Tokens that a model decodes freely may part from the golden's where two tie within the noise, and nowhere else."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stageparity import tolerance
from stageparity.tolerance import MARGINS
from tools import margins
from vidi import generate
from vidi.cli import main
from vidi.decoder.decoder import Decoder
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

CASE, GREEDY = "official-7b/generate", [f"generate{v}.greedy_nocache.tokens" for v in ("", "_nowindow", "_short")]
HELD = tolerance.load(goldens_dir(), STAGES).margins
Change = Callable[[list[int]], list[int]]


def red(tmp_path: Path, dtype: str, case: str = CASE) -> list[str]:
    told = tmp_path / "told.json"
    main(["parity", "--case", case, "--dtype", dtype, "--chained", "--json", str(told), "--quiet"])
    (found,) = json.loads(told.read_text())["cases"]
    return sorted(row["stage"] for row in found["stages"] if not row["ok"])


def saying(patch: pytest.MonkeyPatch, change: Change) -> None:
    """What is decoded freely is changed; the logits stay."""
    original = generate.greedy

    def greedy(*given: Any, **options: Any) -> Any:
        found = original(*given, **options)
        return dataclasses.replace(found, tokens=[change(list(row)) for row in found.tokens])

    patch.setattr(generate, "greedy", greedy)


def at_a_near_tie(token: int) -> Change:
    """``token`` at step 7 of the variant without a window, where the runner-up lies 0.019 of the logits' rms below."""
    return lambda row: [*row[:7], token, *row[8:]] if row[0] == 122 else row


def test_the_margins_are_the_oracles() -> None:
    assert (goldens_dir() / MARGINS).read_text() == margins.text()


RUNNER_UP = min(HELD[CASE][GREEDY[1]][0][7].items(), key=lambda item: item[1])


@pytest.mark.parametrize(
    ("dtype", "change", "wanted"),
    [
        pytest.param("float16", at_a_near_tie(RUNNER_UP[0]), [], id="the runner-up at a near tie"),
        pytest.param("float32", at_a_near_tie(RUNNER_UP[0]), [GREEDY[1]], id="the same where the noise is smaller"),
        pytest.param("float16", at_a_near_tie(5), [GREEDY[1]], id="a token that comes nowhere close there"),
        # Along the recorded logits' own text two tokens tie at this step; along what is decoded they lie 0.75 apart.
        pytest.param("float16", lambda row: [*row[:2], row[1], *row[3:]], GREEDY, id="the second token again"),
    ],
)
def test_another_token(
    dtype: str, change: Change, wanted: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saying(monkeypatch, change)
    assert red(tmp_path, dtype) == wanted


@pytest.mark.parametrize(("case", "tokens"), [(CASE, GREEDY), ("small/decode", ["decode.tokens"])])
def test_wrong_logits_excuse_no_token(
    case: str, tokens: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """They are as far off as any two of them lie apart: an error beyond its budget is no noise."""
    own = Decoder.finished
    monkeypatch.setattr(Decoder, "finished", lambda self, *given: own(self, *given).roll(1, -1))
    assert set(tokens) <= set(red(tmp_path, "float32", case))


@pytest.mark.parametrize("text", ['{"a/b": 1}', '{"a/b": {"c": [[{"x": 1}]]}}', '{"a/b": {"c": [[{"1": "y"}]]}}'])
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / MARGINS).write_text(text)
    with pytest.raises(ValueError, match=r"margins\.json: a/b: rows of steps of tokens and numbers"):
        tolerance.read_margins(tmp_path / MARGINS)
