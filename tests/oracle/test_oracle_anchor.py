"""An anchored run goes on with given tensors, so that each stage's error is its own: the base of isolated budgets."""

from __future__ import annotations

import numpy as np
import pytest

from goldens import recipes, recipes_7b
from goldens.oracle import forward
from vidi.parity.stages import STAGES

CASES = recipes.cases() | {f"7b/{name}": recipe for name, recipe in recipes_7b.cases().items()}


def weights_of(name: str) -> dict[str, np.ndarray]:
    return (recipes_7b if name.startswith("7b/") else recipes).weights()


def run(name: str, weights: dict[str, np.ndarray] | None = None, **settings) -> dict[str, np.ndarray]:
    recipe = CASES[name]
    own = weights or weights_of(name)
    return forward(recipe.config, own, recipe.inputs, pos_freq=recipes.POS_FREQ, **settings)


@pytest.mark.parametrize("name", ["base", "pervideo", "absent", "train", "7b/base", "7b/absent", "7b/train"])
def test_a_run_anchored_at_itself_is_itself(name: str) -> None:
    """Every piece of every stage finds its place in the anchor: frames in chunks, samples one by one, grids apart."""
    plain = run(name, casts="cast")
    again = run(name, casts="cast", anchor=plain)
    assert plain.keys() == again.keys()
    for stage, value in plain.items():
        assert value.tobytes() == again[stage].tobytes(), stage


@pytest.mark.parametrize(
    ("name", "weight", "stages"),
    [
        ("base", "model.mm_rand_img_norm.weight", {"vision.norm"}),
        ("base", "model.mm_rand_pos_h.mlp.2.bias", {"vision.pos_h.embed"}),
        ("base", "model.mm_rand_aud_pool.weight", {"audio.pool"}),
        ("base", "model.mm_rand_llm_norm.weight", {"vision.llm_norm", "audio.llm_norm"}),
        ("base", "model.norm.weight", {"final.norm"}),
        (
            "base",
            "model.layers.1.mlp.down_proj.weight",
            {"layer.1.output", "layer.1.image_stream", "layer.1.audio_stream"},
        ),
        ("base", "model.layers.1.self_attn.q_proj.weight", {"layer.1.t2t", "layer.1.t2v", "layer.1.t2a"}),
        ("7b/base", "model.mm_rand_img_pool.conv.weight", {"vision.conv"}),
        ("7b/base", "model.mm_rand_aud_pool.weight", {"audio.pool"}),
        ("7b/base", "lm_head.weight", {"lm_head"}),
        (
            "7b/base",
            "model.layers.1.post_attention_layernorm.weight",
            {"layer.1.output", "layer.1.image_stream", "layer.1.audio_stream"},
        ),
        ("7b/train", "lm_head.weight", {"loss.logits"}),
    ],
)
def test_what_is_wrong_in_one_stage_stays_there(name: str, weight: str, stages: set[str]) -> None:
    plain, weights = run(name), weights_of(name)
    weights[weight] = weights[weight] * np.float32(1.25) + np.float32(0.25)
    anchored, chained = run(name, weights, anchor=plain), run(name, weights)
    moved = {stage for stage in plain if not np.array_equal(plain[stage], anchored[stage])}
    assert moved == stages
    end = "logits" if "logits" in plain else "loss.none"
    assert not np.array_equal(plain[end], chained[end])


def test_cross_attention_is_fed_q_k_and_v() -> None:
    """xattn.out is fed the recorded q, k and v, though t2v is fed the layer's input and the stream."""
    plain = run("base")
    off = {stage: value * (1.5 if stage == "xattn.0.v.v" else 1.0) for stage, value in plain.items()}
    anchored = run("base", anchor=off)
    moved = [stage for stage in plain if not np.allclose(plain[stage], anchored[stage], rtol=1e-9, atol=1e-12)]
    # the unpadded values are a copy of what the case holds
    assert moved == ["xattn.0.v.out", "xattn.0.v.unpad.v"]
    assert np.allclose(anchored["xattn.0.v.out"], 1.5 * plain["xattn.0.v.out"])


def test_rounding_alone_errs_less_than_rounding_in_a_chain() -> None:
    truth = run("base", casts="cast")
    errors = {}
    for kind, anchor in (("chained", None), ("isolated", truth)):
        low = run("base", casts="cast", round_to="bf16", anchor=anchor)
        errors[kind] = {
            stage: float(np.sqrt(np.mean((low[stage] - truth[stage]) ** 2) / np.mean(truth[stage] ** 2)))
            for stage in truth
            if truth[stage].dtype.kind == "f" and not STAGES.is_exact(stage)
        }
    deep = [stage for stage in errors["chained"] if stage.startswith(("layer.2.", "xattn.2.", "final", "logits"))]
    assert all(errors["isolated"][stage] <= errors["chained"][stage] for stage in deep)
    assert max(errors["isolated"].values()) < 0.02
    assert max(errors["chained"].values()) > 0.03
