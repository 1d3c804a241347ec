"""A video file read in the background: frames and sound in one pass, ahead of whoever takes them.

Letters: S side of the square picture, P audio pieces, M mel bins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from vidi.config import VidiConfig
from vidi.inputs.audio import Sound
from vidi.inputs.video import MAX_FRAMES, Video

__all__ = ["AHEAD", "Reader", "Recounted"]

#: Kept pictures that wait for the tower, 0.45 GB at full size: what is read while weights are loaded.
AHEAD = 1024
#: Sound may end this much behind the longest video that is read.
_SLACK_SEC = 60.0


class Recounted(Exception):
    """The file holds another number of frames than its packets announce: read it again, with ``check``."""


class Reader:
    """Context manager. Reading starts on entering, and ends on leaving whether or not all was taken.

    video: what was found out before reading. seconds: spent on reading, waits for the taker left out.
    """

    def __init__(
        self,
        path: str | Path,
        config: VidiConfig,
        *,
        fps: float = 1.0,
        max_frames: int = MAX_FRAMES,
        check: bool = False,
        progress: Callable[[float, float | None], None] | None = None,
    ) -> None:
        """Opens and surveys the file; arguments and errors of `video.Video`. ``progress`` is told seconds of video."""
        started = time.perf_counter()
        self._config = config
        self.video = Video(path, fps=fps, size=config.vision.image_size, max_frames=max_frames, check=check)
        self._sound = Sound(
            path, config.audio.num_mel_bins, config.audio.mel_frames, max_sec=max_frames / fps + _SLACK_SEC
        )
        self._progress, self._stop = progress, Event()
        self._waiting: Queue[Any] = Queue(AHEAD)
        self._thread = Thread(target=self._work, name="reader", daemon=True)
        self.seconds = time.perf_counter() - started

    def again(self) -> Reader:
        """A reader of the same file that decodes every frame; to be asked for where `Recounted` was raised."""
        old = self.video
        new = Reader(
            old.path, self._config, fps=old.fps, max_frames=old.max_frames, check=True, progress=self._progress
        )
        new.video.why = old.why
        return new

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._waiting.get(timeout=0.05)
            except Empty:
                continue
        self._sound.close()

    def pictures(self) -> Iterator[Tensor]:
        """Kept frames in order, (1, 3, S, S) uint8 each; once.

        Raises MediaError as `video.read_frames` does, and Recounted where there are not the ``video.num_kept`` announced.
        """
        given, announced = 0, self.video.num_kept
        while (item := self._waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            given += 1
            if announced is not None and given > announced:
                raise Recounted
            yield torch.from_numpy(item)[None]
        if announced is not None and given < announced:
            raise Recounted

    def sound(self) -> tuple[Tensor, int] | None:
        """Log-mel features (P, M, mel frames) and their size in mel frames, or None; to be asked for behind all pictures."""
        return self._sound.features()

    def _work(self) -> None:
        started = time.perf_counter()
        waited = 0.0
        try:
            video = self.video
            for index, picture in enumerate(video.pictures(self._sound)):
                if self._progress is not None:
                    self._progress(float(index * video.step / video.rate), video.total_sec)
                before = time.perf_counter()
                self._waiting.put(picture)
                waited += time.perf_counter() - before
                if self._stop.is_set():
                    return
            if self._progress is not None:
                self._progress(float(video.duration_sec), float(video.duration_sec))
            end: BaseException | None = None
        except BaseException as error:  # raised again in the thread that takes the pictures
            end = error
        self.seconds += time.perf_counter() - started - waited
        self._waiting.put(end)
