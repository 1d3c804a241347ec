"""The release as data: one file of facts, held against the tests' own literals, transformers, and the code that uses them."""

from __future__ import annotations

import dataclasses
import inspect
import tomllib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from goldens.oracle import case, forward, models, nine
from stageparity.run import Trace
from tests import released, tiny
from tests.not_run import not_run
from vidi import generate, loss, official, precision, release
from vidi.bridge import fold, norm, position, visual
from vidi.checkpoint import names, synthetic
from vidi.config import AudioConfig, DecoderConfig, VidiConfig, VisionConfig
from vidi.decoder.norm import GemmaNorm
from vidi.fast import accelerate
from vidi.inputs import audio, video
from vidi.model import VidiModel

FILE = Path(release.__file__).with_name("release.toml")
TOLD = tomllib.loads(FILE.read_text(encoding="utf-8"))
FACTS = TOLD["facts"]
FULL = VidiConfig.full()
PARTS = {"vision": VisionConfig, "audio": AudioConfig, "decoder": DecoderConfig}
#: Facts of [bridge] and [tokens] that config.json does not hold.
BESIDE = {
    "visual_token_budget": 60000,
    "budget_scope": "batch",
    "bos_id": 2,
    "pad_id": 0,
    "end_of_turn_id": 107,
    "image_placeholder": -200,
    "max_positions": 8192,
}


def literals() -> dict[str, dict[str, Any]]:
    """The tests' own literals under the file's names."""
    raw = released.CONFIG
    own = {ours: raw[theirs] for theirs, ours in official.BRIDGE_FIELDS.items() if theirs in raw} | BESIDE
    return {
        "vision": {ours: released.VISION[theirs] for theirs, ours in official.VISION_FIELDS.items()},
        "audio": {ours: released.AUDIO[theirs] for theirs, ours in official.AUDIO_FIELDS.items()},
        "decoder": {ours: raw[theirs] for theirs, ours in official.DECODER_FIELDS.items()},
        "bridge": {name: own[name] for name in TOLD["bridge"]},
        "tokens": {name: own[name] for name in TOLD["tokens"]},
    }


# ---- the file ---------------------------------------------------------------------------------------------------------


def test_it_says_what_the_tests_know() -> None:
    assert {table: body for table, body in TOLD.items() if table != "facts"} == literals()


def test_every_field_of_the_configuration_is_a_fact_and_reads_it() -> None:
    chosen = {"decoder": {"kind": "gemma2", "windowed_every": 2}}  # by the model, not by its sizes
    for part, kind in PARTS.items():
        assert {field.name for field in dataclasses.fields(kind)} == {*TOLD[part], *chosen.get(part, ())}
        assert dataclasses.asdict(getattr(FULL, part)) == TOLD[part] | chosen.get(part, {})
    own = TOLD["bridge"] | TOLD["tokens"]
    grid = {"image_grid": "fold", "audio_widens": "pool", "positions_rounded": False}
    assert {field.name for field in dataclasses.fields(VidiConfig)} == {*own, *PARTS, "loss_threshold", *grid}
    assert {name: getattr(FULL, name) for name in grid} == grid
    assert {name: getattr(FULL, name) for name in own} == own
    assert FULL.loss_threshold is None
    assert VidiConfig.from_official(released.CONFIG) == VidiConfig.from_official(released.config()) == FULL


def test_every_line_names_its_source() -> None:
    table = ""
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = line.split("]")[0]
        elif " = " in line and not line.startswith("#"):
            assert "#" in line, f"{table}] {line}"
            assert "§" in line or "card" in line or "default" in line, f"{table}] {line}"


def test_what_follows_from_the_sizes() -> None:
    d = FULL.decoder
    windows = [4096 if i % 2 == 0 else None for i in range(42)]
    assert [w or None for w in FACTS["windows"]] == windows == [d.window(i) for i in range(42)]
    assert d.scale == FACTS["score_scale"] == 1 / 16
    assert FULL.vision.patches_per_side == FACTS["patches_per_side"] == 27
    assert FULL.audio.mel_frames == FACTS["mel_frames"] == 3000
    assert FACTS["vision_layers_run"] == 26
    assert FACTS["projector_inputs"] == 4 * 1152
    (whole,) = visual.groups([FACTS["frames_at_full_grid"]], FULL)
    assert (whole.side // 2) ** 2 == FACTS["tokens_per_frame"] == 196
    assert visual.groups([FACTS["frames_at_full_grid"] + 1], FULL)[0].side == 26
    assert visual.groups([5000], FULL)[0].side == fold.MIN_SIDE == FACTS["smallest_side"] == 10
    for name, factor in FACTS["width_factor"].items():
        assert precision.sqrt_in(d.hidden_size, getattr(torch, name)) == factor
    assert FACTS["width_factor"] == {"bfloat16": 59.75, "float16": 59.875}


def test_what_stands_in_the_code() -> None:
    assert norm.EPS == FACTS["bridge_eps"] == 1e-5
    assert (position.NOISE_SCALE, position.NOISE_LIMIT) == (FACTS["noise_scale"], FACTS["noise_limit"]) == (0.45, 0.45)
    half = torch.arange(0, 3584, 2, dtype=torch.float64)
    wanted = FACTS["position_base"] ** (-half / 3584)
    torch.testing.assert_close(position.frequencies(3584).double(), wanted, rtol=1e-6, atol=0)
    assert (audio.SAMPLE_RATE_HZ, audio.N_FFT, audio.HOP) == (16000, 400, 160)
    assert (FACTS["sample_rate_hz"], FACTS["n_fft"], FACTS["hop"]) == (16000, 400, 160)
    assert loss.IGNORED == FACTS["ignored_label"] == -100
    reader = inspect.signature(video.read_frames).parameters
    assert (reader["fps"].default, reader["size"].default) == (FACTS["frames_per_second"], 384)
    assert inspect.signature(generate.greedy).parameters["max_new_tokens"].default == FACTS["max_new_tokens"] == 1024
    mel = inspect.signature(audio.log_mel).parameters
    assert (mel["num_mel_bins"].default, mel["mel_frames"].default) == (128, 3000)


def test_the_oracle_knows_the_same() -> None:
    """Its own literals, and what it takes where a config is silent."""
    optional = ("rms_norm_eps", "rope_theta", "mm_image_pool_size", "mm_audio_pool_size", "mm_time_interval")
    told = released.config()
    bare = {k: v for k, v in told.items() if k not in optional}
    bare["vision_config"] = {k: v for k, v in told["vision_config"].items() if k != "layer_norm_eps"}
    bare["audio_config"] = {k: v for k, v in told["audio_config"].items() if k != "layer_norm_eps"}
    sizes = models.read(bare)
    assert sizes == models.read(told)
    assert sizes == case.Sizes(
        width=3584, num_layers=42, num_heads=16, num_kv_heads=8, head_dim=256, window=4096, score_scale=1 / 16,
        attn_softcap=50.0, final_softcap=30.0, norm_eps=1e-6, rope_theta=10000.0, image_pool=2, audio_pool=5,
        time_interval=10000, token_budget=60000, budget_scope="batch", patch=14, vision_layers_run=26, vision_heads=16,
        vision_eps=1e-6, audio_layers=32, audio_heads=20, audio_positions=1500, audio_eps=1e-5, stop_id=107,
        placeholder=-200, windowed_every=2, embed_factor=3584**0.5, parts=nine.PARTS,
    )  # fmt: skip


# ---- public defaults --------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    return transformers


@pytest.mark.slow  # seconds of imports
def test_the_vision_tower_is_the_public_so400m() -> None:
    """Models of transformers that default to SigLIP so400m: LLaVA-OneVision at patch14-384, cut to the layers that are run,
    and PaliGemma at 224 pixels, whole."""
    transformers = _transformers()
    at_384 = transformers.LlavaOnevisionConfig().vision_config
    for name in ("image_size", "patch_size", "hidden_size", "num_attention_heads", "intermediate_size"):
        assert getattr(at_384, name) == released.VISION[name] == TOLD["vision"][official.VISION_FIELDS[name]], name
    assert at_384.num_hidden_layers == FACTS["vision_layers_run"]
    at_224 = transformers.PaliGemmaConfig().vision_config
    for name in ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(at_224, name) == TOLD["vision"][official.VISION_FIELDS[name]], name
    plain = transformers.SiglipVisionConfig()
    for name in ("num_channels", "layer_norm_eps"):
        assert getattr(plain, name) == TOLD["vision"][official.VISION_FIELDS[name]], name
    assert plain.hidden_act == official.VISION_REQUIRED["hidden_act"]


def test_the_audio_tower_is_whisper_large_v3() -> None:
    """Qwen2-Audio's encoder defaults to its sizes; Whisper's own classes know the rest."""
    transformers = _transformers()
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    large = transformers.Qwen2AudioEncoderConfig()
    for name, ours in official.AUDIO_FIELDS.items():
        if name != "layer_norm_eps":
            assert getattr(large, name) == TOLD["audio"][ours], name
    small = transformers.WhisperConfig(d_model=8, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=8)
    encoder = WhisperEncoder(small)
    eps = {m.eps for m in encoder.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert eps == {TOLD["audio"]["layer_norm_eps"]}
    assert small.max_source_positions == TOLD["audio"]["max_source_positions"]
    assert small.activation_function == official.AUDIO_REQUIRED["activation_function"]


def test_the_decoder_is_gemma_2() -> None:
    """What the public configuration gives for every size; the 9B's own widths are the shapes of its checkpoint, which
    test_checkpoint_names holds against the recorded names."""
    gemma = _transformers().Gemma2Config()
    for name in (
        *("vocab_size", "head_dim", "sliding_window", "query_pre_attn_scalar", "rms_norm_eps"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    ):
        assert getattr(gemma, name) == TOLD["decoder"][official.DECODER_FIELDS[name]], name
    assert gemma.rope_parameters["rope_theta"] == TOLD["decoder"]["rope_theta"]
    assert gemma.max_position_embeddings == TOLD["tokens"]["max_positions"]
    assert (gemma.bos_token_id, gemma.pad_token_id) == (TOLD["tokens"]["bos_id"], TOLD["tokens"]["pad_id"])
    sliding = [kind == "sliding_attention" for kind in gemma.layer_types]
    assert sliding == [bool(w) for w in FACTS["windows"][: len(sliding)]]
    assert TOLD["decoder"]["num_heads"] == 2 * TOLD["decoder"]["num_kv_heads"]


# ---- the model that is built from it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> VidiModel:
    with torch.device("meta"):
        return VidiModel(FULL)


def test_every_part_of_the_built_model_has_the_released_numbers(built: VidiModel) -> None:
    """Read from the modules that compute: a number that one of them does not take from the configuration shows."""
    assert sum(p.numel() for p in built.parameters()) == FACTS["parameters"]
    assert len(names.expected(FULL)) + 1 == FACTS["tensors"]  # the tied head is counted, and never saved
    assert [layer.window for layer in built.decoder.layers] == [w or None for w in FACTS["windows"]]
    for layer in built.decoder.layers:
        config = layer.attention.config
        assert (config.num_heads, config.num_kv_heads, config.head_dim) == (16, 8, 256)
        assert (config.scale, config.attn_softcap) == (1 / 16, 50.0)
    assert {m.eps for m in built.decoder.modules() if isinstance(m, GemmaNorm)} == {1e-6}
    assert (built.decoder.config.final_softcap, built.decoder.config.rope_theta) == (30.0, 10000.0)
    for tower, layers, heads, width, eps in (
        (built.vision_tower, 27, 16, 72, 1e-6),
        (built.audio_tower, 32, 20, 64, 1e-5),
    ):
        assert len(tower.layers) == layers
        assert {(layer.attention.num_heads, layer.attention.scale) for layer in tower.layers} == {(heads, width**-0.5)}
        assert {m.eps for m in tower.modules() if isinstance(m, torch.nn.LayerNorm)} == {eps}
    patch = built.vision_tower.patch_embed
    assert (patch.kernel_size, patch.stride, patch.padding) == ((14, 14), (14, 14), (0, 0))
    convolutions = [(c.kernel_size, c.stride, c.padding) for c in (built.audio_tower.conv1, built.audio_tower.conv2)]
    assert convolutions == [((3,), (1,), (1,)), ((3,), (2,), (1,))]
    bridge = built.bridge
    assert (bridge.audio_pool.kernel_size, bridge.audio_pool.stride, bridge.audio_pool.bias) == ((5,), (5,), None)
    assert [m.extent for m in (bridge.pos_h, bridge.pos_w, bridge.pos_t)] == [2, 2, 10000]
    assert bridge.image_projector.fc1.in_features == FACTS["projector_inputs"]


def test_a_fresh_norm_starts_at_mm_std() -> None:
    for std in (FULL.norm_std, 0.25):
        weight = VidiModel(tiny.config(norm_std=std)).bridge.llm_norm.weight
        assert torch.equal(weight, torch.full_like(weight, std))


@pytest.fixture(scope="module")
def deep() -> VidiModel:
    """All 42 layers at tiny width."""
    config = tiny.config(window=3)
    deep = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=42))
    return synthetic.create(deep, seed=7, dtype=torch.float64).requires_grad_(False)


@pytest.fixture(scope="module")
def deep_truth(deep: VidiModel) -> dict[str, np.ndarray]:
    raw = deep.config.to_official()
    weights = {w.official: deep.get_parameter(w.ours).numpy() for w in names.expected(deep.config).values()}
    ids = np.array([[2, 9, 4, -200, *range(20, 29)]])
    return forward(
        raw,
        weights,
        {"inputs.input_ids": ids},
        pos_freq=position.frequencies(40).numpy(),
        keep=["layer.*.t2t", "logits"],
    )


@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_each_of_the_42_layers_attends_as_the_oracles(fast: bool, deep: VidiModel, deep_truth: dict) -> None:
    """Text past the window: a window, scale, cap or frequency that is another one from some layer on shows there."""
    runner = accelerate(deep) if fast else deep
    seen = Trace()
    batch = tiny.make([tiny.sample(12, 0, 0)])
    ids = torch.tensor([[2, 9, 4, -200, *range(20, 29)]])
    batch = dataclasses.replace(batch, input_ids_BT=ids, keep_BT=torch.ones_like(ids, dtype=torch.bool))
    with torch.no_grad():
        logits = runner(batch, tap=seen)
    for i in range(42):
        tiny.assert_close(seen.tensors()[f"layer.{i}.t2t"], torch.from_numpy(deep_truth[f"layer.{i}.t2t"]))
    tiny.assert_close(logits, torch.from_numpy(deep_truth["logits"]))
    if fast:
        assert [w.scores.window for w in runner.layers] == [3, None] * 21


# ---- a config.json that contradicts it ----------------------------------------------------------------------------------

NUMBERS = [
    *((("vision_config", name), value) for name, value in released.VISION.items()),
    *((("audio_config", name), value) for name, value in released.AUDIO.items()),
    *(((name,), released.CONFIG[name]) for name in official.DECODER_FIELDS),
    *(((name,), released.CONFIG[name]) for name in ("mm_audio_pool_size", "mm_time_interval", "mm_std")),
    *(((name,), value) for name, value in (("bos_token_id", 2), ("pad_token_id", 0), ("end_of_turn_id", 107))),
    *(((name,), value) for name, value in (("image_placeholder", -200), ("max_position_embeddings", 8192))),
]
WIDTHS = {"hidden_size", "d_model"}


def contradicting(path: tuple[str, ...], value: float) -> dict[str, Any]:
    raw = released.config()
    inner = raw if len(path) == 1 else raw[path[0]]
    # twice as much keeps every divisibility; heads of a tower must divide its width
    inner[path[-1]] = {"num_attention_heads": 18 if len(path) == 2 else 32, "encoder_attention_heads": 16}.get(
        path[-1], value * 2 or 1
    )
    return raw


@pytest.mark.parametrize(("path", "value"), NUMBERS, ids=[".".join(path) for path, _ in NUMBERS])
def test_a_contradiction_is_named(path: tuple[str, ...], value: float) -> None:
    raw = contradicting(path, value)
    if path[-1] in WIDTHS:  # another width is another model
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            VidiConfig.from_official(raw)
        return
    with pytest.warns(release.ReleaseWarning) as seen:
        config = VidiConfig.from_official(raw)
    assert len(seen) == 1
    told = str(seen[0].message)
    assert f"{'.'.join(path)} = " in told
    assert f"(the release has {value!r})" in told
    assert told.count("the release has") == 1
    assert seen[0].filename == __file__
    assert config != FULL


def test_the_choices_of_whoever_runs_it_are_no_contradiction() -> None:
    free = {"visual_token_budget": 30000, "budget_scope": "video", "loss_thres": 2.0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert VidiConfig.from_official(released.config(**free)).visual_token_budget == 30000
        VidiConfig.from_official(tiny.config().to_official())
