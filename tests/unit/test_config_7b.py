"""Reading the 7B's config.json: what it must say, what is refused, by name (its spec, §1)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests import seven
from vidi.config import ConfigError, VidiConfig


def test_what_the_model_is() -> None:
    config = seven.config()
    assert (config.image_grid, config.audio_widens, config.positions_rounded) == ("conv", "projector", True)
    assert (config.image_pool_size, config.audio_pool_size, config.time_interval) == (3, 4, 5000)
    assert (config.bos_id, config.end_of_turn_id, config.max_positions) == (1, 2, 32768)
    decoder = config.decoder
    assert decoder.kind == "mistral"
    assert (decoder.attn_softcap, decoder.final_softcap) == (None, None)
    assert decoder.scale == 8**-0.5
    assert [decoder.window(i) for i in range(3)] == [5, 5, 5]


@pytest.mark.parametrize(
    "absent",
    [
        *("rope_theta", "sliding_window", "rms_norm_eps", "num_key_value_heads", "eos_token_id"),
        *("mm_image_pool_size", "mm_audio_pool_size", "mm_time_interval", "mm_std", "mm_input_type"),
    ],
)
def test_what_no_text_tells_must_be_there(absent: str) -> None:
    raw = {name: value for name, value in seven.OFFICIAL.items() if name != absent}
    with pytest.raises(ConfigError, match=f"missing fields: {absent}"):
        VidiConfig.from_official(raw)


def test_the_towers_name_must_be_there_where_its_sizes_are_not() -> None:
    raw = {name: value for name, value in seven.OFFICIAL.items() if name != "mm_vision_tower"}
    assert VidiConfig.from_official(raw) == seven.config()
    del raw["vision_config"]
    with pytest.raises(ConfigError, match="missing fields: mm_vision_tower"):
        VidiConfig.from_official(raw)


def test_every_absent_field_is_named_at_once() -> None:
    raw = {name: value for name, value in seven.OFFICIAL.items() if name not in ("mm_std", "rope_theta")}
    with pytest.raises(ConfigError, match="missing fields: mm_std, rope_theta"):
        VidiConfig.from_official(raw)


def test_a_null_window_is_none_and_an_absent_head_dim_follows() -> None:
    assert seven.config(sliding_window=None).decoder.window(1) is None
    raw = {name: value for name, value in seven.OFFICIAL.items() if name != "head_dim"} | {"num_attention_heads": 5}
    assert VidiConfig.from_official(raw | {"num_key_value_heads": 1}).decoder.head_dim == 8
    assert seven.config(head_dim=None, num_attention_heads=10, num_key_value_heads=5).decoder.head_dim == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, r"hidden_act = 'gelu_pytorch_tanh' \(this model computes 'silu'\)"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings = True \(this model computes False\)"),
        ({"mm_input_type": "image"}, r"mm_input_type = 'image' \(this model computes 'video'\)"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14"}, "mm_vision_tower = 'openai/clip"),
        ({"attn_logit_softcapping": 50.0}, "unknown fields: attn_logit_softcapping"),
        ({"visual_token_budget": 60000}, "unknown fields: visual_token_budget"),
        ({"mm_image_pool_size": 14}, "mm_image_pool_size 14: the grid has 13 patches a side"),
        ({"sliding_window": 0}, "sliding_window = 0"),
        ({"sliding_window": 4096.5}, "sliding_window = 4096.5"),
    ],
)
def test_what_it_cannot_honour_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        seven.config(**change)


def test_without_a_model_type_the_decoders_own_fields_tell() -> None:
    """As in the recordings of both releases."""
    raw = {name: value for name, value in seven.OFFICIAL.items() if name != "model_type"}
    assert VidiConfig.from_official(raw) == seven.config()
    nine = {name: value for name, value in VidiConfig.tiny().to_official().items() if name != "model_type"}
    assert VidiConfig.from_official(nine) == VidiConfig.tiny()


def test_it_reads_what_it_writes(tmp_path: Path) -> None:
    for config in (seven.config(), seven.config(sliding_window=None), seven.config(loss_thres=0.5)):
        written = config.to_official()
        assert written["model_type"] == "dattn_mistral"
        (tmp_path / "config.json").write_text(json.dumps(written))
        assert VidiConfig.from_file(tmp_path) == config


def test_the_nines_parts_are_as_before() -> None:
    full = VidiConfig.full()
    assert (full.image_grid, full.audio_widens, full.positions_rounded) == ("fold", "pool", False)
    assert [full.decoder.window(i) for i in range(3)] == [4096, None, 4096]
    assert full.decoder.scale == 256**-0.5
    with pytest.raises(ConfigError, match="head_dim = None"):
        VidiConfig.from_official(VidiConfig.tiny().to_official() | {"head_dim": None})
    with pytest.raises(ConfigError, match="only 2 is specified"):
        dataclasses.replace(full, image_pool_size=3)
