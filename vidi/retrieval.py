"""From a video file and a question to time ranges (spec §2): the whole path, and reading the answer."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer

from vidi.config import VidiConfig
from vidi.costs import Costs
from vidi.inputs import batch, dialect, prompt
from vidi.inputs.reader import Reader, Recounted
from vidi.stream import Stream

__all__ = ["Answer", "Display", "Film", "Progress", "ask", "check_request", "decode", "encode", "format_ranges"]
__all__ += ["format_time", "parse_ranges", "progress_on", "retrieve", "stage_progress"]

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
    found = [(_number(start), _number(end)) for start, end in pattern.findall(text)]
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


@dataclass
class Film:
    """A video as the model sees it. Questions about it share the streams, and their keys once there are some."""

    path: str
    duration_sec: float
    reading: str  #: "parallel" or "sequential", and why the latter
    why: str
    streams: dict[str, Stream]
    cache: Any = None  #: of the first question


@dataclass(frozen=True)
class Answer:
    """What the model said of a video."""

    video: str
    query: str
    text: str  #: the raw answer, without special tokens
    tokens: tuple[int, ...]  #: the generated ids, without the one that stopped
    ranges: tuple[tuple[float, float], ...]  #: fractions of the video's length
    film: Film
    costs: Costs

    @property
    def duration_sec(self) -> float:
        return self.film.duration_sec

    @property
    def times(self) -> str:
        """The ranges as HH:MM:SS-HH:MM:SS, joined by ", "; empty where the answer holds none."""
        return format_ranges(self.ranges, self.duration_sec)

    def to_json(self) -> str:
        """One JSON object on one line, ranges both as fractions and as times."""
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
        fields |= {"reading": self.film.reading, "why": self.film.why}
        fields |= {"seconds": self.costs.seconds, "peak_gib": self.costs.peak_gib()}
        return json.dumps(fields)


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


# ---- from a reader to streams, from streams to answers --------------------------------------------------------------


@torch.inference_mode()
def encode(model: Any, reader: Reader, costs: Costs | None = None, progress: Progress | None = None) -> Film:
    """Frames and sound through towers and bridge, while the file is still being read.

    ``model``: `VidiModel`, or the fast path over it. ``reader`` is running and nothing was taken from it. Raises
    MediaError for the file.
    """
    costs = costs or Costs()
    started, waited, encoded, total = time.perf_counter(), 0.0, 0, reader.video.num_kept

    def count(stage_id: str, value: torch.Tensor) -> torch.Tensor:
        nonlocal encoded
        if stage_id == "vision.tower":
            encoded += len(value)
            _tell(progress, "encoding", encoded, total)
        return value

    def taken(pieces: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
        nonlocal waited
        while True:
            before = time.perf_counter()
            piece = next(pieces, None)
            waited += time.perf_counter() - before
            if piece is None:
                return
            yield piece

    pieces = taken(reader.pictures())
    if total is None:
        # How long the stream gets is not known before the file has ended.
        held = list(pieces)
        pieces, total = iter(held), len(held)
    try:
        streams = {"v": model.encode_frames(pieces, total, count)}
    except Recounted:
        with reader.again() as again:
            return encode(model, again, costs, progress)
    before = time.perf_counter()
    sound = reader.sound()
    waited += time.perf_counter() - before
    if sound is not None:
        heard = batch.Sample(
            ids=[model.config.bos_id, model.config.image_placeholder], audio=sound[0], audio_size=sound[1]
        )
        streams |= model.streams(batch.make_batch([heard], model.config).to(model.device, model.dtype))
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    costs.seconds["encoding"] += time.perf_counter() - started - waited
    costs.seconds["reading"] += reader.seconds
    found = reader.video
    return Film(str(found.path), float(found.duration_sec), found.reading, found.why, streams)


def ask(
    model: Any,
    tokenizer: Tokenizer,
    film: Film,
    query: str,
    *,
    max_new_tokens: int = 1024,
    costs: Costs | None = None,
    progress: Progress | None = None,
) -> Answer:
    """One question about a film: greedy decoding, its answer read as time ranges (spec §2).

    The answer does not depend on earlier questions. ``costs`` grows by this question's; the answer's own hold what the film
    cost, and this question alone. Raises ValueError as `check_request` does.
    """
    check_request(tokenizer, query, model.config, max_new_tokens)
    config = model.config
    ids = dialect.of(config).ids(tokenizer, query, film.duration_sec, config)
    total = costs or Costs()
    own = Costs(total.seconds | {"prefill": 0.0, "decoding": 0.0})
    tokens = decode(model, film, ids, max_new_tokens=max_new_tokens, costs=own, progress=progress)
    for phase in ("prefill", "decoding"):
        total.seconds[phase] += own.seconds[phase]
    text = prompt.decode(tokenizer, tokens)
    return Answer(film.path, query, text, tokens, tuple(parse_ranges(text, dialect.of(config).ranges)), film, own)


def decode(
    model: Any,
    film: Film,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    costs: Costs,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """The ids that follow a prompt's; the stream keys of the first prompt serve all that come after it."""
    # Imported here: reading an answer, or preparing inputs, needs no model.
    from vidi import generate

    started, first = time.perf_counter(), None

    def step(done: float, total: float | None) -> None:
        nonlocal first
        # The first token has left the device: the prefill is over.
        first = time.perf_counter() if first is None else first
        _tell(progress, "answer", done, total)

    _tell(progress, "answer", 0, max_new_tokens)
    generated = generate.greedy(
        model,
        batch.make_batch([batch.Sample(ids=ids)], model.config),
        max_new_tokens=max_new_tokens,
        streams=film.streams,
        reuse=film.cache,
        progress=step,
    )
    film.cache = generated.cache if film.cache is None else film.cache
    ended = time.perf_counter()
    first = ended if first is None else first
    costs.seconds["prefill"] += first - started
    costs.seconds["decoding"] += ended - first
    return tuple(generated.tokens[0])


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
    """Ask a model when something is seen in a video file: `encode`, then `ask`. Raises ValueError as both do."""
    check_request(tokenizer, query, model.config, max_new_tokens)
    costs = Costs()
    with Reader(path, model.config, fps=fps, progress=stage_progress(progress, "frames")) as reader:
        film = encode(model, reader, costs, progress)
    return ask(model, tokenizer, film, query, max_new_tokens=max_new_tokens, costs=costs, progress=progress)


# ---- progress -------------------------------------------------------------------------------------------------------


class Display:
    """One progress display of all stages on stderr; stdout stays the answers'. A `Progress`."""

    def __init__(self, bars: Any) -> None:
        self._bars, self._tasks = bars, dict[str, Any]()

    def __call__(self, stage: str, done: float, total: float | None) -> None:
        if not self._bars.live.is_started:
            self._bars.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def say(self, text: str) -> None:
        """Print an answer; what was shown so far stays above it."""
        self._bars.stop()
        print(text, flush=True)
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()


@contextmanager
def progress_on(console: Any) -> Iterator[Display]:
    """A display on a console of rich, of stderr; ended when it is left."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    count = TextColumn("{task.completed:.0f}")
    columns = (TextColumn("{task.description:<8}"), BarColumn(), count, TimeElapsedColumn())
    bars = Bars(*columns, console=console)
    try:
        yield Display(bars)
    finally:
        bars.stop()


def stage_progress(progress: Progress | None, stage: str) -> Callable[[float, float | None], None] | None:
    """``progress`` of one stage."""
    if progress is None:
        return None
    return lambda done, total: progress(stage, done, total)


def _tell(progress: Progress | None, stage: str, done: float, total: float | None) -> None:
    if progress is not None:
        progress(stage, done, total)
