"""Large pictures, many frames and long sound from files, against readers that share no code with ours.

The ffmpeg command of imageio-ffmpeg decodes, Pillow resizes, transformers' feature extraction hears.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.media import Sound, ffmpeg_command, make_video, run_ffmpeg
from tests.not_run import not_run
from vidi.inputs import audio, video

pytestmark = pytest.mark.slow

SIDE = 384
SIZES = {"1080p": (1920, 1080), "4K": (3840, 2160), "a phone's, upright": (1080, 1920)}


@pytest.fixture(scope="module", params=SIZES)
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """One frame: (path, width, height)."""
    width, height = SIZES[request.param]
    path = tmp_path_factory.mktemp("large") / "large.mp4"
    return make_video(path, num_frames=1, fps=1, width=width, height=height), width, height


@pytest.fixture(scope="module")
def full_hd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("hd") / "hd.mp4", num_frames=1, fps=1, width=1920, height=1080)


def resized(frames_FHWC: np.ndarray) -> torch.Tensor:
    """Pillow's bicubic straight to the square, as (F, 3, S, S)."""
    pictures = [Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for x in frames_FHWC]
    return torch.from_numpy(np.stack([np.asarray(x) for x in pictures])).permute(0, 3, 1, 2)


def by_ffmpeg(path: Path, width: int, height: int) -> np.ndarray:
    raw = run_ffmpeg(ffmpeg_command(), path, "-pix_fmt", "rgb24", "-f", "rawvideo")
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3)


def by_pyav(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_large_pictures_equal_pillows(large: tuple[Path, int, int]) -> None:
    path, width, height = large
    mine = video.read_frames(path).images_u8
    assert mine.shape == (1, 3, SIDE, SIDE)
    assert torch.equal(mine, resized(by_pyav(path)))
    assert torch.equal(mine, resized(by_ffmpeg(path, width, height)))


SHORTCUTS: dict[str, Callable[[Any], Any]] = {
    "reducing_gap": lambda resize: lambda self, size, how: resize(self, size, how, reducing_gap=2.0),
    "bilinear": lambda resize: lambda self, size, how: resize(self, size, Image.Resampling.BILINEAR),
    "Lanczos": lambda resize: lambda self, size, how: resize(self, size, Image.Resampling.LANCZOS),
    "two steps": lambda resize: lambda self, size, how: resize(resize(self, (768, 768), how), size, how),
    "halved first": lambda resize: lambda self, size, how: resize(self.reduce(2), size, how),
    "a square cut out": lambda resize: (
        lambda self, size, how: resize(self.crop((0, 0, min(self.size), min(self.size))), size, how)
    ),
}


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_a_shortcut_in_resizing_is_seen(shortcut: str, full_hd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = resized(by_pyav(full_hd))
    monkeypatch.setattr(Image.Image, "resize", SHORTCUTS[shortcut](Image.Image.resize))
    assert not torch.equal(video.read_frames(full_hd).images_u8, wanted)


def test_no_frame_is_cut_after_4096(tmp_path: Path) -> None:
    """4,200 seconds at one frame a second."""
    path = make_video(tmp_path / "long.mkv", num_frames=4200, fps=1, width=16, height=16)
    frames = video.read_frames(path, size=16)
    truth = by_ffmpeg(path, 16, 16)
    assert len(truth) == 4200
    assert (frames.num_frames, frames.duration_sec) == (4200, 4200.0)
    assert torch.equal(frames.images_u8, torch.from_numpy(truth.copy()).permute(0, 3, 1, 2))


def test_no_sound_is_cut_after_ten_pieces(tmp_path: Path) -> None:
    """Eleven and a half pieces of 30 s, at the release's own length and bins, every one of them."""
    try:
        from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    seconds = 345
    path = make_video(
        tmp_path / "long.mkv", num_frames=0, sound=Sound(seconds, rate_hz=16000, channels=1, codec="flac")
    )
    samples = audio.read_audio(path)
    assert samples is not None
    raw = run_ffmpeg(ffmpeg_command(), path, "-f", "s16le", "-ac", "1", "-ar", "16000")
    wanted = np.frombuffer(raw, np.int16).astype(np.float32) / 32768
    assert len(wanted) == seconds * 16000
    assert np.array_equal(samples.numpy(), wanted)
    mel, size = audio.log_mel(samples)
    assert (mel.shape, size) == ((12, 128, 3000), seconds * 100)
    extract = WhisperFeatureExtractor(feature_size=128)
    for piece in (0, 9, 10, 11):
        part = wanted[piece * 480000 : (piece + 1) * 480000]
        truth = extract(part, sampling_rate=16000, return_tensors="pt", device="cpu")["input_features"][0]
        assert torch.equal(mel[piece], truth), piece
    assert len({mel[piece].sum().item() for piece in range(12)}) == 12
