"""Wrong casts that decoding alone has, in bfloat16: below the noise of whole texts, seen where a step is fed with goldens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from stageparity import run, store, tolerance
from tests.parity.runs import GOLDENS
from vidi.attention import eager
from vidi.decoder.decoder import Decoder
from vidi.decoder.norm import GemmaNorm
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject


def _in_steps(original: Callable[..., Any], wrong: Callable[..., Any]) -> Callable[..., Any]:
    """As ever for whole texts, otherwise for one token."""

    def either(self: Any, x: torch.Tensor, *given: Any) -> Any:
        return (wrong if x.shape[1] == 1 else original)(self, x, *given)

    return either


def _attend(original: Callable[..., Any], cross: bool, **change: Any) -> Callable[..., Any]:
    def attend(call: Any) -> Any:
        mine = call.q_BTNH.shape[1] == 1 and (call.q_pos_BT is None) == cross
        return original(dataclasses.replace(call, **change) if mine else call)

    return attend


def _narrow_norm(self: GemmaNorm, x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def _wide_root(self: Decoder, x: torch.Tensor) -> torch.Tensor:
    return (x.float() * math.sqrt(self.config.hidden_size)).to(x.dtype)


def _wide_head(self: Decoder, x: torch.Tensor, *given: Any) -> torch.Tensor:
    return self.finished(x.float() @ self.embed.weight.float().T).to(x.dtype)


def _rows_in_bfloat16(original: Callable[..., Any]) -> Callable[..., Any]:
    def text_rows(self: Decoder, pos_BT: torch.Tensor, rows: Any, *given: Any) -> Any:
        made = original(self, pos_BT, rows, *given)
        if pos_BT.shape[1] > 1:
            return made
        return dataclasses.replace(made, cos_BTH=(1 - made.sin_BTH.square()).clamp(0).sqrt() * made.cos_BTH.sign())

    return text_rows


BUGS = {
    "cross-attention without its cap": (
        eager, "attend", _attend(eager.attend, cross=True, softcap=None), "layer.0.t2v.cached",
    ),
    "self-attention without its cap": (
        eager, "attend", _attend(eager.attend, cross=False, softcap=None), "layer.0.t2t.cached",
    ),
    "norms in bfloat16": (
        GemmaNorm, "forward", _in_steps(GemmaNorm.forward, _narrow_norm), "layer.0.t2t.cached",
    ),
    "sqrt(D) not rounded": (Decoder, "scaled", _in_steps(Decoder.scaled, _wide_root), "layer.0.input.cached"),
    "a head in float32": (Decoder, "logits", _in_steps(Decoder.logits, _wide_head), "logits.cached"),
    "cosines from rounded sines": (Decoder, "text_rows", _rows_in_bfloat16(Decoder.text_rows), "layer.0.t2t.cached"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_cast_of_steps_alone(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong, stage = BUGS[bug]
    case, subject = store.open_case(GOLDENS / "small", "base"), VidiSubject("bfloat16")
    with subject.scope():
        model = subject.build(case)
        monkeypatch.setattr(owner, name, wrong)
        done, _ = run.run_case(subject, case, model, tolerance.load(GOLDENS, STAGES))
    assert done.first_divergence is not None
    assert (done.first_divergence.stage, done.first_divergence.kind) == (stage, "stage")
    assert all(row.ok or row.stage.endswith(".cached") for row in done.rows)
