"""`vidi retrieve` on videos made here: what it reads equals independent readers, what it answers the oracle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from goldens import oracle
from tests.cli import talking
from tests.cli.clock import quickest
from tests.media import Sound, make_video, truncate
from tests.not_run import not_run
from vidi.bridge import position
from vidi.checkpoint import synthetic
from vidi.cli import main
from vidi.config import VidiConfig
from vidi.inputs import pixels, prompt
from vidi.inputs.reader import Reader

CONFIG = VidiConfig.tiny()
QUERY = "a red car."


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 s at 10 frames a second, with sound."""
    return make_video(tmp_path_factory.mktemp("film") / "film.mp4", num_frames=80, sound=Sound(8.0))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tokenizer = {"tokenizer.json": prompt.tiny_tokenizer().to_str()}
    synthetic.synth(folder, CONFIG, seed=13, dtype=torch.float32, extra=tokenizer)
    return folder


@pytest.fixture(scope="module")
def independent(film: Path) -> dict[str, np.ndarray]:
    """The file as other readers give it: PyAV frame by frame, Pillow and transformers' processors; their floats."""
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
        from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor
    except ImportError:
        not_run("transformers is missing; pip install 'vidi-parity[oracle]'")
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(film)) as container:
        stream = container.streams.audio[0]
        resampler = av.AudioResampler(format="s16", layout="mono", rate=16000)
        parts = [
            part.to_ndarray()[0] for frame in [*container.decode(stream), None] for part in resampler.resample(frame)
        ]
        # An mp4 states where its sound ends; what stands behind is the encoder's padding.
        seconds = float(stream.duration * stream.time_base)
    sound = np.concatenate(parts)[: round(seconds * 16000)].astype(np.float32) / 32768
    process = SiglipImageProcessorPil(size={"height": 26, "width": 26}, resample=Image.Resampling.BICUBIC)
    images = process([Image.fromarray(frames[i]) for i in range(0, 80, 10)], return_tensors="np")["pixel_values"]
    extract = WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    mel = [
        extract(sound[i : i + 16000], sampling_rate=16000, return_tensors="pt", device="cpu")["input_features"]
        for i in range(0, len(sound), 16000)
    ]
    before, after = (
        "<start_of_turn>user\n",
        ("\nDuring which time segments in the video can we see a red car?<end_of_turn>\n<start_of_turn>model\n"),
    )
    tokenizer = prompt.tiny_tokenizer()
    sides = [tokenizer.encode(side, add_special_tokens=False).ids for side in (before, after)]
    return {
        "inputs.input_ids": np.array([[2, *sides[0], -200, *sides[1]]]),
        "inputs.images.0": np.asarray(images, np.float32),
        "inputs.audios.0": torch.cat(mel).numpy(),
        "inputs.audio_sizes": np.array([len(sound) // 160]),
    }


@pytest.mark.slow
def test_frames_mel_and_ids_equal_the_independent_readers(film, independent):
    ids = prompt.build_ids(prompt.tiny_tokenizer(), QUERY)
    np.testing.assert_array_equal([ids], independent["inputs.input_ids"])
    with Reader(film, CONFIG) as reader:
        pictures = torch.cat(list(reader.pictures()))
        mel, size = reader.sound()
    assert reader.video.reading == "parallel"
    floats = pixels.normalize(pictures, torch.float32, "cpu").numpy()
    np.testing.assert_array_equal(floats, independent["inputs.images.0"])
    np.testing.assert_array_equal(mel.numpy(), independent["inputs.audios.0"])
    assert size == independent["inputs.audio_sizes"][0] == 800
    assert len(floats) == 8


def test_its_tokens_are_the_oracles(film, checkpoint, independent, capsys):
    weights: dict[str, np.ndarray] = {}
    for shard in sorted(checkpoint.glob("*.safetensors")):
        weights |= load_file(shard)
    freq = position.frequencies(CONFIG.decoder.hidden_size).numpy()
    official = json.loads((checkpoint / "config.json").read_text())
    wanted = oracle.greedy(official, weights, independent, 9, casts="cast", pos_freq=freq)
    length = int(wanted.lengths_B[0])
    assert wanted.gap_BS[0, :length].min() > 1e-3, "a gap this small would make the tokens a matter of noise"
    assert len(set(wanted.tokens_BS[0, :length].tolist())) > 3, "tokens that do not depend on the input prove little"

    arguments = ["--checkpoint", str(checkpoint), "--dtype", "float32", "--max-new-tokens", "9", "--json"]
    assert main(["retrieve", str(film), QUERY, *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    tokens = [token for token in wanted.tokens_BS[0, :length].tolist() if token != CONFIG.end_of_turn_id]
    assert said["tokens"] == tokens
    assert said["text"] == prompt.decode(prompt.tiny_tokenizer(), tokens)


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16"])
def test_an_answer_becomes_times(film, tmp_path, capsys, dtype):
    ids = talking.write(tmp_path / "talking", ["0.25", "-0.50"])
    assert main(["retrieve", str(film), QUERY, "--checkpoint", str(tmp_path / "talking"), "--dtype", dtype]) == 0
    assert capsys.readouterr().out == "00:00:02-00:00:04\n0.25-0.50\n"
    arguments = ["--checkpoint", str(tmp_path / "talking"), "--dtype", dtype, "--json"]
    assert main(["retrieve", str(film), QUERY, *arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tokens"] == ids
    assert said["times"] == "00:00:02-00:00:04"
    assert said["duration_sec"] == 8.0


def test_an_answer_without_ranges_says_so(film, tmp_path, capsys):
    talking.write(tmp_path / "talking", ["never"])
    assert main(["retrieve", str(film), QUERY, "--checkpoint", str(tmp_path / "talking")]) == 0
    assert capsys.readouterr().out == "no time ranges in the answer\nnever\n"


@pytest.mark.slow
def test_the_whole_command(film, tmp_path):
    """As a user runs it: under 15 seconds, the answer alone on stdout, progress on stderr."""
    talking.write(tmp_path / "talking", ["0.25", "-0.50"])
    command = [
        sys.executable,
        "-m",
        "vidi.cli",
        "retrieve",
        str(film),
        QUERY,
        "--checkpoint",
        str(tmp_path / "talking"),
    ]
    seconds, done = quickest(command, tries=1)
    assert done.stdout == "00:00:02-00:00:04\n0.25-0.50\n"
    assert "frames" in done.stderr
    assert seconds < 15


@pytest.mark.parametrize("path", ["plain", "fast"])
def test_every_question_is_answered_as_if_it_were_alone(film, checkpoint, tmp_path, capsys, path):
    questions = ["a red car", "somebody laughing aloud", "a red car", "a door"]
    options = ["--checkpoint", str(checkpoint), "--dtype", "float32", "--max-new-tokens", "9", "--json", "--path", path]
    (tmp_path / "more.txt").write_text("\n".join(["", *questions[2:], ""]))
    together = [str(film), *questions[:2], "--queries", str(tmp_path / "more.txt")]
    assert main(["retrieve", *together, *options]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["query"] for one in said] == questions
    for question, one in zip(questions, said, strict=True):
        assert main(["retrieve", str(film), question, *options]) == 0
        alone = json.loads(capsys.readouterr().out)
        for figures in ("seconds", "peak_gib"):
            del alone[figures], one[figures]
        assert one == alone
    assert said[0]["tokens"] != said[1]["tokens"], "answers that do not depend on the question prove little"


def test_several_answers_as_text(film, tmp_path, capsys):
    talking.write(tmp_path / "talking", ["0.25", "-0.50"])
    assert main(["retrieve", str(film), "a car", "a tree", "--checkpoint", str(tmp_path / "talking")]) == 0
    out, err = capsys.readouterr()
    assert out == "a car\n00:00:02-00:00:04\n0.25-0.50\n\na tree\n00:00:02-00:00:04\n0.25-0.50\n"
    last = err.rstrip().splitlines()[-1]
    for word in ("loading", "reading", "(parallel)", "encoding", "prefill", "decoding", "peak", "GiB"):
        assert word in last


def test_check_reads_in_sequence(film, tmp_path, capsys):
    talking.write(tmp_path / "talking", ["0.25", "-0.50"])
    assert main(["retrieve", str(film), QUERY, "--checkpoint", str(tmp_path / "talking"), "--check", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["reading"], said["why"]) == ("sequential", "asked for (--check)")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ("absent", "no such file"),
        ("no media", "broken.mp4"),
        ("cut", "broken.mp4"),
        ("sound only", "no video in it"),
        ("empty query", "the query ' ' is empty"),
        ("no checkpoint", "nowhere"),
        ("no tokenizer", "tokenizer.json"),
        ("fps", "fps is -1.0"),
        ("backend", "sdpa"),
        ("tiny fps", "fps is 1e-308"),
        ("no query", "no query"),
        ("few frames", "8 sampled frames, 0.0 GB of pixels; at most 7 are read. Raise the limit (--max-frames 8)"),
        ("queries in latin-1", "queries.txt: byte 1 is no UTF-8 text"),
        ("queries that never end", "no regular file"),
        ("no queries file", "queries.txt: no such file"),
    ],
)
def test_bad_input_is_exit_code_2_with_a_reason_and_nothing_on_stdout(film, checkpoint, tmp_path, capsys, spoil, said):
    video, query, folder, more = film, QUERY, checkpoint, []
    if spoil == "absent":
        video = tmp_path / "absent.mp4"
    elif spoil == "no media":
        video = tmp_path / "broken.mp4"
        video.write_bytes(b"no film" * 999)
    elif spoil == "cut":
        video = truncate(make_video(tmp_path / "broken.mp4", num_frames=40), 0.6)
    elif spoil == "sound only":
        video = make_video(tmp_path / "sound.mp4", num_frames=0, sound=Sound(1.0))
    elif spoil == "empty query":
        query = " "
    elif spoil == "no checkpoint":
        folder = tmp_path / "nowhere"
    elif spoil == "no tokenizer":
        folder = tmp_path / "bare"
        synthetic.synth(folder, CONFIG, seed=1)
    elif spoil == "fps":
        more = ["--fps", "-1"]
    elif spoil == "backend":
        more = ["--backend", "sdpa"]
    elif spoil == "tiny fps":
        more = ["--fps", "1e-308"]
    elif spoil == "few frames":
        more = ["--max-frames", "7"]
    elif spoil.startswith("queries") or spoil == "no queries file":
        if spoil == "queries in latin-1":
            (tmp_path / "queries.txt").write_bytes(b"K\xf6ln")
        more = ["--queries", "/dev/zero" if spoil == "queries that never end" else str(tmp_path / "queries.txt")]
    if spoil == "no query":
        assert main(["retrieve", str(video), "--checkpoint", str(folder)]) == 2
        assert said in capsys.readouterr().err
        return
    code = main(["retrieve", str(video), query, "--checkpoint", str(folder), *more])
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert said in err
    assert "Traceback" not in err
