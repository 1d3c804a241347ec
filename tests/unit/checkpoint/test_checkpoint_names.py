"""The name table against the released file's list of tensors, and against the model."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path

import pytest
import torch

from tests.not_run import not_run
from tests.oracle.recordings import FOLDER_7B
from vidi.checkpoint import load, names
from vidi.config import VidiConfig
from vidi.model import VidiModel

RECORDINGS = Path(os.environ.get("VIDI_RECORDINGS", Path(__file__).parents[4] / "shared" / "official"))


def _listed(file: str) -> dict[str, tuple[int, ...]]:
    path = RECORDINGS / file
    if not path.is_file():
        not_run(f"{path} is not here; VIDI_RECORDINGS names the folder of recordings of the official release")
    lines = (line.split("\t") for line in path.read_text().splitlines())
    return {fields[0]: tuple(json.loads(fields[1])) for fields in lines}


def test_full_size_is_the_released_list_of_tensors() -> None:
    listed = _listed("full_size_keys.tsv")
    assert len(listed) == 1424
    assert listed.pop(names.HEAD) == listed[names.HEAD_TIED_TO]
    assert listed == {name: want.shape for name, want in names.expected(VidiConfig.full()).items()}


def test_tiny_recordings_have_the_same_names() -> None:
    listed, raw = _listed("keys.tsv"), json.loads((RECORDINGS / "index.json").read_text())
    config = VidiConfig.from_official(raw["llm_config"], vision=raw["vision_config"], audio=raw["audio_config"])
    del listed[names.HEAD]
    assert listed == {name: want.shape for name, want in names.expected(config).items()}


def _listed_7b(file: str) -> dict[str, tuple[int, ...]]:
    if not (FOLDER_7B / file).is_file():
        not_run(
            f"{FOLDER_7B / file} is not here; VIDI_RECORDINGS_7B names the folder of recordings of the 7B's release"
        )
    lines = (line.split("\t") for line in (FOLDER_7B / file).read_text().splitlines())
    return {fields[0]: tuple(json.loads(fields[1])) for fields in lines}


def test_the_7b_at_full_size_is_the_releases_list_of_tensors() -> None:
    raw = {
        "model_type": "dattn_mistral", "vocab_size": 32768, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": None,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "eos_token_id": 2, "mm_image_pool_size": 2, "mm_audio_pool_size": 5,
        "mm_time_interval": 10000, "mm_std": 0.029, "mm_input_type": "video",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    }  # fmt: skip
    wanted = names.expected(VidiConfig.from_official(raw))
    assert len(wanted) == 1251
    assert sum(math.prod(want.shape) for want in wanted.values()) == 8_725_754_944
    assert _listed_7b("full_keys_7b.tsv") == {name: want.shape for name, want in wanted.items()}


def test_the_7bs_tiny_recordings_have_the_same_names() -> None:
    listed, raw = _listed_7b("keys.tsv"), json.loads((FOLDER_7B / "index.json").read_text())
    config = VidiConfig.from_official(raw["llm_config"], vision=raw["vision_config"], audio=raw["audio_config"])
    wanted = names.expected(config)
    assert listed == {name: want.shape for name, want in wanted.items()}
    assert all(names.our_name(name, config) == want.ours for name, want in wanted.items())
    assert all(names.official_name(want.ours, config) == name for name, want in wanted.items())
    model = VidiModel(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {w.ours: w.shape for w in wanted.values()}


def test_full_size_counts() -> None:
    """The same totals where the recordings are not at hand."""
    wanted = names.expected(VidiConfig.full()).values()
    assert len(wanted) == 1423
    assert sum(math.prod(want.shape) for want in wanted) == 10_462_005_312
    count = {part: sum(want.part == part for want in wanted) for part in names.PARTS}
    assert count == {"vision_tower": 448, "audio_tower": 487, "bridge": 24, "decoder": 464}
    size = {part: sum(math.prod(want.shape) for want in wanted if want.part == part) for part in names.PARTS}
    assert size == {
        "vision_tower": 428_225_600,
        "audio_tower": 636_968_960,
        "bridge": 155_104_768,
        "decoder": 9_241_705_984,
    }


@pytest.mark.parametrize(
    ("official", "ours", "shape"),
    [
        ("model.layers.41.self_attn.k_proj.weight", "decoder.layers.41.attention.k.weight", (2048, 3584)),
        ("model.layers.7.self_attn.o_proj.weight", "decoder.layers.7.attention.o.weight", (3584, 4096)),
        ("model.mm_rand_img_projector.model.0.weight", "bridge.image_projector.fc1.weight", (3584, 4608)),
        ("model.mm_rand_aud_pool.weight", "bridge.audio_pool.weight", (3584, 1280, 5)),
        ("model.mm_rand_pos_t.mlp.2.bias", "bridge.pos_t.fc2.bias", (3584,)),
        ("model.mm_aud.encoder.layers.31.final_layer_norm.bias", "audio_tower.layers.31.norm2.bias", (1280,)),
        ("model.mm_vis.vision_model.head.attention.in_proj_weight", "vision_tower.unused.in_proj_weight", (3456, 1152)),
    ],
)
def test_a_name_both_ways(official: str, ours: str, shape: tuple[int, ...]) -> None:
    want = names.expected(VidiConfig.full())[official]
    assert (want.ours, want.shape) == (ours, shape)
    assert names.our_name(official) == ours
    assert names.official_name(ours) == official


def test_the_table_is_a_bijection() -> None:
    wanted = names.expected(VidiConfig.full())
    assert len({want.ours for want in wanted.values()}) == len(wanted)
    assert all(names.our_name(name) == want.ours for name, want in wanted.items())
    assert all(names.official_name(want.ours) == name for name, want in wanted.items())


@pytest.mark.parametrize(
    "name",
    [
        "",
        "model.layers.{i}.mlp.up_proj.weight",
        "model.layers.03.mlp.up_proj.weight",
        "model.layers.٣.mlp.up_proj.weight",
        "model.layers.3.mlp.up_proj.bias",
        "model.layers..mlp.up_proj.weight",
        "lm_head.weight",
        "model.mm_aud.encoder.layers.0.self_attn.k_proj.bias",
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert names.our_name(name) is None


def test_only_position_mlps_are_float32() -> None:
    kept = {want.ours for want in names.expected(VidiConfig.full()).values() if want.is_float32}
    assert kept == {f"bridge.pos_{axis}.fc{n}.{leaf}" for axis in "hwt" for n in (1, 2) for leaf in ("weight", "bias")}


@pytest.mark.parametrize("config", [VidiConfig.tiny(), VidiConfig.full()], ids=["tiny", "full"])
def test_the_model_has_exactly_these_parameters(config: VidiConfig) -> None:
    """On the meta device, so that full size costs nothing; `empty_model` itself refuses a difference."""
    model = load.empty_model(config, device="meta", dtype=torch.bfloat16, only=set())
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {want.ours: want.shape for want in names.expected(config).values()}


def test_sizes_that_are_no_sizes_are_refused() -> None:
    from dataclasses import replace

    config = VidiConfig.tiny()
    with pytest.raises(ValueError, match="decoder a size layers = 1000000"):
        names.expected(replace(config, decoder=replace(config.decoder, num_layers=1_000_000)))


def test_sizes_may_be_as_large_as_the_configuration_allows() -> None:
    config = VidiConfig.tiny()
    wide = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=(1 << 31) - 1))
    assert names.expected(wide)[names.HEAD_TIED_TO].shape[0] == (1 << 31) - 1
