"""Reading an answer, and the path from a file to it, with a model that says what it is told to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tests.media import Sound, make_video
from vidi import generate, retrieval
from vidi.config import VidiConfig
from vidi.inputs import audio, prompt, video

CONFIG = VidiConfig.tiny()
TINY = prompt.tiny_tokenizer()


@pytest.mark.parametrize(
    ("text", "ranges"),
    [
        ("0.25-0.50", [(0.25, 0.5)]),
        ("0.10-0.20, 0.90-1.00.", [(0.1, 0.2), (0.9, 1.0)]),
        ("from 0.1-0.25and 0.3-0.4", [(0.1, 0.25), (0.3, 0.4)]),
        ("10.25-0.5", [(0.25, 0.5)]),  # one digit before the point, wherever it stands
        ("0.50-0.25, 1.20-9.9", [(0.5, 0.25), (1.2, 9.9)]),  # as written
        ("0.25 - 0.50", []),
        ("1-2, .5-.6, 0.5-1, 0,1-0,2", []),
        ("", []),
    ],
)
def test_ranges_of_an_answer(text, ranges):
    assert retrieval.parse_ranges(text) == ranges


@pytest.mark.parametrize(
    ("ranges", "duration_sec", "times"),
    [
        ([(0.25, 0.5)], 8.0, "00:00:02-00:00:04"),
        ([(0.0, 1.0), (0.1, 0.2)], 3661.0, "00:00:00-01:01:01, 00:06:06-00:12:12"),
        ([(0.249, 0.499)], 8.0, "00:00:01-00:00:03"),  # rounded down
        ([(0.5, 1.0)], 720000.0, "100:00:00-200:00:00"),
        ([(0.5, 0.25), (1.5, 2.0)], 60.0, "00:00:30-00:00:15, 00:01:30-00:02:00"),
        ([], 60.0, ""),
    ],
)
def test_times_of_ranges(ranges, duration_sec, times):
    assert retrieval.format_ranges(ranges, duration_sec) == times


def test_inputs_of_a_file(tmp_path):
    path = make_video(tmp_path / "a.mp4", num_frames=25, sound=Sound(2.5))
    stages = []
    inputs = retrieval.prepare(
        path,
        "a car.",
        TINY,
        CONFIG,
        fps=2,
        dtype=torch.float64,
        progress=lambda stage, done, total: stages.append(stage),
    )
    batch = inputs.batch
    assert torch.equal(batch.images[0], video.read_frames(path, fps=2, size=26).images_u8)
    mel, size = audio.log_mel(audio.read_audio(path), 16, mel_frames=100)
    assert torch.equal(batch.audios[0], mel.double())
    assert batch.audio_sizes == (size,) == (250,)
    assert batch.input_ids_BT.tolist() == [prompt.build_ids(TINY, "a car")]
    assert stages == ["frames"] * 6 + ["sound"] * 2


def test_a_file_without_sound_gives_a_batch_without_sound(tmp_path):
    batch = retrieval.prepare(make_video(tmp_path / "a.mp4", num_frames=1), "a car", TINY, CONFIG).batch
    assert batch.audios is None
    assert batch.images[0].shape == (1, 3, 26, 26)


def test_a_wrong_query_is_told_before_the_file_is_read(tmp_path):
    with pytest.raises(prompt.PromptError):
        retrieval.prepare(tmp_path / "absent.mp4", "<image>", TINY, CONFIG)


@pytest.fixture
def told(monkeypatch):
    """A model that says where it lives and sees every frame at once, and the calls that decoding got."""
    calls = []

    def greedy(model, batch, *, max_new_tokens, streams, progress):
        calls.append((batch, max_new_tokens))
        if progress is not None:
            progress(1, max_new_tokens)
        return SimpleNamespace(tokens=[TINY.encode("0.25-0.50, 0.75-1.00").ids])

    monkeypatch.setattr(generate, "greedy", greedy)

    def streams(batch, tap):
        tap("vision.tower", batch.images[0])
        return {}

    device = torch.device("cpu")
    model = SimpleNamespace(config=CONFIG, device=device, dtype=torch.bfloat16, streams=streams)
    return model, calls


def test_answer_of_a_model(tmp_path, told):
    model, calls = told
    path = make_video(tmp_path / "a.mp4", num_frames=80, sound=Sound(8.0))
    answer = retrieval.retrieve(model, TINY, path, "a car", max_new_tokens=30)
    assert answer.text == "0.25-0.50, 0.75-1.00"
    assert answer.times == "00:00:02-00:00:04, 00:00:06-00:00:08"
    batch, limit = calls[0]
    assert limit == 30
    assert batch.audios[0].dtype == torch.bfloat16  # the model's
    fields = json.loads(answer.to_json())
    assert fields["ranges"][0] == {"start_fraction": 0.25, "end_fraction": 0.5, "start": "00:00:02", "end": "00:00:04"}
    assert fields["tokens"] == TINY.encode("0.25-0.50, 0.75-1.00").ids
    assert (fields["video"], fields["query"], fields["duration_sec"]) == (str(path), "a car", 8.0)


def test_progress_leaves_stdout_alone(tmp_path, told, capsys):
    model, _ = told
    with retrieval.progress_on_stderr() as progress:
        retrieval.retrieve(model, TINY, make_video(tmp_path / "a.mp4"), "a car", progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    for stage in ("frames", "sound", "encoding", "answer"):
        assert stage in err
