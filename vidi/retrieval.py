"""From a video file and a question to time ranges (spec §2): the whole path, and reading the answer."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from vidi.config import VidiConfig
from vidi.inputs import audio, batch, dialect, prompt, video

__all__ = ["Answer", "Inputs", "Progress", "check_request", "format_ranges", "format_time", "parse_ranges", "prepare"]
__all__ += ["progress_on_stderr", "retrieve"]

LONG_SEC = 99999.0  #: a question that names the video's length is checked with this one before the file is open
_RANGE = re.compile(r"(\d\.\d+)-(\d\.\d+)")


class Progress(Protocol):
    """Called as a stage advances: its name, what is done, and the whole where that is known."""

    def __call__(self, stage: str, done: float, total: float | None) -> None: ...


def parse_ranges(text: str, pattern: re.Pattern[str] = _RANGE) -> list[tuple[float, float]]:
    """Every match of ``(\\d\\.\\d+)-(\\d\\.\\d+)``, in order: (start, end), fractions of the video's length (spec §2).

    Taken as the model wrote them: a start behind its end, or a fraction above 1, is neither dropped nor repaired. ``pattern``:
    of another model (`vidi.inputs.dialect`); what matches and is no number ("0.1.2-0.3") is skipped.
    """
    found = [tuple(map(_number, pair)) for pair in pattern.findall(text)]
    return [(start, end) for start, end in found if math.isfinite(start + end)]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def format_time(fraction: float, duration_sec: float) -> str:
    """HH:MM:SS, seconds rounded down; hours take as many digits as they need."""
    seconds = int(fraction * duration_sec)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def format_ranges(ranges: Sequence[tuple[float, float]], duration_sec: float) -> str:
    """ "HH:MM:SS-HH:MM:SS", joined by ", " (spec §2). A fraction above 1 prints a time behind the video's end."""
    return ", ".join("-".join(format_time(edge, duration_sec) for edge in pair) for pair in ranges)


@dataclass(frozen=True)
class Answer:
    """What the model said of a video."""

    video: str
    query: str
    text: str  #: the raw answer, without special tokens
    tokens: tuple[int, ...]  #: the generated ids, without the one that stopped
    ranges: tuple[tuple[float, float], ...]  #: fractions of the video's length
    duration_sec: float

    @property
    def times(self) -> str:
        """The ranges as HH:MM:SS-HH:MM:SS, joined by ", "; empty where the answer holds none."""
        return format_ranges(self.ranges, self.duration_sec)

    def to_json(self) -> str:
        """One JSON object, ranges both as fractions and as times."""
        ranges = [
            {
                "start_fraction": start,
                "end_fraction": end,
                "start": format_time(start, self.duration_sec),
                "end": format_time(end, self.duration_sec),
            }
            for start, end in self.ranges
        ]
        fields = {"video": self.video, "query": self.query, "duration_sec": self.duration_sec, "times": self.times}
        fields |= {"ranges": ranges, "text": self.text, "tokens": list(self.tokens)}
        return json.dumps(fields, indent=2)


@dataclass(frozen=True)
class Inputs:
    """A question about a file as the model takes it."""

    frames: video.Frames
    batch: batch.Batch


def check_request(tokenizer: Tokenizer, query: str, config: VidiConfig, max_new_tokens: int) -> None:
    """Raises ValueError for a question that cannot be asked: an empty one, no token to answer with, or more text than the
    decoder has positions."""
    ids = dialect.of(config).ids(tokenizer, query, LONG_SEC, config)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1")
    if len(ids) + max_new_tokens > config.max_positions:
        raise ValueError(
            f"{len(ids)} prompt tokens and up to {max_new_tokens} new ones pass the decoder's {config.max_positions} "
            "positions; shorten the query or lower the limit"
        )


def prepare(
    path: str | Path,
    query: str,
    tokenizer: Tokenizer,
    config: VidiConfig,
    *,
    fps: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Inputs:
    """Read a file and a question into a batch of one on ``device``: frames as uint8 pixels, sound in ``dtype``.

    A file without sound gives a batch without sound. Log-mel features are always computed on the CPU, where they are
    bit-exact. Raises PromptError before the file is touched, MediaError (both ValueErrors) for the file.
    """
    dialect.of(config).ids(tokenizer, query, LONG_SEC, config)
    frames = video.read_frames(path, fps=fps, size=config.vision.image_size, progress=_stage(progress, "frames"))
    _tell(progress, "sound", 0, 1)
    samples, mel, size = audio.read_audio(path), None, None
    if samples is not None:
        mel, size = audio.log_mel(samples, config.audio.num_mel_bins, mel_frames=config.audio.mel_frames)
    _tell(progress, "sound", 1, 1)
    ids = dialect.of(config).ids(tokenizer, query, float(frames.duration_sec), config)
    row = batch.Sample(ids=ids, images=frames.images_u8, audio=mel, audio_size=size)
    return Inputs(frames, batch.make_batch([row], config).to(device, dtype))


def retrieve(
    model: Any,
    tokenizer: Tokenizer,
    path: str | Path,
    query: str,
    *,
    fps: float = 1.0,
    max_new_tokens: int = 1024,
    progress: Progress | None = None,
) -> Answer:
    """Ask a model when something is seen in a video file: greedy decoding, its answer read as time ranges (spec §2).

    ``model``: `VidiModel`, or the fast path over it. Raises ValueError as ``prepare`` does.
    """
    # Imported here: reading an answer, or preparing inputs, needs no model.
    from vidi import generate

    check_request(tokenizer, query, model.config, max_new_tokens)
    inputs = prepare(
        path, query, tokenizer, model.config, fps=fps, device=model.device, dtype=model.dtype, progress=progress
    )
    encoded, total = 0, len(inputs.frames.images_u8)

    def count(stage_id: str, value: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        if stage_id == "vision.tower":
            encoded += len(value)
            _tell(progress, "encoding", encoded, total)
        return value

    with torch.inference_mode():
        streams = model.streams(inputs.batch, count)
    _tell(progress, "answer", 0, max_new_tokens)
    generated = generate.greedy(
        model,
        inputs.batch,
        max_new_tokens=max_new_tokens,
        streams=streams,
        progress=_stage(progress, "answer"),
    )
    tokens = tuple(generated.tokens[0])
    text = prompt.decode(tokenizer, tokens)
    ranges = tuple(parse_ranges(text, dialect.of(model.config).ranges))
    return Answer(str(path), query, text, tokens, ranges, inputs.frames.duration_sec)


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """A progress display of all stages on stderr; stdout stays the answer's."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    count = TextColumn("{task.completed:.0f}")
    columns = (TextColumn("{task.description:<8}"), BarColumn(), count, TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def advance(stage: str, done: float, total: float | None) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield advance


def _stage(progress: Progress | None, stage: str) -> Callable[[float, float | None], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _tell(progress: Progress | None, stage: str, done: float, total: float | None) -> None:
    if progress is not None:
        progress(stage, done, total)
