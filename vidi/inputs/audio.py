"""Sound of a video: 16 kHz mono samples, and their log-mel features in pieces (spec §2).

Letters: P pieces, M mel bins. A piece is the audio tower's input, 30 s at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from vidi.inputs import container as media
from vidi.inputs.container import MediaError

__all__ = ["HOP", "SAMPLE_RATE_HZ", "Sound", "log_mel", "mel_filters", "read_audio"]

SAMPLE_RATE_HZ = 16000
N_FFT = 400
HOP = 160


def read_audio(path: str | Path) -> Tensor | None:
    """The first audio stream as (samples,) float32 in [-1, 1), mono, 16 kHz; None without one, or an empty one.

    Mixed and resampled by FFmpeg to int16, then divided by 32768 (its float output mixes stereo √2 louder). In the mp4
    family the encoder's padding behind the stream's stated end is dropped first, as current ffmpeg commands do.
    A stream that starts late is not padded in front.

    Raises MediaError where the file is missing, damaged or cut short.
    """
    with media.open_media(path) as container:
        stream = media.first_stream(container, "audio")
        if stream is None:
            return None
        track = _Track(container, stream, path)
        samples_s16 = bytearray()
        # The None behind the last frame asks for what the resampler still holds.
        for frame in chain(media.decoded(container, stream, path), [None]):
            samples_s16 += track.samples_s16(frame)
    return _floats(samples_s16) if samples_s16 else None


class Sound:
    """Log-mel features of a file's first audio stream, made piece by piece while another reader goes through the file.

    Holds one piece of samples beside the features. Decoding and features have a thread of their own, so that the reader
    is not held up; it waits where it is more than ``_AHEAD`` packets in front.
    """

    _AHEAD = 4096

    def __init__(self, path: str | Path, num_mel_bins: int, mel_frames: int, *, max_sec: float) -> None:
        self.path, self.num_mel_bins, self.mel_frames, self.max_sec = path, num_mel_bins, mel_frames, max_sec
        self._thread: Thread | None = None

    def begin(self, container: Any) -> None:
        self.close()
        self._packets: Queue[Any] = Queue(self._AHEAD)
        self._pieces: list[Tensor] = []
        self._num_samples = 0
        self._error: Exception | None = None
        stream = media.first_stream(container, "audio")
        self._index = None if stream is None else stream.index
        if stream is not None:
            media.check_decodable(stream, self.path)
            self._thread = Thread(target=self._work, args=(container, stream), name="sound", daemon=True)
            self._thread.start()

    def hear(self, packet: Any) -> None:
        if packet.stream.index == self._index:
            self._packets.put(packet)

    def features(self) -> tuple[Tensor, int] | None:
        """(P, M, mel frames) and their size in mel frames as of `log_mel`, once the file has been read; None without sound.

        Raises MediaError as `read_audio` does, and for sound longer than ``max_sec``.
        """
        self.close()
        if self._error is not None:
            raise self._error
        if not self._num_samples:
            return None
        return torch.cat(self._pieces), self._num_samples // HOP

    def close(self) -> None:
        """End the thread, if there is one, behind what it was given."""
        if self._thread is not None:
            self._packets.put(None)
            self._thread.join()
            self._thread = None

    def _work(self, container: Any, stream: Any) -> None:
        packets = iter(self._packets.get, None)
        try:
            self._listen(container, stream, packets)
        except Exception as error:  # handed to the thread that asks for the features
            self._error = error
        for _ in packets:  # whoever gives more must not wait; nothing is waited for behind the end
            pass

    def _listen(self, container: Any, stream: Any, packets: Iterator[Any]) -> None:
        track, held = _Track(container, stream, self.path), bytearray()
        piece_bytes = 2 * HOP * self.mel_frames
        ends, count = media.Ends(), 0
        for packet in chain(packets, [None]):
            try:
                frames = [None] if packet is None else packet.decode()
            except (av.FFmpegError, OSError) as error:
                raise media.corrupt(self.path, "audio", count, ends, error) from None
            for frame in frames:
                held += track.samples_s16(frame)
            if packet is not None:
                ends.note(packet)
                count += len(frames)
            while len(held) >= piece_bytes or (packet is None and held):
                self._add(_floats(held[:piece_bytes]))
                del held[:piece_bytes]

    def _add(self, samples: Tensor) -> None:
        self._num_samples += len(samples)
        if self._num_samples > self.max_sec * SAMPLE_RATE_HZ:
            raise MediaError(
                f"{self.path}: more than {self.max_sec:,.0f} s of sound, as long as the most frames that are read; raise "
                f"--max-frames, or cut the file: ffmpeg -i {media.quoted(self.path)} -t {int(self.max_sec)} -c copy part.mp4"
            )
        self._pieces.append(log_mel(samples, self.num_mel_bins, mel_frames=self.mel_frames)[0])


class _Track:
    """One audio stream's frames, mixed and resampled."""

    def __init__(self, container: Any, stream: Any, path: str | Path) -> None:
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        self._path = path
        #: Samples up to the stream's stated end, where an index states it.
        self._left = None
        if stream.duration and media.has_index(container):
            self._left = round(stream.duration * stream.time_base * stream.rate)

    def samples_s16(self, frame: av.AudioFrame | None) -> bytes:
        """16-bit samples that are ready after ``frame``; None: what the resampler still holds."""
        if frame is not None and self._left is not None:
            left, self._left = self._left, max(0, self._left - frame.samples)
            if not left:
                return b""
            if frame.samples > left:
                frame = _head(frame, left)
        try:
            return b"".join(piece.to_ndarray().tobytes() for piece in self._resampler.resample(frame))
        except (ValueError, av.FFmpegError) as error:
            raise MediaError(
                f"{self._path}: its sound changes format midway ({error}); encode it anew: "
                f"ffmpeg -i {media.quoted(self._path)} fixed.mp4"
            ) from None


def _floats(samples_s16: bytes | bytearray) -> Tensor:
    return torch.frombuffer(bytearray(samples_s16), dtype=torch.int16).float().div_(32768)


def _head(frame: av.AudioFrame, samples: int) -> av.AudioFrame:
    """The first ``samples`` of a frame."""
    channels = 1 if frame.format.is_planar else frame.layout.nb_channels
    data: Any = np.ascontiguousarray(frame.to_ndarray()[:, : samples * channels])
    head = av.AudioFrame.from_ndarray(data, format=frame.format.name, layout=frame.layout.name)
    head.sample_rate, head.time_base, head.pts = frame.sample_rate, frame.time_base, frame.pts
    return head


def log_mel(
    samples: Tensor, num_mel_bins: int = 128, *, mel_frames: int = 3000, device: torch.device | str | None = None
) -> tuple[Tensor, int]:
    """(samples,) float32 -> log-mel features (P, M, mel_frames) float32, and their size in mel frames (spec §2).

    Cut into pieces of ``mel_frames``·160 samples, the last one padded with zeros; each piece is clipped to 8 decades
    below its own peak. Piece by piece, so that beside the result only one piece's spectrum is in memory. Equal bit for
    bit to Whisper's feature extraction in torch on the CPU; another ``device`` rounds its Fourier transform otherwise.

    No sample at all gives P = 0. Raises ValueError for another shape or dtype, or pieces shorter than the window.
    """
    if samples.ndim != 1 or samples.dtype != torch.float32:
        raise ValueError(f"samples are {samples.dtype} of shape {tuple(samples.shape)}; one axis of float32 is needed")
    piece_samples = mel_frames * HOP
    if piece_samples <= N_FFT // 2:
        raise ValueError(f"mel_frames is {mel_frames}: pieces of {piece_samples} samples; at least 2 are needed")
    samples = samples.to(device)
    num_pieces = -(-len(samples) // piece_samples)
    window = torch.hann_window(N_FFT, device=samples.device)
    filters_MK = mel_filters(num_mel_bins).to(samples.device)
    mel_PMT = samples.new_empty(num_pieces, num_mel_bins, mel_frames)
    for piece, mel_MT in zip(samples.split(piece_samples), mel_PMT, strict=True) if num_pieces else ():
        padded = torch.nn.functional.pad(piece, (0, piece_samples - len(piece)))
        spectrum = torch.stft(padded[None], N_FFT, HOP, window=window, return_complex=True)
        power_KT = (spectrum[..., :-1].abs() ** 2).contiguous()
        log_MT = torch.clamp(filters_MK @ power_KT, min=1e-10).log10()[0]
        mel_MT.copy_((torch.maximum(log_MT, log_MT.max() - 8.0) + 4.0) / 4.0)
    # The sum over pieces of floor(samples/160): every piece but the last is a whole number of hops.
    return mel_PMT, len(samples) // HOP


@lru_cache(maxsize=4)
def mel_filters(num_mel_bins: int) -> Tensor:
    """(M, 201) float32: Slaney's triangles from 0 to 8 kHz, each of unit area; made in float64.

    The scale is linear below 1 kHz (15 mel) and logarithmic above (27 mel for a factor of 6.4).
    """
    top_mel = 15 + np.log(SAMPLE_RATE_HZ / 2 / 1000) * (27 / np.log(6.4))
    mels = np.linspace(0, top_mel, num_mel_bins + 2)
    corners_hz = np.where(mels < 15, 200 * mels / 3, 1000 * np.exp((np.log(6.4) / 27) * (mels - 15)))
    bins_hz = np.linspace(0, SAMPLE_RATE_HZ // 2, N_FFT // 2 + 1)
    width_hz = np.diff(corners_hz)
    distance_hz = corners_hz[:, None] - bins_hz
    rising = -distance_hz[:-2] / width_hz[:-1, None]
    falling = distance_hz[2:] / width_hz[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    area = 2 / (corners_hz[2:] - corners_hz[:-2])
    return torch.from_numpy((triangles * area[:, None]).astype(np.float32))
