"""Sound of a video: 16 kHz mono samples, and their log-mel features in pieces (spec §2).

Letters: P pieces, M mel bins. A piece is the audio tower's input, 30 s at full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from vidi.inputs import container as media
from vidi.inputs.container import MediaError

__all__ = ["HOP", "SAMPLE_RATE_HZ", "log_mel", "mel_filters", "read_audio"]

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
        resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        samples_s16 = bytearray()
        try:
            # The None behind the last frame asks for what the resampler still holds.
            for frame in chain(_within_stated_end(container, stream, path), [None]):
                for piece in resampler.resample(frame):
                    samples_s16 += piece.to_ndarray().tobytes()
        except MediaError:
            raise
        except ValueError as error:
            raise MediaError(
                f"{path}: its sound changes format midway ({error}); encode it anew: ffmpeg -i {path} fixed.mp4"
            ) from None
    if not samples_s16:
        return None
    return torch.frombuffer(samples_s16, dtype=torch.int16).float().div_(32768)


def _within_stated_end(container: Any, stream: Any, path: str | Path) -> Iterator[av.AudioFrame]:
    """The decoded frames, up to the stream's duration where an index states it."""
    left = None
    if stream.duration and media.has_index(container):
        left = round(stream.duration * stream.time_base * stream.rate)
    for frame in media.decoded(container, stream, path):
        if left is None or frame.samples <= left:
            yield frame
        elif left > 0:
            yield _head(frame, left)
        left = None if left is None else max(0, left - frame.samples)


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
