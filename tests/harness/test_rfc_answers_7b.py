"""The rows of the table in docs/rfc-answers.md: what the 7B does instead, by recordings of its release and NumPy alone."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np

from stageparity import store
from stageparity.golden import Whole

OFFICIAL = Path(__file__).parents[2] / "goldens" / "official-7b"
CASES = {name: store.open_case(OFFICIAL, name) for name in ("batch", "single")}  # the latter holds whole what is large
CONFIG = CASES["batch"].config


@cache
def weights() -> dict[str, np.ndarray]:
    return {name: x.astype(np.float64) for name, x in CASES["batch"].weights().items()}


def golden(stage: str, case: str = "batch") -> np.ndarray:
    held = CASES[case].targets[stage]
    assert isinstance(held, Whole), stage
    return held.array.astype(np.float64)


def near(mine: np.ndarray, stage: str, case: str = "batch") -> None:
    theirs = golden(stage, case)
    assert mine.shape == theirs.shape
    assert np.abs(mine - theirs).max() < 1e-4 * np.sqrt(np.mean(theirs**2))


def norm(x: np.ndarray, name: str) -> np.ndarray:
    rms = np.sqrt(np.mean(x**2, -1, keepdims=True) + CONFIG["rms_norm_eps"])
    return weights()[name] * (x / rms)


def test_tokens_a_frame() -> None:
    pool, frames = CONFIG["mm_image_pool_size"], [3, 6]
    assert golden("vision.pos_t").shape[:3] == (sum(frames), pool, pool)
    assert golden("vision.mask").sum(1).tolist() == [n * pool**2 for n in frames]


def test_pool_samples_from_corner_to_corner() -> None:
    conv, pool = golden("vision.conv", "single"), CONFIG["mm_image_pool_size"]
    assert conv.shape[-1] == 27 - math.ceil(27 / pool) + 1
    at = np.arange(pool) * (conv.shape[-1] - 1) / (pool - 1)
    low, part = np.floor(at).astype(int), at % 1
    high = np.minimum(low + 1, conv.shape[-1] - 1)
    rows = conv[:, :, low] * (1 - part)[:, None] + conv[:, :, high] * part[:, None]
    near(rows[..., low] * (1 - part) + rows[..., high] * part, "vision.pool", "single")


def test_projector_sees_one_location() -> None:
    first = weights()["model.mm_rand_img_projector.model.0.weight"]
    assert first.shape[1] == golden("vision.pool").shape[1] == CONFIG["vision_config"]["hidden_size"]
    inner = (
        golden("vision.pool").transpose(0, 2, 3, 1) @ first.T + weights()["model.mm_rand_img_projector.model.0.bias"]
    )
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    second = "model.mm_rand_img_projector.model.2."
    near(inner @ weights()[second + "weight"].T + weights()[second + "bias"], "vision.projector")


def test_audio_pool_keeps_the_width() -> None:
    assert golden("audio.pool").shape[1] == golden("audio.trim").shape[2] == CONFIG["audio_config"]["d_model"]
    assert golden("audio.projector").shape[1] == CONFIG["hidden_size"] != golden("audio.pool").shape[1]


def test_positions_over_the_grid_span_the_pool() -> None:
    """One embedding a row and column of the pooled grid, at 0 … P - 1, whatever the grid of the patches."""
    pool, width = CONFIG["mm_image_pool_size"], CONFIG["hidden_size"]
    angles = np.arange(pool)[:, None] * golden("pos.freq")
    sinusoid = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(pool, width)
    mlp = "model.mm_rand_pos_h.mlp."
    inner = sinusoid @ weights()[mlp + "0.weight"].T + weights()[mlp + "0.bias"]
    inner = inner * 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    embed = inner @ weights()[mlp + "2.weight"].T + weights()[mlp + "2.bias"]
    near(embed[None, :, None], "vision.pos_h.embed")


def test_no_factor() -> None:
    for entering, before in (("input", "text.embeds"), ("image_input", "vision.llm_norm")):
        np.testing.assert_array_equal(golden(f"layer.0.{entering}", "single"), golden(before, "single"))


def test_streams_are_added_one_by_one_and_silu_gates() -> None:
    """Plain weights, two norms a layer, attentions unnormed."""
    x = golden("layer.0.input") + golden("layer.0.t2t") + golden("layer.0.t2v") + golden("layer.0.t2a")
    layer = "model.layers.0."
    n = norm(x, layer + "post_attention_layernorm.weight")
    gate, up = (n @ weights()[f"{layer}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
    near(x + (gate / (1 + np.exp(-gate)) * up) @ weights()[layer + "mlp.down_proj.weight"].T, "layer.0.output")


def test_scores_are_not_capped_and_scaled_by_the_heads_width() -> None:
    q, k, v = (golden(f"xattn.0.v.{part}", "single") for part in "qkv")
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(CONFIG.get("head_dim") or q.shape[-1])
    share = np.exp(scores - scores.max(-1, keepdims=True))
    out = (share / share.sum(-1, keepdims=True)) @ v
    assert golden("vision.mask", "single").all()
    near(out.transpose(0, 2, 1, 3), "xattn.0.v.out", "single")


def test_head_is_its_own_and_not_capped() -> None:
    assert not np.array_equal(weights()["lm_head.weight"], weights()["model.embed_tokens.weight"])
    near(golden("final.norm") @ weights()["lm_head.weight"].T, "logits")


def test_ignored_places_never_reach_the_head() -> None:
    loss = store.open_case(OFFICIAL, "loss").targets
    kept, labels = (loss[f"loss.{name}"].array for name in ("kept", "labels"))  # type: ignore[union-attr]
    text = loss["text.labels"].array  # type: ignore[union-attr]
    assert len(loss["loss.logits"].array) == len(kept) == (text[:, 1:] != -100).sum()  # type: ignore[union-attr]
    np.testing.assert_array_equal(text[kept[:, 0], kept[:, 1] + 1], labels)


def test_every_row_names_its_test() -> None:
    page = (Path(__file__).parents[2] / "docs" / "rfc-answers.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and line.count("|") == 5][1:]
    assert len(rows) == 21
    assert [row for row in rows if "::test_" not in row.split("|")[4]] == []
