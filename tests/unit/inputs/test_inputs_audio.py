"""Sound against the ffmpeg command, log-mel features against Whisper's feature extraction in torch."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch

from tests.media import Sound, ffmpeg_command, make_picture, make_sound, make_video, run_ffmpeg, truncate
from tests.not_run import not_run
from vidi.inputs import audio
from vidi.inputs import container as media
from vidi.inputs.container import MediaError

SOUNDS = [
    ("a.mp4", Sound(2.3, 44100, 2)),
    ("b.mp4", Sound(2.3, 48000, 1)),
    ("c.mkv", Sound(2.3, 44100, 1)),
    ("d.mkv", Sound(2.3, 44100, 2, "flac")),
    ("e.mkv", Sound(2.3, 16000, 1, "pcm_s16le")),
    ("f.webm", Sound(2.3, 48000, 2)),
    ("g.mp4", Sound(0.01, 44100, 2)),
    ("h.mp4", Sound(2.3, 44100, 2, "libmp3lame")),
]


def by_command(command, path):
    raw = run_ffmpeg(command, path, "-vn", "-ac", "1", "-ar", "16000", "-f", "s16le")
    return torch.from_numpy(np.frombuffer(raw, np.int16).astype(np.float32) / 32768)


@pytest.mark.parametrize(("name", "sound"), SOUNDS)
def test_samples_equal_the_ffmpeg_command(tmp_path, name, sound):
    command = ffmpeg_command(same_generation=True)
    path = make_video(tmp_path / name, num_frames=3, sound=sound)
    assert torch.equal(audio.read_audio(path), by_command(command, path))


@pytest.mark.parametrize(("name", "sound"), SOUNDS)
@pytest.mark.parametrize("sound_first", [False, True])
def test_samples_are_the_sound_that_went_in(tmp_path, name, sound, sound_first):
    path = make_video(tmp_path / name, num_frames=3, sound=sound, sound_first=sound_first)
    samples = audio.read_audio(path)
    assert samples.dtype == torch.float32
    source = make_sound(sound).astype(np.float64).mean(axis=0) / 32768
    padding = 1152 / sound.rate_hz if path.suffix == ".mkv" else 0  # no index states where an encoder's padding begins
    assert 0 <= len(samples) - len(source) * 16000 / sound.rate_hz <= padding * 16000 * 2 + 1
    if sound.seconds < 1:
        return
    # Against the source at its own rate. Correlation: a priming of 1024 samples that stays turns the phase over.
    # Loudness: a wrong mix is √2 louder, half of that is allowed to lossy codecs.
    at_16k = np.interp(np.arange(len(samples)) / 16000, np.arange(len(source)) / sound.rate_hz, source)
    ours = samples.numpy().astype(np.float64)
    assert np.corrcoef(ours[1600:36000], at_16k[1600:36000])[0, 1] > 0.99
    assert np.std(ours[1600:36000]) == pytest.approx(np.std(at_16k[1600:36000]), rel=0.2)


def test_pcm_at_16_khz_comes_back_exactly(tmp_path):
    sound = Sound(1.0, 16000, 1, "pcm_s16le")
    path = make_video(tmp_path / "a.mkv", num_frames=1, sound=sound)
    assert torch.equal(audio.read_audio(path), torch.from_numpy(make_sound(sound)[0].astype(np.float32) / 32768))


def test_an_mp4s_padding_is_dropped(tmp_path):
    # 2.3 s are 99 packets of 1024 samples and a part of one more.
    path = make_video(tmp_path / "a.mp4", num_frames=3, sound=Sound(2.3, 44100, 2))
    assert len(audio.read_audio(path)) == 36800


def test_no_sound(tmp_path):
    assert audio.read_audio(make_video(tmp_path / "a.mp4", num_frames=3)) is None


def test_a_stream_without_a_sample_is_no_sound(tmp_path):
    """As of a recording whose microphone gave nothing: it is read as one without sound."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as out:
        pictures = out.add_stream("mjpeg", rate=1)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuvj420p"
        out.add_stream("pcm_s16le", rate=16000).layout = "mono"
        picture = av.VideoFrame.from_ndarray(make_picture(0, 32, 32), format="rgb24").reformat(format="yuvj420p")
        out.mux([*pictures.encode(picture), *pictures.encode(None)])
    with media.open_media(path) as container:
        assert media.first_stream(container, "audio") is not None
    assert audio.read_audio(path) is None


def test_sound_alone(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=0, sound=Sound(0.5))
    assert len(audio.read_audio(path)) == 8000


@pytest.mark.parametrize("content", [b"", b"no sound" * 500])
def test_what_is_no_media_file(tmp_path, content):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"a\.mp4"):
        audio.read_audio(path)


def test_sound_that_ends_early(tmp_path):
    path = make_video(tmp_path / "a.mkv", num_frames=60, sound=Sound(6.0))
    with pytest.raises(MediaError, match=r"cut short|corrupt"):
        audio.read_audio(truncate(path, 0.5))


# ---- log-mel ------------------------------------------------------------------------------------------------------


def whisper(num_mel_bins, seconds):
    try:
        from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    return WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=seconds)


def noise(num_samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    swell = torch.linspace(0, 1, num_samples) if num_samples else torch.zeros(0)
    return torch.randn(num_samples, generator=generator) * swell * 0.3


@pytest.mark.parametrize("num_mel_bins", [16, 80, 128])
def test_filters_equal_the_reference(num_mel_bins):
    truth = torch.from_numpy(whisper(num_mel_bins, 30).mel_filters).float()
    assert torch.equal(audio.mel_filters(num_mel_bins), truth.T)


@pytest.mark.parametrize(
    ("num_mel_bins", "seconds", "num_samples"),
    [
        (128, 30, 480000),
        (128, 30, 480001),
        (128, 30, 100),
        (80, 30, 700000),
        (16, 1, 159),
        (16, 1, 16000),
        (16, 1, 16161),
        (16, 1, 40123),
    ],
)
def test_features_equal_whispers(num_mel_bins, seconds, num_samples):
    samples = noise(num_samples)
    mel, size = audio.log_mel(samples, num_mel_bins, mel_frames=seconds * 100)
    extract = whisper(num_mel_bins, seconds)
    pieces = samples.split(seconds * 16000)
    truth = [extract(piece.numpy(), sampling_rate=16000, return_tensors="pt")["input_features"] for piece in pieces]
    assert torch.equal(mel, torch.cat(truth))
    assert size == sum(len(piece) // 160 for piece in pieces)


def test_sound_that_is_heard_on_the_way_is_the_sound_that_is_read(tmp_path):
    """Many short pieces, the last one unfinished, and samples that are no whole number of mel frames."""
    path = make_video(tmp_path / "a.mkv", num_frames=2, sound=Sound(30.037, 16000, 1, "pcm_s16le"))
    heard = audio.Sound(path, 8, 10, max_sec=60)
    with media.open_media(path) as container:
        heard.begin(container)
        for packet in container.demux():
            heard.hear(packet)
        found, found_size = heard.features()
    wanted, size = audio.log_mel(audio.read_audio(path), 8, mel_frames=10)
    assert len(wanted) == 301
    assert (found_size, size) == (3003, 3003)
    assert torch.equal(found, wanted)


def test_silence_is_not_zero():
    # The model takes all-zero features for "no sound" (a sample without it); silence must not look like that.
    mel, size = audio.log_mel(torch.zeros(1600), 16, mel_frames=100)
    assert size == 10
    assert mel.unique().tolist() == [-1.5]


def test_no_sample_gives_no_piece():
    mel, size = audio.log_mel(torch.zeros(0), 16, mel_frames=100)
    assert mel.shape == (0, 16, 100)
    assert size == 0


def test_wrong_samples_are_refused():
    with pytest.raises(ValueError, match="int16"):
        audio.log_mel(torch.zeros(1600, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"\(2, 1600\)"):
        audio.log_mel(torch.zeros(2, 1600))
    with pytest.raises(ValueError, match="mel_frames is 1"):
        audio.log_mel(torch.zeros(1600), mel_frames=1)
