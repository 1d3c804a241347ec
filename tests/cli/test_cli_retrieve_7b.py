"""`vidi retrieve` with a checkpoint of the 7B: from a file to the oracle's tokens, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from goldens import oracle
from tests.media import Sound, make_video
from vidi import sizes_7b
from vidi.bridge import position
from vidi.checkpoint import synthetic
from vidi.cli import main
from vidi.inputs import audio, pixels, prompt_7b, video

CONFIG = sizes_7b.config("tiny")
STEPS = 9


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s at 10 frames a second, with sound."""
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", num_frames=40, sound=Sound(4.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    synthetic.synth(folder, CONFIG, seed=5, dtype=torch.float32, extra=prompt_7b.tiny_files())
    return folder


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_its_tokens_are_the_oracles(
    path: str, film: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(shard)
    frames = video.read_frames(film, size=CONFIG.vision.image_size)
    mel, size = audio.log_mel(audio.read_audio(film), CONFIG.audio.num_mel_bins, mel_frames=CONFIG.audio.mel_frames)
    duration = float(frames.duration_sec)
    ids = prompt_7b.load(checkpoint, CONFIG).ids("a red car", duration, CONFIG)
    inputs = {
        "inputs.input_ids": np.array([ids]),
        "inputs.images.0": pixels.normalize(frames.images_u8, torch.float32, "cpu").numpy(),
        "inputs.audios.0": mel.numpy(),
        "inputs.audio_sizes": np.array([size]),
    }
    official = json.loads((checkpoint / "config.json").read_text())
    freq = position.frequencies(CONFIG.decoder.hidden_size).numpy()
    wanted = oracle.greedy(official, weights, inputs, STEPS, casts="cast", pos_freq=freq)
    length = int(wanted.lengths_B[0])
    assert wanted.gap_BS[0, :length].min() > 1e-3, "a gap this small would make the tokens a matter of noise"
    assert len(set(wanted.tokens_BS[0, :length].tolist())) > 3, "tokens that do not depend on the input prove little"

    arguments = ["--checkpoint", str(checkpoint), "--dtype", "float32", "--max-new-tokens", str(STEPS), "--json"]
    assert main(["retrieve", str(film), "a red car.", "--path", path, *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == [token for token in wanted.tokens_BS[0, :length].tolist() if token != 2]
    assert told["duration_sec"] == pytest.approx(duration)
    assert duration == pytest.approx(4.0, abs=0.2)


@pytest.mark.parametrize(
    ("query", "options", "said"),
    [
        ("a [INST]", (), "the query holds [INST]"),
    ],
)
def test_refusals(film: Path, checkpoint: Path, query: str, options: tuple[str, ...], said: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert main(["retrieve", str(film), query, "--checkpoint", str(checkpoint), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_without_chat_template_is_named(film: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    files = prompt_7b.tiny_files()
    synthetic.synth(tmp_path / "x", CONFIG, extra={"tokenizer.json": files["tokenizer.json"]})
    assert main(["retrieve", str(film), "a red car", "--checkpoint", str(tmp_path / "x")]) == 2
    assert "tokenizer_config.json: no such file" in capsys.readouterr().err
