"""The small cases: their bits are pinned, they are small, and each is what it says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from goldens import recipes
from goldens.oracle import Arithmetic, case, forward, greedy, loss, positions, teacher_forced

TENSORS = recipes.weights()
CASES = recipes.cases()


def run(recipe: recipes.Recipe, config: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, np.ndarray]:
    inputs = {k: v for k, v in (dict(recipe.inputs) | changes).items() if v is not None}
    return forward(config or recipe.config, TENSORS, inputs, pos_freq=recipes.POS_FREQ)


def moved(got: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference over the RMS of `wanted`."""
    return float(np.abs(got - wanted).max() / np.sqrt(np.mean(wanted**2)))


# --- the bits


def test_words_by_hand() -> None:
    """splitmix64 over the FNV-1a key, in Python's integers."""

    def word(stream: str, counter: int) -> int:
        z = 0xCBF29CE484222325
        for byte in stream.encode():
            z = ((z ^ byte) * 0x100000001B3) % 2**64
        z = (z + (counter + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    assert recipes.words("", 1)[0] == word("", 0)
    assert recipes.words("mel a", 1000)[[0, 1, 999]].tolist() == [word("mel a", i) for i in (0, 1, 999)]
    parts = [(word("x", 3) >> shift) % 2**16 for shift in (0, 16, 32, 48)]
    assert recipes.gaussianish("x", (2, 2), -1)[1, 1] == np.float32((sum(parts) - 131070) * 2.0**-16)


def test_bits_are_pinned() -> None:
    """A change here is a change of every small golden: it needs its reason in the ledger."""

    def digest(tensors: Mapping[str, np.ndarray]) -> str:
        whole = hashlib.sha256()
        for name in sorted(tensors):
            array = tensors[name]
            whole.update(f"{name} {array.dtype.str} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return whole.hexdigest()[:16]

    assert digest(TENSORS) == "6f0c17008f595c21"
    assert digest(recipes.weights(recipes.odd_config())) == "ae31966363a2fa69"
    inputs = {name: {f"{name}/{k}": v for k, v in recipe.inputs.items()} for name, recipe in CASES.items()}
    assert digest(inputs.pop("odd")) == "dfed3ea265de923d"
    assert digest(inputs.pop("oddone")) == "d7a7ab3831b35ecc"
    assert digest({k: v for own in inputs.values() for k, v in own.items()}) == "37d23711349c4247"


def test_all_goldens_fit() -> None:
    """Both regimes of all cases, equal content stored once, under 6 MB compressed; every value finite."""
    stored: dict[str, np.ndarray] = {}
    for recipe in CASES.values():
        for casts in ("none", "cast"):
            tensors, table = recipes.weights(recipe.config), recipes.pos_freq(recipe.config)
            for stage, value in forward(recipe.config, tensors, recipe.inputs, casts=casts, pos_freq=table).items():
                assert np.isfinite(value).all(), (recipe.name, stage)
                stored[hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()] = value
    target = io.BytesIO()
    np.savez_compressed(target, **stored)
    assert len(target.getvalue()) < 6_000_000


# --- what each case is for


def test_budget_counts_the_frames_of_all_videos() -> None:
    assert run(CASES["base"])["vision.space_to_depth"].shape[2:] == (6, 6)
    assert "vision.resize" not in run(CASES["base"])
    assert run(CASES["budget"])["vision.resize"].shape == (3, 8, 10, 10)
    alone = {k: v for k, v in CASES["budget"].inputs.items() if not k.endswith(".1")}
    alone = {
        k: v[:1] if k in ("inputs.input_ids", "inputs.attention_mask", "inputs.audio_sizes") else v
        for k, v in alone.items()
    }
    assert "vision.resize" not in forward(CASES["budget"].config, TENSORS, alone, pos_freq=recipes.POS_FREQ)
    both = run(CASES["pervideo"])
    assert both["vision.space_to_depth.0"].shape[2:] == (5, 5)
    assert both["vision.space_to_depth.1"].shape[2:] == (6, 6)
    assert both["vision.mask"].sum(axis=1).tolist() == [2 * 25, 36]


def test_per_video_result_does_not_depend_on_neighbours() -> None:
    recipe = CASES["pervideo"]
    both = run(recipe)["logits"]
    for b in range(2):
        alone = {"inputs.images_u8.0": recipe.inputs[f"inputs.images_u8.{b}"]}
        alone |= {k: recipe.inputs[k][b : b + 1] for k in ("inputs.input_ids", "inputs.attention_mask")}
        single = forward(recipe.config, TENSORS, alone, pos_freq=recipes.POS_FREQ)["logits"][0]
        assert moved(both[b, : len(single)], single) < 1e-12


def test_masks_move_text_to_the_left() -> None:
    got = run(CASES["holes"])
    assert got["text.mask"].sum(axis=1).tolist() == [7, 6]
    ids = CASES["holes"].inputs["inputs.input_ids"]
    kept = [ids[0, [3, 4, 6, 7, 8, 9, 10]], ids[1, [0, 1, 3, 5, 8, 9]]]
    for b, row in enumerate(kept):
        media = {k[:-1] + "0": v for k, v in CASES["holes"].inputs.items() if k.endswith(f".{b}")}
        media["inputs.audio_sizes"] = CASES["holes"].inputs["inputs.audio_sizes"][b : b + 1]
        alone = media | {"inputs.input_ids": row[None]}
        want = forward(CASES["holes"].config, TENSORS, alone, pos_freq=recipes.POS_FREQ)["logits"][0]
        assert moved(got["logits"][b, : len(row)], want) < 1e-12
        assert not got["logits"][b, len(row) :].any()


def test_one_frame_stands_at_position_0() -> None:
    got = run(CASES["oneframe"])
    at_zero = positions.position_embedding(*_exact(), "model.mm_rand_pos_t.", 2, 10000, recipes.POS_FREQ, None)[:1]
    assert moved(got["vision.pos_t.embed.0"].reshape(1, -1), at_zero) < 1e-14
    assert moved(got["audio.pos_t.embed.0"], at_zero) < 1e-14
    assert got["audio.mask"].shape == (1, 1)


def _exact() -> tuple[Arithmetic, case.Weights]:
    ar = Arithmetic()
    return ar, case.Weights(ar, TENSORS)


@pytest.mark.parametrize(("name", "gone"), [("noaudio", ("audio", "a")), ("novideo", ("vision", "v"))])
def test_a_modality_that_no_sample_has_leaves_no_stage(name: str, gone: tuple[str, str]) -> None:
    got = run(CASES[name])
    stages = [
        s
        for s in got
        if s.startswith(gone[0]) or f"t2{gone[1]}" in s or (s.startswith("xattn") and f".{gone[1]}." in s)
    ]
    assert stages == []
    zero = {k: np.zeros((1, 4, 40)) for k in ("inputs.audios.0", "inputs.audios.1")}
    quiet = zero | {"inputs.audio_sizes": np.array([40, 40])}
    dark = {k: np.zeros((1, 3, 22, 22)) for k in ("inputs.images.0", "inputs.images.1")}
    same = run(CASES[name], **(quiet if name == "noaudio" else dark))
    np.testing.assert_array_equal(same["logits"], got["logits"])
    assert not same[f"layer.1.t2{gone[1]}.gate"].any()


def test_absent_samples() -> None:
    got = run(CASES["absent"])
    assert got["layer.0.t2a.gate"].tolist() == [False, True, False]
    assert got["layer.0.t2v.gate"].tolist() == [True, False, True]
    assert not got["layer.2.t2a"][[0, 2]].any()
    assert not got["layer.2.t2v"][1].any()
    assert not got["layer.2.image_stream"][1].any()
    assert got["xattn.0.a.unpad.cu_seqlens_k"].tolist() == [0, 0, 3, 3]
    assert len(got["xattn.0.v.unpad.k"]) == 72


def test_decoding_stops_one_row_at_107() -> None:
    recipe = CASES["decode"]
    got = greedy(recipe.config, TENSORS, recipe.inputs, recipe.decode_steps, pos_freq=recipes.POS_FREQ)
    assert got.lengths_B.tolist() == [8, 4]
    assert got.tokens_BS[1].tolist() == [81, 68, 42, 107, 0, 0, 0, 0]
    assert 107 not in got.tokens_BS[0]
    assert got.gap_BS.min() > 0.3
    other = greedy(recipe.config, TENSORS, recipe.inputs, recipe.decode_steps, casts="cast", pos_freq=recipes.POS_FREQ)
    np.testing.assert_array_equal(other.tokens_BS, got.tokens_BS)


@pytest.mark.parametrize("b", [0, 1])
def test_a_row_decodes_as_it_would_alone(b: int) -> None:
    """Padding, the window and the neighbour change nothing: compared by tokens and by logits."""
    recipe = CASES["decode"]
    together = greedy(recipe.config, TENSORS, recipe.inputs, 8, pos_freq=recipes.POS_FREQ)
    media = {k[:-1] + "0": v for k, v in recipe.inputs.items() if k.endswith(f".{b}")}
    ids = recipe.inputs["inputs.input_ids"][b][recipe.inputs["inputs.attention_mask"][b]]
    alone = media | {
        "inputs.audio_sizes": recipe.inputs["inputs.audio_sizes"][b : b + 1],
        "inputs.input_ids": ids[None],
    }
    single = greedy(recipe.config, TENSORS, alone, 8, pos_freq=recipes.POS_FREQ)
    assert single.tokens_BS[0].tolist() == together.tokens_BS[b].tolist()
    steps = single.lengths_B[0]
    assert moved(together.logits_BSK[b, :steps], single.logits_BSK[0, :steps]) < 1e-12
    forced = teacher_forced(recipe.config, TENSORS, recipe.inputs, together.tokens_BS, pos_freq=recipes.POS_FREQ)
    assert moved(forced[b, :steps], single.logits_BSK[0, :steps]) < 1e-12


def test_the_odd_case_stops_at_its_own_stop() -> None:
    recipe = CASES["odd"]
    tensors, table = recipes.weights(recipe.config), recipes.pos_freq(recipe.config)
    for casts in ("none", "cast"):
        got = greedy(recipe.config, tensors, recipe.inputs, recipe.decode_steps, casts=casts, pos_freq=table)
        assert got.lengths_B.tolist() == [7, 3]
        assert got.tokens_BS[1].tolist() == [77, 33, 51, 0, 0, 0, 0]
        assert got.gap_BS.min() > 0.3
    alone = greedy(recipe.config, tensors, CASES["oddone"].inputs, 6, pos_freq=table)
    assert alone.tokens_BS.tolist() == [[50, 50, 46, 65, 15, 38]]
    assert alone.gap_BS.min() > 0.3
    grids = forward(recipe.config, tensors, recipe.inputs, pos_freq=table)
    assert [grids[f"vision.space_to_depth.{b}"].shape[2:] for b in (0, 1)] == [(6, 6), (7, 7)]


def test_loss_thresholds() -> None:
    got = run(CASES["train"])
    per_token = got["loss.per_token"]
    assert np.flatnonzero(per_token).tolist() == [
        3,
        4,
        5,
        6,
    ]  # 8 kept tokens, 4 labels, each predicted one place before
    middle = float(np.sort(per_token)[-2])
    losses = loss(got["logits"], got["text.labels"], {"low": 1e-9, "mid": middle, "high": 1e9, "above": None})
    assert losses["loss.high"] == pytest.approx(per_token[3:7].mean(), rel=1e-14)
    assert losses["loss.low"] == pytest.approx(per_token[3:7].mean(), rel=1e-14)
    assert losses["loss.mid"] == per_token.max()
    ignored = np.full_like(got["text.labels"], -100)
    assert np.isnan(loss(got["logits"], ignored, {"x": 1.0})["loss.x"])
