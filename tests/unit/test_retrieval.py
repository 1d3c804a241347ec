"""Reading an answer, and the path from a file to it, with a model that says what it is told to."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from tests.media import Sound, make_video
from vidi import generate, retrieval
from vidi.config import VidiConfig
from vidi.costs import Costs
from vidi.inputs import audio, dialect, prompt, video
from vidi.inputs.reader import Reader

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
        ("0.123456789012-0.98765432109", [(0.123456789012, 0.98765432109)]),
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


@pytest.fixture
def told(monkeypatch):
    """A model that says where it lives and what it saw, and the calls that decoding got."""
    calls, seen = [], {}

    def greedy(model, batch, *, max_new_tokens, streams, reuse, progress):
        calls.append((batch, max_new_tokens, streams, reuse))
        progress(1, max_new_tokens)
        return SimpleNamespace(tokens=[TINY.encode("0.25-0.50, 0.75-1.00").ids], cache="kept keys")

    monkeypatch.setattr(generate, "greedy", greedy)

    def encode_frames(pieces, num_frames, tap):
        seen["images"] = torch.cat(list(pieces))
        tap("vision.tower", seen["images"])
        assert len(seen["images"]) == num_frames
        return "visual stream"

    def streams(batch):
        seen["audio"] = batch
        return {"a": "audio stream"}

    model = SimpleNamespace(config=CONFIG, device=torch.device("cpu"), dtype=torch.bfloat16, seen=seen)
    model.encode_frames, model.streams = encode_frames, streams
    return model, calls


def test_answer_of_a_model(tmp_path, told):
    model, calls = told
    path = make_video(tmp_path / "a.mp4", num_frames=80, sound=Sound(8.0))
    answer = retrieval.retrieve(model, TINY, path, "a car.", max_new_tokens=30, fps=2)
    assert answer.text == "0.25-0.50, 0.75-1.00"
    assert answer.times == "00:00:02-00:00:04, 00:00:06-00:00:08"
    batch, limit, streams, _ = calls[0]
    assert limit == 30
    assert batch.input_ids_BT.tolist() == [prompt.build_ids(TINY, "a car")]
    assert streams == {"v": "visual stream", "a": "audio stream"}
    # What the model saw and heard is what the readers of one thing each give.
    assert torch.equal(model.seen["images"], video.read_frames(path, fps=2, size=26).images_u8)
    mel, size = audio.log_mel(audio.read_audio(path), 16, mel_frames=100)
    heard = model.seen["audio"]
    assert torch.equal(heard.audios[0], mel.bfloat16())
    assert heard.audio_sizes == (size,) == (800,)
    assert heard.images is None
    fields = json.loads(answer.to_json())
    assert "\n" not in answer.to_json()
    assert fields["ranges"][0] == {"start_fraction": 0.25, "end_fraction": 0.5, "start": "00:00:02", "end": "00:00:04"}
    assert fields["tokens"] == TINY.encode("0.25-0.50, 0.75-1.00").ids
    assert (fields["video"], fields["query"], fields["duration_sec"]) == (str(path), "a car.", 8.0)
    assert (fields["reading"], fields["why"]) == ("parallel", "")
    assert set(fields["seconds"]) == {"loading", "reading", "encoding", "prefill", "decoding"}
    assert fields["peak_gib"]["host"] > 0.05


def test_a_file_without_sound_gives_no_audio_stream(tmp_path, told):
    model, calls = told
    retrieval.retrieve(model, TINY, make_video(tmp_path / "a.mp4", num_frames=1), "a car")
    assert calls[0][2] == {"v": "visual stream"}


def test_keys_of_the_first_question_serve_the_second(tmp_path, told):
    model, calls = told
    with Reader(make_video(tmp_path / "a.mp4"), CONFIG) as reader:
        film = retrieval.encode(model, reader)
    costs = Costs()
    costs.seconds["loading"] = 5.0
    answers = [retrieval.ask(model, TINY, film, query, costs=costs) for query in ("a car", "a tree", "a house")]
    own = [answer.costs.seconds for answer in answers]
    assert [seconds["loading"] for seconds in own] == [5.0] * 3
    assert costs.seconds["prefill"] == pytest.approx(sum(seconds["prefill"] for seconds in own))
    assert own[2]["prefill"] < costs.seconds["prefill"]
    assert all(spent >= 0 for seconds in (costs.seconds, *own) for spent in seconds.values())
    assert [reuse for *_, reuse in calls] == [None, "kept keys", "kept keys"]


def test_a_wrong_query_is_told_before_the_file_is_read(tmp_path, told):
    with pytest.raises(prompt.PromptError):
        retrieval.retrieve(told[0], TINY, tmp_path / "absent.mp4", "<image>")


def test_a_file_with_other_frames_than_announced_is_read_once_more(tmp_path, told, monkeypatch):
    """Red where the tower would be given the announced number: one frame too many, one too few."""
    path = make_video(tmp_path / "a.mp4", num_frames=40)
    whole = video.read_frames(path, size=26, check=True)
    for wrong in (39, 30, 50):
        with Reader(path, CONFIG) as reader:
            reader.video.num_kept = -(-wrong // 10)
            film = retrieval.encode(told[0], reader)
        assert torch.equal(told[0].seen["images"], whole.images_u8)
        assert film.duration_sec == 4.0


def test_progress_leaves_stdout_alone(tmp_path, told, capsys):
    model, _ = told
    with retrieval.progress_on(Console(stderr=True)) as progress:
        retrieval.retrieve(model, TINY, make_video(tmp_path / "a.mp4"), "a car", progress=progress)
    out, err = capsys.readouterr()
    assert out == ""
    for stage in ("frames", "encoding", "answer"):
        assert stage in err


def test_progress_shows_how_far_each_stage_is(capsys):
    with retrieval.progress_on(Console(stderr=True)) as display:
        for stage, done in (("frames", 7), ("answer", 3), ("answer", 4)):
            display(stage, done, 9)
    shown = [line.split() for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert [(words[0], words[-2]) for words in shown[-2:]] == [("frames", "7"), ("answer", "4")]


def test_answers_are_printed_while_progress_is_shown(capsys):
    with retrieval.progress_on(Console(stderr=True)) as display:
        for number in (1, 2):
            display("answer", number, 9)
            display.say(f"answer {number}")
    assert capsys.readouterr().out == "answer 1\nanswer 2\n"


def test_a_question_and_its_answer_fit_the_decoders_positions_to_the_last():
    most = CONFIG.max_positions
    room = most - len(dialect.of(CONFIG).ids(TINY, "a car", retrieval.LONG_SEC, CONFIG))
    retrieval.check_request(TINY, "a car", CONFIG, room)
    with pytest.raises(ValueError, match=f"up to {room + 1} new ones pass the decoder's {most} positions"):
        retrieval.check_request(TINY, "a car", CONFIG, room + 1)
    with pytest.raises(ValueError, match="at least 1"):
        retrieval.check_request(TINY, "a car", CONFIG, 0)
