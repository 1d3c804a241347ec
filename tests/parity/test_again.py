"""Code or environment: the first wrong stage again in float64, with one thread, with fused kernels off."""

from __future__ import annotations

import pytest
import torch

from stageparity import environment
from vidi import cli
from vidi.bridge import norm


@pytest.mark.parametrize(
    ("ratio", "under", "words"),
    [
        (
            50.0,
            {"float64": 50.1, "one thread": 50.0, "plain": 49.9},
            "code: it stays whatever it runs on; in float64 50",
        ),
        (
            3.0,
            {"float64": 0.001, "one thread": 3.0, "plain": 3.0},
            "rounding: it falls with the precision; in float64 0.001",
        ),
        (9.0, {"float64": 9.0, "one thread": 0.2, "plain": 9.0}, "environment: with one thread it is right"),
        (
            9.0,
            {"float64": 0.1, "one thread": 9.0, "plain": 0.2},
            "environment: with reduced precision and fused kernels off",
        ),
        (1.2, {"float64": 0.9, "one thread": 1.1, "plain": 0.95}, "code: it stays"),  # within noise of its budget
        (9.0, {"float64": None, "one thread": 9.0, "plain": 9.0}, "with one thread 9 of budget, with reduced"),
        (9.0, {}, "not told: nothing else ran"),
    ],
)
def test_what_circumstances_tell(ratio: float, under: dict[str, float | None], words: str) -> None:
    said = environment.sentence(ratio, under)
    assert words in said
    assert ("NOT RUN in float64" in said) == (under.get("float64") is None)


@pytest.mark.slow
def test_a_bug_of_the_code_is_called_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    whole = norm.rms
    monkeypatch.setattr(norm, "rms", lambda x, *given: whole(x, *given) * 1.01)
    assert cli.main(["parity", "--case", "official/single", "--quiet", "--stage", "vision.norm"]) == 1
    assert "how sure: code: it stays whatever it runs on; in float64 " in capsys.readouterr().out


def test_a_switch_of_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = norm.rms

    def rms(x: torch.Tensor, *given: float) -> torch.Tensor:
        found = whole(x, *given)
        return found.bfloat16().to(found.dtype) if torch.backends.mkldnn.enabled else found

    monkeypatch.setattr(norm, "rms", rms)
    assert cli.main(["parity", "--case", "official/single", "--quiet", "--stage", "vision.norm"]) == 1
    assert "environment: with reduced precision and fused kernels off it is right" in capsys.readouterr().out
    assert torch.backends.mkldnn.enabled
