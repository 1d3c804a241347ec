"""Reading the official config.json: what is known, what is refused, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests import released
from vidi.bridge import visual
from vidi.config import AudioConfig, ConfigError, VidiConfig, VisionConfig
from vidi.model import VidiModel

RELEASED = dict(released.CONFIG)
TINY = VidiConfig.tiny().to_official()


def test_the_released_file_is_the_full_model():
    assert VidiConfig.from_official(RELEASED) == VidiConfig.full()


def test_a_null_projector_is_the_one_in_the_checkpoint():
    for kind in (None, "mlp2x_gelu"):
        assert VidiConfig.from_official(RELEASED | {"mm_projector_type": kind}) == VidiConfig.full()


@pytest.mark.parametrize("config", [VidiConfig.tiny(), VidiConfig.full()], ids=["tiny", "full"])
def test_it_reads_what_it_writes(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config.to_official()))
    assert VidiConfig.from_file(tmp_path) == config
    assert VidiConfig.from_file(tmp_path / "config.json") == config


def test_every_field_survives(tmp_path):
    """Also those that the released file lacks: budget and scope, threshold, ids."""
    config = dataclasses.replace(
        VidiConfig.tiny(), visual_token_budget=123, budget_scope="video", loss_threshold=2.5, bos_id=5, pad_id=1,
        norm_std=0.5, time_interval=77, end_of_turn_id=9, image_placeholder=-3, max_positions=99,
        audio=dataclasses.replace(VidiConfig.tiny().audio, layer_norm_eps=0.5),
    )  # fmt: skip
    assert VidiConfig.from_official(config.to_official()) == config


def test_towers_default_to_the_public_models_and_can_be_given():
    bare = {k: v for k, v in TINY.items() if k not in ("vision_config", "audio_config")}
    default = VidiConfig.from_official(bare)
    assert default.vision == VisionConfig()
    assert default.audio == AudioConfig()
    tiny = VidiConfig.tiny()
    assert VidiConfig.from_official(bare, vision=tiny.vision, audio=tiny.audio) == tiny
    given = VidiConfig.from_official(bare, vision=TINY["vision_config"], audio=TINY["audio_config"])
    assert given == tiny


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type = 'linear'"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer = -1"),
        ({"mm_input_type": "image"}, "mm_input_type = 'image'"),
        ({"model_type": "llama"}, "model_type = 'llama'"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"mm_image_pool_size": 3}, "mm_image_pool_size 3"),
        (dict.fromkeys("gdfabce", 1), "unknown fields: a, b, c, d, e, f, g; remove"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"max_position_embeddings": 10**18}, "max_positions = 1000000000000000000 (a whole number from 1 to 2,147"),
        ({"max_position_embeddings": 10**400}, "max_positions = an integer of many digits"),
        ({"rms_norm_eps": 1e-300}, "rms_norm_eps = 1e-300 (a number from 1e-12 to 1,000,000,000)"),
        ({"rope_theta": float("inf")}, "rope_theta = inf"),
        ({"loss_thres": 10**400}, "loss_threshold = an integer of many digits"),
        ({"budget_scope": "\x1b[2J" * 999}, r"budget_scope '\x1b[2J"),
        ({"vision_config": {**TINY["vision_config"], "patch_size": 64}}, "patches of 64 pixels in images of 26"),
        ({"budget_scope": "hour"}, "budget_scope 'hour'"),
        ({"visual_token_budget": 0}, "visual_token_budget"),
        ({"hidden_size": "forty"}, "hidden_size"),
        ({"vision_config": {**TINY["vision_config"], "hidden_size": 33}}, "vision width 33"),
        ({"vision_config": {**TINY["vision_config"], "num_hidden_layers": 1}}, "at least 2 layers"),
        (
            {"vision_config": TINY["vision_config"] | dict.fromkeys("gdfabce", 2)},
            "unknown fields in vision_config: a, b, c, d, e, f, g",
        ),
        ({"vision_config": {**TINY["vision_config"], "hidden_act": "relu"}}, "vision_config.hidden_act = 'relu'"),
        ({"audio_config": {**TINY["audio_config"], "nb_max_frames": 7}}, "nb_max_frames 7"),
        ({"audio_config": "whisper"}, "audio_config: an object is expected"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change, said):
    with pytest.raises(ConfigError, match=r".*") as refused:
        VidiConfig.from_official(TINY | change)
    assert said in str(refused.value)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 1300


def test_a_whole_number_is_a_real_one():
    """JSON writers turn 1.0 into 1; a weight initialised with an integer is no weight."""
    config = VidiConfig.from_official(TINY | {"mm_std": 1})
    assert type(config.norm_std) is float
    VidiModel(config)


def test_a_name_as_long_as_a_file_is_cut():
    with pytest.raises(ConfigError) as refused:
        VidiConfig.from_official(TINY | {"a" * 1_000_000: 1})
    assert len(str(refused.value)) < 1300


@pytest.mark.parametrize("field", ["sliding_window", "head_dim", "query_pre_attn_scalar", "rope_theta"])
def test_missing_fields_are_named(field):
    with pytest.raises(ConfigError, match=f"missing fields: {field}"):
        VidiConfig.from_official({k: v for k, v in TINY.items() if k != field})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "damaged JSON"),
        (b"[]", "a JSON object is expected"),
        (b"\xff\xfe", "damaged JSON"),
        (json.dumps(TINY)[:-1].encode() + b', "vocab_size": 512}', "vocab_size: appears twice"),
        (json.dumps(TINY | {"max_position_embeddings": 10**400}).encode(), "max_position_embeddings: 1"),
        (json.dumps(TINY | {"max_position_embeddings": 10**30}).encode(), "max_position_embeddings: 1"),
    ],
)
def test_broken_files_are_named(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        VidiConfig.from_file(tmp_path)
    assert str(path) in str(refused.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        VidiConfig.from_file(tmp_path / "nowhere")


def test_even_layers_slide():
    decoder = VidiConfig.tiny().decoder
    assert [decoder.window(i) for i in range(4)] == [8, None, 8, None]
    assert VidiConfig.full().decoder.scale == 1 / 16
    assert VidiConfig.full().vision.patches_per_side == 27
    assert VidiConfig.full().audio.mel_frames == 3000


def test_tiny_sizes_make_every_feature_bite():
    tiny = VidiConfig.tiny()
    d = tiny.decoder
    assert d.num_heads > d.num_kv_heads > 1
    assert d.num_heads * d.head_dim != d.hidden_size
    assert d.scale != d.head_dim**-0.5
    assert not (d.hidden_size**0.5).is_integer()
    assert d.sliding_window < 20
    assert tiny.vision.patches_per_side % 2 == 1


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        VidiConfig.tiny().bos_id = 3  # type: ignore[misc]


def test_the_golden_configs_are_read():
    """The recordings' configs carry the towers' sizes and the release's switches."""
    goldens = Path(__file__).parents[2] / "goldens"
    found = [
        json.loads(p.read_text())["config"] for p in sorted(goldens.glob("*/*.json")) if p.with_suffix(".h5").exists()
    ]
    assert len(found) >= 17
    for raw in found:
        assert VidiConfig.from_official(raw).decoder.num_layers == raw["num_hidden_layers"]


def test_the_tiny_budget_bites_past_sixteen_frames() -> None:
    sides = [visual.groups([frames], VidiConfig.tiny())[0].side for frames in (16, 17)]
    assert sides == [14, 12]
