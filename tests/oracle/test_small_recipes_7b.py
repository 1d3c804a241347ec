"""The small cases of the 7B: their bits are pinned, they are small, and each is what it says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping

import numpy as np
import pytest

from goldens import recipes as recipes_9b
from goldens import recipes_7b as recipes
from goldens.oracle import Arithmetic, case, forward, greedy, positions, teacher_forced

TENSORS = recipes.weights()
CASES = recipes.cases()
SETTINGS = {"pos_freq": recipes_9b.POS_FREQ}


def run(name: str, **changes: np.ndarray) -> dict[str, np.ndarray]:
    return forward(CASES[name].config, TENSORS, dict(CASES[name].inputs) | changes, **SETTINGS)


def alone(name: str, b: int) -> dict[str, np.ndarray]:
    """Sample b of a case as a case of its own: its kept ids alone, no mask."""
    inputs = CASES[name].inputs
    own = {key[: -len(str(b))] + "0": value for key, value in inputs.items() if key.endswith(f".{b}")}
    ids = inputs["inputs.input_ids"][b][inputs["inputs.attention_mask"][b]]
    own |= {"inputs.input_ids": ids[None]}
    return (
        own | {"inputs.audio_sizes": inputs["inputs.audio_sizes"][b : b + 1]} if "inputs.audio_sizes" in inputs else own
    )


def moved(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the RMS of `wanted`."""
    return float(np.abs(got - wanted).max() / np.sqrt(np.mean(wanted**2)))


def test_bits_are_pinned() -> None:
    """A change here is a change of every small golden: it needs its reason in the ledger."""

    def digest(tensors: Mapping[str, np.ndarray]) -> str:
        whole = hashlib.sha256()
        for name in sorted(tensors):
            array = tensors[name]
            whole.update(f"{name} {array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()[:16]

    assert digest(TENSORS) == "658f5db4db553aa6"
    assert digest({f"{n}/{k}": v for n, r in CASES.items() for k, v in r.inputs.items()}) == "f87bbfd58323a942"


def test_all_goldens_fit() -> None:
    """Both regimes of all cases, equal content stored once, under 2.5 MB compressed; every value finite."""
    stored: dict[str, np.ndarray] = {}
    for recipe in CASES.values():
        for casts in ("none", "cast"):
            for stage, value in forward(recipe.config, TENSORS, recipe.inputs, casts=casts, **SETTINGS).items():
                assert np.isfinite(value).all(), (recipe.name, stage)
                stored[hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()] = value
    target = io.BytesIO()
    np.savez_compressed(target, **stored)
    assert len(target.getvalue()) < 2_500_000


def test_sizes_are_the_7bs() -> None:
    """A convolution with a kernel of ceil(11/3), then 3×3 tokens a frame; the audio pool keeps 8 channels."""
    got = run("base")
    assert got["vision.conv"].shape == (3, 8, 8, 8)
    assert got["vision.pool"].shape == (3, 8, 3, 3)
    corners = got["vision.conv"][:, :, ::7, ::7]
    np.testing.assert_array_equal(got["vision.pool"][:, :, ::2, ::2], corners)
    middle = got["vision.conv"][:, :, 3:5, 3:5].mean(axis=(2, 3))
    assert moved(got["vision.pool"][:, :, 1, 1], middle) < 1e-14
    assert got["vision.mask"].sum(axis=1).tolist() == [18, 9]
    assert got["audio.pool"].shape == (2, 8, 7)
    assert got["audio.mask"].sum(axis=1).tolist() == [7, 3]
    assert not {"vision.pad", "vision.space_to_depth"} & got.keys()
    for stream in ("image_input", "audio_input"):
        np.testing.assert_array_equal(
            got[f"layer.0.{stream}"], got[f"{'vision' if stream[0] == 'i' else 'audio'}.llm_norm"]
        )


@pytest.mark.parametrize("name", ["base", "decode", "textonly", "noaudio", "absent"])
def test_no_sample_depends_on_its_neighbours_or_its_padding(name: str) -> None:
    """Each row alone, unpadded, gives the same logits."""
    together = run(name)
    kept = together["text.mask"].sum(axis=1)
    for b in range(len(kept)):
        single = forward(CASES[name].config, TENSORS, alone(name, b), **SETTINGS)["logits"][0]
        assert moved(together["logits"][b, : kept[b]], single) < 1e-12
        assert not together["final.norm"][b, kept[b] :].any()


def test_text_only_is_a_plain_decoder() -> None:
    got = run("textonly")
    assert {stage for stage in got if stage.startswith(("vision", "audio", "xattn"))} == set()
    assert got["text.mask"].sum(axis=1).tolist() == [9, 4]
    assert got["text.mask"].shape[1] > CASES["textonly"].config["sliding_window"] + 1


def test_one_of_a_kind_stands_at_position_0() -> None:
    ar = Arithmetic()
    w = case.Weights(ar, TENSORS)
    at_zero = positions.position_embedding(ar, w, "model.mm_rand_pos_t.", 2, 5000, recipes_9b.POS_FREQ, None)[:1]
    got = run("oneframe")
    assert moved(got["vision.pos_t.embed.0"].reshape(1, -1), at_zero) < 1e-14
    assert moved(got["audio.pos_t.embed.0"], at_zero) < 1e-14
    assert got["audio.mask"].shape == (1, 1)
    assert run("oneid")["logits"].shape == (1, 1, 112)


def test_no_audio_token_anywhere_is_no_audio() -> None:
    got = run("noaudio")
    assert [s for s in got if s.startswith("audio") or ".t2a" in s or ".a." in s] == []
    silent = {f"inputs.audios.{b}": np.zeros((1, 4, 40)) for b in range(2)}
    same = run("noaudio", **silent, **{"inputs.audio_sizes": np.array([40, 40])})
    np.testing.assert_array_equal(same["logits"], got["logits"])
    assert not same["layer.1.t2a.gate"].any()


def test_absent_samples() -> None:
    got = run("absent")
    assert got["layer.0.t2a.gate"].tolist() == [False, True, False]
    assert got["layer.0.t2v.gate"].tolist() == [True, False, True]
    assert not got["layer.2.t2a"][[0, 2]].any()
    assert not got["layer.2.image_stream"][1].any()
    assert got["xattn.0.a.unpad.cu_seqlens_k"].tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize("name", ["train", "trainvideo"])
def test_labelled_places_alone_reach_the_head(name: str) -> None:
    got = run(name)
    assert got["loss.kept"].tolist() == [[0, 3], [0, 4], [0, 5], [0, 6]]
    assert got["loss.labels"].tolist() == CASES[name].inputs["inputs.labels"][0, 5:].tolist()
    unlabelled = {key: value for key, value in CASES[name].inputs.items() if key != "inputs.labels"}
    every = forward(CASES[name].config, TENSORS, unlabelled, **SETTINGS)["logits"][0]
    assert moved(got["loss.logits"], every[3:7]) < 1e-14
    assert "logits" not in got
    assert got["loss.none"] == pytest.approx(got["loss.per_token"].mean(), rel=1e-14)


def test_thresholds() -> None:
    per_token = run("train")["loss.per_token"]
    middle = float(np.sort(per_token)[-2])
    named = {"low": 1e-9, "mid": middle, "high": 1e9}
    got = forward(CASES["train"].config, TENSORS, CASES["train"].inputs, thresholds=named, **SETTINGS)
    assert got["loss.low"] == got["loss.high"] == pytest.approx(per_token.mean(), rel=1e-14)
    assert got["loss.mid"] == per_token.max()
    ignored = {"inputs.labels": np.full((1, 9), -100)}
    none = forward(CASES["train"].config, TENSORS, dict(CASES["train"].inputs) | ignored, thresholds=named, **SETTINGS)
    assert all(np.isnan(none[f"loss.{name}"]) for name in named)
    assert none["loss.logits"].shape == (0, 112)


def test_decoding_stops_a_row_at_eos() -> None:
    """Padded left, right and within, past the window: each row as it would alone, uncached pass for uncached pass."""
    recipe = CASES["decode"]
    got = greedy(recipe.config, TENSORS, recipe.inputs, recipe.decode_steps, **SETTINGS)
    assert got.lengths_B.tolist() == [8, 5, 8]
    assert got.tokens_BS[1].tolist() == [66, 22, 74, 27, 2, 0, 0, 0]
    assert (got.tokens_BS != 107).all()
    assert got.gap_BS.min() > 0.3
    cast = greedy(recipe.config, TENSORS, recipe.inputs, recipe.decode_steps, casts="cast", **SETTINGS)
    np.testing.assert_array_equal(cast.tokens_BS, got.tokens_BS)
    forced = teacher_forced(recipe.config, TENSORS, recipe.inputs, got.tokens_BS, **SETTINGS)
    for b in range(3):
        steps = got.lengths_B[b]
        single = greedy(recipe.config, TENSORS, alone("decode", b), recipe.decode_steps, **SETTINGS)
        assert single.tokens_BS[0].tolist() == got.tokens_BS[b].tolist()
        assert moved(got.logits_BSK[b, :steps], single.logits_BSK[0, :steps]) < 1e-12
        assert moved(forced[b, :steps], single.logits_BSK[0, :steps]) < 1e-12
