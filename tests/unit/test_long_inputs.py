"""Long and ragged inputs at tiny widths, plain and fast, against the oracle: what is right for a few frames must not be cut,
wrapped or rounded for many.

Sizes at which code has been seen to stop: text beyond 300 positions (256 is the last that bfloat16 counts), a window that is
really passed, more than 32 pieces of sound, more than 4,096 frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from goldens import oracle
from stageparity.run import Trace
from tests import tiny
from vidi import generate
from vidi.attention import mask, rope
from vidi.bridge import audio, position
from vidi.bridge import mask as bridge_mask
from vidi.checkpoint import names, synthetic
from vidi.config import VidiConfig
from vidi.fast import accelerate
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed

PATHS = {"plain": lambda model: model, "fast": accelerate}
BF16 = torch.bfloat16


def small(window: int = 8, **tower: Mapping[str, int]) -> VidiConfig:
    """Two decoder layers, one of each kind, and towers of the sizes given."""
    whole = tiny.config(window=window)
    return dataclasses.replace(
        whole,
        visual_token_budget=60000,
        vision=dataclasses.replace(whole.vision, num_layers=2, **tower.get("vision", {})),
        audio=dataclasses.replace(whole.audio, num_layers=1, **tower.get("audio", {})),
        decoder=dataclasses.replace(whole.decoder, num_layers=2, vocab_size=96),
    )


def made(config: VidiConfig, dtype: torch.dtype = torch.float64) -> VidiModel:
    return synthetic.create(config, seed=5, dtype=dtype).requires_grad_(False)


def settings(model: VidiModel, **more: Any) -> dict[str, Any]:
    """What the oracle takes beside inputs."""
    weights = {w.official: model.get_parameter(w.ours).float().numpy() for w in names.expected(model.config).values()}
    if model.dtype == torch.float64:
        weights = {w.official: model.get_parameter(w.ours).numpy() for w in names.expected(model.config).values()}
    table = position.frequencies(model.config.decoder.hidden_size).numpy()
    return {"config": model.config.to_official(), "weights": weights, "pos_freq": table} | more


def prompt(length: int, seed: int = 0) -> np.ndarray:
    """(1, length + 1) ids with a placeholder at place 1."""
    ids = np.random.default_rng(seed).integers(3, 96, (1, length + 1))
    ids[0, 1] = -200
    return ids


def close(found: Tensor, wanted: np.ndarray) -> None:
    tiny.assert_close(found, torch.from_numpy(wanted))


@torch.no_grad()
def stages(runner: Any, inputs: Mapping[str, np.ndarray], *wanted: str) -> dict[str, Tensor]:
    tap = Trace(wanted.__contains__)
    runner(feed.batch_of(inputs), tap=tap)
    return tap.tensors()


# ---- text -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_text_of_330_positions(path: str) -> None:
    """Beyond 300 and far beyond the window, every stage's text rows in float64."""
    model, inputs = made(small()), {"inputs.input_ids": prompt(330)}
    truth = oracle.forward(inputs=inputs, keep=["layer.*.t2t", "logits"], **settings(model))
    found = stages(PATHS[path](model), inputs, *truth)
    assert truth["logits"].shape == (1, 330, 96)
    for stage, wanted in truth.items():
        close(found[stage], wanted)


def _bf16_error(path: str) -> tuple[float, float]:
    """rms error, over a naive bfloat16 run's own, of the last 70 rows: rotary factors, and self-attention of both layers."""
    model, inputs = made(small(), BF16), {"inputs.input_ids": prompt(330)}
    keep = ["rope.cos", "rope.sin", "layer.0.t2t", "layer.1.t2t"]
    truth = oracle.forward(inputs=inputs, keep=keep, **settings(model))
    naive = oracle.forward(inputs=inputs, keep=keep, casts="cast", round_to="bf16", **settings(model))
    found = stages(PATHS[path](model), inputs, *keep)

    def ratio(stage: str) -> float:
        rows = (slice(None), slice(260, None))
        mine, wanted, plain = found[stage].double().numpy()[rows], truth[stage][rows], naive[stage][rows]
        return float(np.sqrt(np.mean((mine - wanted) ** 2) / np.mean((plain - wanted) ** 2)))

    return max(ratio("rope.cos"), ratio("rope.sin")), max(ratio("layer.0.t2t"), ratio("layer.1.t2t"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_counts_positions_beyond_256(path: str) -> None:
    """As near as a naive run in bfloat16 whose positions are integers: 1.3 times its error (gates' own factor)."""
    assert max(_bf16_error(path)) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_positions_rounded_to_bfloat16_are_seen(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = rope.angles
    monkeypatch.setattr(rope, "angles", lambda pos, *rest: angles(pos.to(BF16).float(), *rest))
    factors, attended = _bf16_error(path)
    assert factors > 10
    assert attended > 2


# ---- decoding -------------------------------------------------------------------------------------------------------------


def _loose() -> dict[str, np.ndarray]:
    """Left padding, holes and right padding in one batch of unlike lengths, with frames and sound."""
    draw = np.random.default_rng(3)
    ids = draw.integers(3, 96, (3, 14))
    keep = np.ones((3, 14), bool)
    keep[0, :5] = False
    keep[1, [0, 3, 4, 9]] = False
    keep[2, 6:] = False
    ids[0, 6] = ids[1, 5] = ids[2, 2] = -200
    pictures = {f"inputs.images.{b}": draw.standard_normal((n, 3, 26, 26)) for b, n in ((0, 2), (1, 1))}
    sound = {f"inputs.audios.{b}": draw.standard_normal((n, 16, 100)) for b, n in ((0, 1), (2, 2))}
    sizes = np.array([71, 0, 130])
    return {"inputs.input_ids": ids, "inputs.attention_mask": keep, **pictures, **sound, "inputs.audio_sizes": sizes}


@pytest.mark.parametrize("path", PATHS)
def test_left_padding_holes_and_ragged_rows_decode_as_the_oracles(path: str) -> None:
    model, inputs = made(small(window=4)), _loose()
    tokens = np.random.default_rng(4).integers(3, 96, (3, 9))
    wanted = oracle.teacher_forced(inputs=inputs, tokens_BS=tokens, **settings(model))
    found = generate.forced_logits(PATHS[path](model), feed.batch_of(inputs), torch.from_numpy(tokens))
    close(found, wanted)
    free = oracle.greedy(inputs=inputs, steps=7, **settings(model))
    assert free.gap_BS.min() > 1e-6
    said = generate.greedy(PATHS[path](model), feed.batch_of(inputs), max_new_tokens=7).tokens
    assert said == free.tokens_BS.tolist()


REAL_WINDOW, PROMPT, STEPS = 4096, 4093, 7


@pytest.fixture(scope="module")
def across() -> tuple[VidiModel, np.ndarray, np.ndarray, np.ndarray]:
    """A prompt just below 4,096 and steps past it: (model, prompt, tokens, the oracle's logits)."""
    config = small(window=REAL_WINDOW)
    decoder = dataclasses.replace(config.decoder, num_heads=1, num_kv_heads=1, intermediate_size=16)
    model = made(dataclasses.replace(config, decoder=decoder))
    ids, tokens = prompt(PROMPT, seed=1), np.random.default_rng(2).integers(3, 96, (1, STEPS))
    wanted = oracle.teacher_forced(inputs={"inputs.input_ids": ids}, tokens_BS=tokens, **settings(model))
    return model, ids, tokens, wanted


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_decoding_across_a_real_window(path: str, across: tuple) -> None:
    model, ids, tokens, wanted = across
    batch = Batch(torch.from_numpy(ids))
    close(generate.forced_logits(PATHS[path](model), batch, torch.from_numpy(tokens)), wanted)


@pytest.mark.slow
def test_a_window_of_one_key_more_is_seen(across: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, tokens, wanted = across
    sees = mask.sees
    monkeypatch.setattr(mask, "sees", lambda q, k, window=None: sees(q, k, None if window is None else window + 1))
    found = generate.forced_logits(model, Batch(torch.from_numpy(ids)), torch.from_numpy(tokens))
    scale = np.sqrt(np.mean(wanted**2))
    error = np.abs(found.numpy() - wanted).max(axis=(0, 2)) / scale
    past = np.arange(PROMPT, PROMPT + STEPS) - 1 > REAL_WINDOW  # the position of each step's query
    assert (error[past] > 1e-7).all()
    assert (error[~past] < 1e-9).all()


# ---- sound and frames -------------------------------------------------------------------------------------------------------


def _sound(pieces: int) -> dict[str, np.ndarray]:
    mel = np.random.default_rng(6).standard_normal((pieces, 16, 100))
    return {"inputs.input_ids": prompt(5), "inputs.audios.0": mel, "inputs.audio_sizes": np.array([pieces * 100 - 7])}


def _frames(count: int) -> dict[str, np.ndarray]:
    pixels = np.random.default_rng(7).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    return {"inputs.input_ids": prompt(5), "inputs.images_u8.0": pixels, "inputs.images.0": pixels / 127.5 - 1}


def _batch(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: x for name, x in inputs.items() if "u8" not in name}


FEW_PATCHES = {"vision": {"image_size": 4, "hidden_size": 16, "intermediate_size": 16}}
LONG: Mapping[str, tuple[Mapping[str, Any], Callable[[], dict[str, np.ndarray]], str, int]] = {
    "35 pieces": ({}, lambda: _sound(35), "audio.llm_norm", 349),
    "4,200 frames": (FEW_PATCHES, lambda: _frames(4200), "vision.llm_norm", 4200),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", LONG)
def test_no_length_is_cut(what: str) -> None:
    towers, inputs, stage, tokens = LONG[what]
    model, given = made(small(**towers)), _batch(inputs())
    truth = oracle.forward(inputs=given, keep=[stage, "logits"], **settings(model))
    assert truth[stage].shape == (1, tokens, 40)
    for path in PATHS.values():
        found = stages(path(model), given, stage, "logits")
        close(found[stage], truth[stage])
        close(found["logits"], truth["logits"])


def _ten_pieces(patch: pytest.MonkeyPatch) -> None:
    original = audio.num_positions
    patch.setattr(audio, "num_positions", lambda size, config: min(original(size, config), 10 * 50))


def _silent_after_32(patch: pytest.MonkeyPatch) -> None:
    features = VidiModel.audio_features

    def silenced(self: VidiModel, pieces: Tensor) -> Tensor:
        return features(self, torch.cat((pieces[:32], torch.zeros_like(pieces[32:]))))

    patch.setattr(VidiModel, "audio_features", silenced)


def _frames_dropped(patch: pytest.MonkeyPatch) -> None:
    keep = bridge_mask.keep_tokens
    patch.setattr(bridge_mask, "keep_tokens", lambda x, signal: keep(x, signal) & (torch.arange(x.shape[1]) < 4096))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "plant"), [("35 pieces", _ten_pieces), ("35 pieces", _silent_after_32), ("4,200 frames", _frames_dropped)]
)
def test_a_cut_is_seen(what: str, plant: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    towers, inputs, stage, _ = LONG[what]
    model, given = made(small(**towers)), _batch(inputs())
    wanted = oracle.forward(inputs=given, keep=[stage], **settings(model))[stage]
    plant(monkeypatch)
    found = stages(model, given, stage)[stage].numpy()
    assert found.shape != wanted.shape or np.abs(found - wanted).max() > 1e-3
