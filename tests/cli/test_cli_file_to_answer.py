"""From a file to an answer, every step known beforehand by others: frames, mel, ids, logits, tokens, ranges and times.

The ffmpeg command decodes, Pillow resizes, transformers' feature extraction hears, the tokenizers library reads, the NumPy
oracle computes on the weights in the file, and a regular expression of this file reads the answer. Nothing of `vidi` takes
part but in making the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from goldens import oracle
from tests.media import Sound, ffmpeg_command, make_video, run_ffmpeg
from tests.not_run import not_run
from vidi import generate
from vidi.checkpoint import load, synthetic
from vidi.cli import main
from vidi.config import VidiConfig
from vidi.fast import accelerate
from vidi.inputs import pixels, prompt
from vidi.inputs.batch import Batch, Sample, make_batch
from vidi.inputs.reader import Reader
from vidi.model import VidiModel

pytestmark = pytest.mark.slow

QUERY, STEPS, SEED = "a red car.", 8, 26
#: What the first two ids of the answer are made to say: two places of the vocabulary that no prompt uses.
PIECES = ("0.25-0.50 and ", "0.6250-0.9")


@dataclasses.dataclass(frozen=True)
class Known:
    """What others make of the file. images float32 in [-1, 1]; logits of each step, float64."""

    folder: Path
    film: Path
    inputs: dict[str, np.ndarray]
    tokens: list[int]
    logits_SV: np.ndarray
    text: str
    ranges: list[tuple[float, float]]
    times: str
    blind_V: np.ndarray  #: first logits with the frames in another order
    deaf_V: np.ndarray  #: first logits with another sound


def read(film: Path, tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """12 s at 5 frames a second: frames 0, 5, 10, …; sound that needs no resampling, in pieces of one second."""
    try:
        from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    command = ffmpeg_command()
    raw = np.frombuffer(run_ffmpeg(command, film, "-pix_fmt", "rgb24", "-f", "rawvideo"), np.uint8)
    frames = raw.reshape(60, 64, 96, 3)[::5]
    square = np.stack([np.asarray(Image.fromarray(x).resize((26, 26), Image.Resampling.BICUBIC)) for x in frames])
    images = (square.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    sound = np.frombuffer(run_ffmpeg(command, film, "-f", "s16le", "-ac", "1", "-ar", "16000"), np.int16) / 32768
    extract = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    pieces = [sound[i : i + 16000].astype(np.float32) for i in range(0, len(sound), 16000)]
    mel = [extract(x, sampling_rate=16000, return_tensors="pt", device="cpu")["input_features"] for x in pieces]
    sides = (
        "<start_of_turn>user\n",
        "\nDuring which time segments in the video can we see a red car?<end_of_turn>\n<start_of_turn>model\n",
    )
    before, after = (tokenizer.encode(side, add_special_tokens=False).ids for side in sides)
    return {
        "inputs.input_ids": np.array([[2, *before, -200, *after]]),
        "inputs.images.0": images,
        "inputs.audios.0": torch.cat(mel).numpy(),
        "inputs.audio_sizes": np.array([len(sound) // 160]),
    }


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    root = tmp_path_factory.mktemp("answer")
    film = make_video(
        root / "film.mkv", num_frames=60, fps=5, sound=Sound(12.0, rate_hz=16000, channels=1, codec="flac")
    )
    vocabulary = json.loads(prompt.tiny_tokenizer().to_str())
    folder = root / "checkpoint"
    synthetic.synth(folder, VidiConfig.tiny(), SEED, dtype=torch.float32)
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        weights |= load_file(shard)
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    inputs = read(film, Tokenizer.from_file(str(folder / "tokenizer.json")))
    half = np.arange(0, 40, 2, dtype=np.float64) / 40
    told = torch.exp(torch.arange(0, 40, 2, dtype=torch.float32) * (-np.log(10000.0) / 40)).numpy()
    assert np.abs(told / 10000**-half - 1).max() < 1e-6
    raw = json.loads((folder / "config.json").read_text())
    found = oracle.greedy(raw, weights, inputs, STEPS, casts="cast", pos_freq=told)
    length = int(found.lengths_B[0])
    tokens = [int(token) for token in found.tokens_BS[0, :length] if token != 107]
    assert found.gap_BS[0, :length].min() > 1e-2, "tokens must not be a matter of noise"
    others = (
        inputs | {"inputs.images.0": inputs["inputs.images.0"][::-1]},
        inputs | {"inputs.audios.0": inputs["inputs.audios.0"][::-1]},
    )
    blind, deaf = (oracle.greedy(raw, weights, x, 1, casts="cast", pos_freq=told).logits_BSK[0, 0] for x in others)
    first, second = list(dict.fromkeys(tokens))[:2]
    for token, piece in zip((first, second), PIECES, strict=True):
        del vocabulary["model"]["vocab"][f"<unused{token}>"]
        vocabulary["model"]["vocab"][piece.replace(" ", "Ġ")] = token
    (folder / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    text = Tokenizer.from_file(str(folder / "tokenizer.json")).decode(tokens)
    ranges = [(float(a), float(b)) for a, b in re.findall(r"(\d\.\d+)-(\d\.\d+)", text)]
    assert ranges
    times = ", ".join("-".join(f"00:00:{int(12 * edge):02d}" for edge in pair) for pair in ranges)
    return Known(folder, film, inputs, tokens, found.logits_BSK[0, : len(tokens)], text, ranges, times, blind, deaf)


@pytest.fixture(scope="module")
def model(known: Known) -> VidiModel:
    return load.load(known.folder, dtype=torch.float32).requires_grad_(False)


def test_the_answer_depends_on_what_is_seen_and_heard(known: Known) -> None:
    """A golden that a blind and deaf model gives too would prove little."""
    assert len(set(known.tokens)) > 3
    for other in (known.blind_V, known.deaf_V):
        assert np.abs(other - known.logits_SV[0]).max() > 1e-2
    assert known.inputs["inputs.images.0"].shape == (12, 3, 26, 26)
    assert known.inputs["inputs.audios.0"].shape == (12, 16, 100)


def _batch(film: Path, tokenizer: Tokenizer, config: VidiConfig) -> Batch:
    ids = prompt.build_ids(tokenizer, QUERY, bos_id=config.bos_id, image_placeholder=config.image_placeholder)
    with Reader(film, config) as reader:
        images, sound = torch.cat(list(reader.pictures())), reader.sound()
    assert sound is not None
    return make_batch([Sample(ids=ids, images=images, audio=sound[0], audio_size=sound[1])], config)


def test_frames_mel_and_ids(known: Known) -> None:
    tokenizer = prompt.load_tokenizer(known.folder)
    batch = _batch(known.film, tokenizer, VidiConfig.tiny())
    assert batch.images is not None
    assert batch.audios is not None
    np.testing.assert_array_equal(batch.input_ids_BT.numpy(), known.inputs["inputs.input_ids"])
    mine = pixels.normalize(batch.images[0], torch.float32, "cpu").numpy()
    np.testing.assert_array_equal(mine, known.inputs["inputs.images.0"])
    np.testing.assert_array_equal(batch.audios[0].numpy(), known.inputs["inputs.audios.0"])
    assert batch.audio_sizes == (1200,) == tuple(known.inputs["inputs.audio_sizes"])


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_logits(path: str, known: Known, model: VidiModel) -> None:
    """Of every step, from the file, to 1e-4 of their rms (gate float32-recorded)."""
    tokenizer = prompt.load_tokenizer(known.folder)
    batch = _batch(known.film, tokenizer, model.config)
    runner = accelerate(model) if path == "fast" else model
    found = generate.forced_logits(runner, batch, torch.tensor([known.tokens]))[0].numpy()
    assert found.shape == known.logits_SV.shape
    assert np.abs(found - known.logits_SV).max() <= 1e-4 * np.sqrt(np.mean(known.logits_SV**2))


def test_tokens_ranges_and_times(known: Known, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", str(known.folder), "--dtype", "float32", "--max-new-tokens", str(STEPS), "--json"]
    assert main(["retrieve", str(known.film), QUERY, *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == known.tokens
    assert said["text"] == known.text
    assert [(r["start_fraction"], r["end_fraction"]) for r in said["ranges"]] == known.ranges
    assert said["times"] == known.times
    assert said["duration_sec"] == 12.0
