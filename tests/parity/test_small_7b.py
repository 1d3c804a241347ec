"""The model in float64 against the 7B's small cases, pure mathematics: every stage within 1e-9 (measured 3e-14)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vidi.parity import feed, store, trace
from vidi.parity.golden import Whole

SMALL = Path(__file__).parents[2] / "goldens" / "7b" / "small-7b"
CASES = [ref.name for ref in store.list_cases(SMALL)]
WITHIN = 1e-9


def run(name: str) -> tuple[store.Case, dict[str, torch.Tensor]]:
    case = store.open_case(SMALL, name)
    model, batch, tap = feed.load_model(case, torch.float64), feed.batch_of(case.inputs), trace.Trace()
    with trace.training(model, feed.noise_of(case.inputs)), torch.no_grad():
        if batch.labels_BT is None:
            model(batch, last_stream=True, tap=tap)
        else:
            losses_N = model.losses(batch, last_stream=True, tap=tap)
            tap("loss.none", losses_N.mean())
    found = tap.tensors()
    found |= dict(trace.cross_attention(found, model.config.decoder.num_heads))
    return case, found | (trace.decoding(case, model) if "generate" in case.info else {})


def error(value: np.ndarray, golden: np.ndarray) -> float:
    return float(np.abs(value - golden).max() / max(np.sqrt(np.mean(golden**2)), 1e-30))


@pytest.mark.parametrize("name", CASES)
def test_every_stage(name: str) -> None:
    case, found = run(name)
    goldens = {stage: golden.array for stage, golden in case.variant("none").items() if isinstance(golden, Whole)}
    del goldens["pos.freq"]
    assert set(goldens) <= found.keys()
    assert len(goldens) >= 17
    wrong = []
    for stage, golden in goldens.items():
        value = found[stage].numpy()
        if golden.dtype.kind in "bi":
            if not np.array_equal(value, golden):
                wrong.append(f"{stage}: not equal")
        elif value.shape != golden.shape or not error(value, golden) < WITHIN:
            wrong.append(f"{stage}: {value.shape} {error(value, golden):.1e}")
    assert wrong == []


def test_there_are_cases() -> None:
    assert len(CASES) == 9


def test_cached_decoding_of_padded_prompts_under_a_window() -> None:
    """Every row's steps, up to its own stop token, equal whole passes."""
    case, found = run("decode")
    golden, lengths = (case.variant("none")[f"decode.{what}"].array for what in ("nocache.logits", "lengths"))
    for b, length in enumerate(lengths):
        assert error(found["decode.cached.logits"][b, :length].numpy(), golden[b, :length]) < WITHIN
