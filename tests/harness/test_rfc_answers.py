"""The answers of docs/rfc-answers.md, each held against recordings of the official release: no code of the model runs
where a golden tensor can speak for itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stageparity import store
from stageparity.golden import Sampled, Whole
from stageparity.store import Case
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows, _unpad_xattn_input
from vidi.config import VidiConfig
from vidi.parity.goldens import inputs_of

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "goldens" / "official"


def case(name: str) -> Case:
    return store.open_case(OFFICIAL, name)


def golden(name: str, stage: str) -> np.ndarray:
    held = case(name).targets[stage]
    assert isinstance(held, Whole)
    return held.array


def rms(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(("name", "frames", "side"), [("single", 5, 14), ("longvideo", 330, 13)])
def test_tokens_a_frame(name: str, frames: int, side: int) -> None:
    """196 for a short video, 169 once 330 frames share the budget: neither 1 nor 4."""
    held = case(name)
    assert len(inputs_of(held)["inputs.images.0"]) == frames
    assert held.targets["vision.packed"].shape[1] == frames * side * side
    assert held.targets["vision.mask"].array.sum() == frames * side * side


def test_flattening_comes_after_all_three_embeddings() -> None:
    assert np.array_equal(golden("single", "vision.packed")[0], golden("single", "vision.pos_t").reshape(-1, 64))


@pytest.mark.parametrize(
    ("before", "embed", "after"),
    [
        ("vision.norm", "vision.pos_h.embed", "vision.pos_h"),
        ("vision.pos_h", "vision.pos_w.embed", "vision.pos_w"),
        ("vision.pos_w", "vision.pos_t.embed.0", "vision.pos_t"),
    ],
)
def test_embeddings_are_added_on_the_folded_grid(before: str, embed: str, after: str) -> None:
    """Each broadcasts along one axis of (frames, 14, 14, D)."""
    x, e, y = (golden("single", stage) for stage in (before, embed, after))
    assert x.shape == y.shape == (5, 14, 14, 64)
    axis = {"vision.pos_h": 1, "vision.pos_w": 2, "vision.pos_t": 0}[after]
    assert e.shape == (*(x.shape[i] if i == axis else 1 for i in range(3)), 64)
    assert np.abs(x + rms(e) - y).max() <= 1e-6 * np.abs(y).max()  # one float32 addition


def test_projector_input_is_four_patches_side_by_side() -> None:
    """Channel c·4 + dy·2 + dx of a token is channel c of the patch at (2y + dy, 2x + dx): every patch is still there."""
    patches, tokens = golden("single", "vision.pad"), golden("single", "vision.space_to_depth")
    for dy in (0, 1):
        for dx in (0, 1):
            assert np.array_equal(tokens[:, dy * 2 + dx :: 4], patches[:, :, dy::2, dx::2])
    full = VidiConfig.full()
    assert 4 * full.vision.hidden_size == 4608


def test_image_features_before_cross_attention() -> None:
    """(B, V, D): all tokens of a video on one axis, videos of a batch padded with exact zeros at the right."""
    held = case("batch")
    frames = [len(inputs_of(held)[f"inputs.images.{b}"]) for b in (0, 1)]
    stream = held.targets["layer.0.image_input"]
    assert stream.shape == (2, max(frames) * 196, 64)
    assert stream.shape not in ((2, max(frames), 64), (2, max(frames) * 4, 64))
    keep = golden("batch", "vision.mask")
    assert keep.sum(1).tolist() == [n * 196 for n in frames]
    assert keep[0, : frames[0] * 196].all()
    assert isinstance(stream, Sampled)
    rows = np.take(keep, stream.index, axis=stream.axis) if stream.axis == 1 else keep[stream.index]
    assert not stream.sample[~rows].any()


def test_masks() -> None:
    """Visual: not all zero, and the video not black. Text: attention mask and not the placeholder, packed to the left."""
    held = case("silent")
    packed = held.targets["vision.packed"]
    assert not inputs_of(held)["inputs.images.1"].any()
    assert golden("silent", "vision.mask").sum(1).tolist() == [packed.shape[1], 0]
    assert golden("silent", "audio.mask").sum(1).tolist() == [0, 8]
    held = case("batch")
    keep = held.inputs["inputs.attention_mask"].astype(bool) & (held.inputs["inputs.input_ids"] != -200)
    lengths = keep.sum(1)
    text = golden("batch", "text.mask")
    assert text.shape[1] == lengths.max() < held.inputs["inputs.input_ids"].shape[1]
    assert np.array_equal(text, np.arange(text.shape[1]) < lengths[:, None])


CAUSES = {
    "a: a 4-D causal mask": (
        lambda m: m[:, None, None] & m[:, None, :, None],
        {},
        "4 dimensions (1, 1, 11, 11): this is a causal",
    ),
    "b: the placeholder counted": (lambda m: m.new_ones(1, 12), {}, "it still counts the image placeholder"),
    "c: cached keys counted": (lambda m: m.new_ones(1, 20), {"cached_keys": 9}, "it covers the 9 cached keys too"),
    "d: cut by a sliding layer": (lambda m: m[:, -8:], {"window": 8}, "a sliding layer cut it to its window of 8"),
}  # fmt: skip


@pytest.mark.parametrize("cause", CAUSES)
def test_why_the_query_length_assertion_fired(cause: str) -> None:
    """On recorded queries, keys and masks: the right mask passes, each wrong one is told apart."""
    q, k, v = (torch.from_numpy(golden("single", f"xattn.0.v.{part}")).transpose(1, 2) for part in "qkv")
    keys = Rows(torch.from_numpy(golden("single", "vision.mask")))
    keep = torch.from_numpy(golden("single", "text.mask"))
    assert _unpad_xattn_input(q, k, v, Rows(keep), keys).cu_seqlens_q.tolist() == [0, 11]
    wrong, known, text = CAUSES[cause]
    with pytest.raises(ValueError, match=re.escape(text)):
        _unpad_xattn_input(q, k, v, Rows(wrong(keep)), keys, **known)


def test_audio_pools_and_widens_in_one_step() -> None:
    """Kernel (D, C, 5): 75 positions of 32 channels become 15 tokens of 64."""
    weight = case("single").weights()["model.mm_rand_aud_pool.weight"]
    assert weight.shape == (64, 32, 5)
    assert case("single").targets["audio.trim"].shape == (1, 75, 32)
    assert case("single").targets["audio.pool"].shape == (1, 64, 15)


def test_projector_type_null_is_read_as_mlp2x_gelu() -> None:
    official = VidiConfig.full().to_official()
    official["mm_projector_type"] = None
    assert VidiConfig.from_official(official) == VidiConfig.full()


def test_no_helper_of_flash_attn_unpads() -> None:
    """Its unpad_input returned four values once and five since 2.7."""
    assert not [str(path) for path in (ROOT / "vidi").rglob("*.py") if "bert_padding" in path.read_text("utf-8")]


def test_attention_has_no_dropout() -> None:
    assert not [name for name in inspect.signature(AttentionCall).parameters if "dropout" in name]
    official = VidiConfig.full().to_official() | {"attention_dropout": 0.1}
    with pytest.raises(ValueError, match="attention_dropout"):
        VidiConfig.from_official(official)
