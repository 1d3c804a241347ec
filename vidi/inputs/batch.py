"""Samples -> one batch, and all padding and keep masks of the project (spec §2, §3.7, §6).

Letters: B batch, T text tokens, F frames, S image side, P audio pieces, M mel bins, L rows of whatever is padded,
D its width. Everything is padded at the right. Keep masks: True = a real token.

    ids    2  7 -200  9  0  0        keep  T T T T F F
    packed 2  7    9  0  0           keep  T T T F F         the placeholder's place has no effect (spec §6)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vidi.config import VidiConfig

__all__ = ["IGNORED_LABEL", "IMAGE_PLACEHOLDER", "Batch", "Sample", "keep_from_lengths", "make_batch", "pack_text"]
__all__ += ["pad_rows"]

IMAGE_PLACEHOLDER = -200
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sample:
    """One row of a batch, not padded. None: the sample has no pictures, or no sound."""

    ids: Sequence[int]
    images: Tensor | None = None  #: (F, 3, S, S) uint8 pixels, or floats normalised already
    audio: Tensor | None = None  #: (P, M, mel frames of a piece) float
    audio_size: int | None = None  #: mel frames that hold sound, over all pieces
    labels: Sequence[int] | None = None  #: one per id, -100 ignored; the placeholder's is dropped with it


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass.

    Shapes and dtypes are checked here, on any device; the ids themselves by ``make_batch``, on the host. A sample
    without one modality in a batch that has it holds an empty tensor: F = 0, or P = 0 and size 0.
    """

    input_ids_BT: Tensor  #: int64, the placeholder included
    keep_BT: Tensor | None = None  #: bool, the placeholder counted; None = all kept
    images: tuple[Tensor, ...] | None = (
        None  #: per sample (F, 3, S, S), uint8 or float; None = no pictures in the batch
    )
    audios: tuple[Tensor, ...] | None = None  #: per sample (P, M, mel frames); None = no sound in the batch
    audio_sizes: tuple[int, ...] | None = None  #: per sample, in mel frames
    labels_BT: Tensor | None = None  #: int64, -100 ignored

    def __post_init__(self) -> None:
        _check_grid("input_ids_BT", self.input_ids_BT, torch.int64, None)
        shape = tuple(self.input_ids_BT.shape)
        if self.keep_BT is not None:
            _check_grid("keep_BT", self.keep_BT, torch.bool, shape)
        if self.labels_BT is not None:
            _check_grid("labels_BT", self.labels_BT, torch.int64, shape)
        if self.images is not None:
            _check_media("images", self.images, len(self), "(F, 3, S, S)", ndim=4, pixels=True)
            if len(dtypes := {x.dtype for x in self.images}) > 1:
                raise ValueError(f"images of {' and '.join(sorted(map(str, dtypes)))}; one dtype for all is needed")
            if wrong := [tuple(x.shape) for x in self.images if x.shape[1] != 3 or x.shape[2] != x.shape[3]]:
                raise ValueError(f"images of shapes {wrong}: (F, 3, S, S) square RGB pictures are needed")
        if (self.audios is None) != (self.audio_sizes is None):
            raise ValueError("audios and audio_sizes go together: give both, or neither")
        if self.audios is not None and self.audio_sizes is not None:
            _check_media("audios", self.audios, len(self), "(P, M, mel frames)", ndim=3)
            if len(self.audio_sizes) != len(self):
                raise ValueError(f"{len(self.audio_sizes)} audio_sizes for {len(self)} samples; one each is needed")
            for row, (audio, size) in enumerate(zip(self.audios, self.audio_sizes, strict=True)):
                most = audio.shape[0] * audio.shape[2]
                if not 0 <= size <= most:
                    raise ValueError(
                        f"audio_sizes[{row}] is {size}, but its {audio.shape[0]} pieces of {audio.shape[2]} mel frames "
                        f"hold 0 to {most}; sizes count mel frames (samples // 160), not samples"
                    )

    def __len__(self) -> int:
        return self.input_ids_BT.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The batch on ``device``, its float tensors in ``dtype``; ids, masks and uint8 pixels keep theirs."""

        def media(tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
            if tensors is None:
                return None
            return tuple(x.to(device=device, dtype=dtype if x.is_floating_point() else None) for x in tensors)

        def grid(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=device)

        return replace(
            self,
            input_ids_BT=self.input_ids_BT.to(device=device),
            keep_BT=grid(self.keep_BT),
            labels_BT=grid(self.labels_BT),
            images=media(self.images),
            audios=media(self.audios),
        )


def make_batch(samples: Sequence[Sample], config: VidiConfig) -> Batch:
    """Pad samples at the right to one batch; ``keep_BT`` is always given.

    A modality that no sample has is None in the batch. Labels: all samples have them, or none.

    Raises ValueError, with the numbers, for ids outside the vocabulary, a row without exactly one placeholder (a row
    without pictures and sound may have none), labels of another length, and pictures or mel pieces of other sizes
    than ``config``'s.
    """
    if not samples:
        raise ValueError("no sample; a batch needs at least one")
    for row, sample in enumerate(samples):
        _check_sample(row, sample, config)
    labelled = [sample.labels is not None for sample in samples]
    if any(labelled) and not all(labelled):
        raise ValueError(f"labels for {sum(labelled)} of {len(samples)} samples; give them for all, or for none")
    side, bins, mel_frames = config.vision.image_size, config.audio.num_mel_bins, config.audio.mel_frames
    images = audios = sizes = None
    if any(sample.images is not None for sample in samples):
        dtype = next(s.images.dtype for s in samples if s.images is not None)
        images = tuple(torch.zeros(0, 3, side, side, dtype=dtype) if s.images is None else s.images for s in samples)
    if any(sample.audio is not None for sample in samples):
        audios = tuple(torch.zeros(0, bins, mel_frames) if s.audio is None else s.audio for s in samples)
        sizes = tuple(s.audio_size or 0 for s in samples)
    ids_BT = _pad_ids([s.ids for s in samples], config.pad_id)
    return Batch(
        input_ids_BT=ids_BT,
        keep_BT=keep_from_lengths([len(s.ids) for s in samples], ids_BT.shape[1]),
        images=images,
        audios=audios,
        audio_sizes=sizes,
        labels_BT=_pad_ids([s.labels or () for s in samples], IGNORED_LABEL) if all(labelled) else None,
    )


def pack_text(
    input_ids_BT: Tensor,
    keep_BT: Tensor | None = None,
    labels_BT: Tensor | None = None,
    placeholder: int = IMAGE_PLACEHOLDER,
    pad_id: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Kept tokens = keep mask AND id ≠ placeholder, packed to the left in order, padded at the right (spec §6).

    (B, T) ids, keep mask (None = all kept) and labels -> (B, T') of each, T' the longest row; what is padded holds
    ``pad_id``, False and -100. Holes and left padding of the mask close. One host sync, for T'.
    """
    kept_BT = input_ids_BT != placeholder
    if keep_BT is not None:
        kept_BT = kept_BT & keep_BT
    length = int(kept_BT.sum(dim=1).max()) if kept_BT.numel() else 0
    order_BT = torch.argsort(~kept_BT, dim=1, stable=True)[:, :length]
    packed_BT = kept_BT.gather(1, order_BT)
    ids_BT = input_ids_BT.gather(1, order_BT).masked_fill(~packed_BT, pad_id)
    if labels_BT is not None:
        labels_BT = labels_BT.gather(1, order_BT).masked_fill(~packed_BT, IGNORED_LABEL)
    return ids_BT, packed_BT, labels_BT


def pad_rows(rows: Sequence[Tensor], length: int | None = None) -> Tensor:
    """B tensors (L_b, …) -> (B, L, …), zeros at the right; L is the longest, or ``length``. Differentiable."""
    padded = pad_sequence(list(rows), batch_first=True)
    if length is None or length == padded.shape[1]:
        return padded
    if length < padded.shape[1]:
        raise ValueError(f"rows of {padded.shape[1]} do not fit into {length}")
    return torch.cat([padded, padded.new_zeros(len(rows), length - padded.shape[1], *padded.shape[2:])], dim=1)


def keep_from_lengths(
    lengths: Sequence[int] | Tensor, num_positions: int, device: torch.device | str | None = None
) -> Tensor:
    """Row b keeps its first ``lengths[b]`` of ``num_positions``: (B, L) bool. Lengths [2, 3], L = 4:

    T T F F
    T T T F
    """
    lengths_B = torch.as_tensor(lengths, device=device)
    return torch.arange(num_positions, device=lengths_B.device) < lengths_B[:, None]


def _pad_ids(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    tensors = [torch.tensor(list(row), dtype=torch.int64) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=value)


def _check_grid(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    if tensor.ndim != 2 or tensor.dtype != dtype or (shape is not None and tuple(tensor.shape) != shape):
        raise ValueError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; {dtype} of shape {shape or '(B, T)'} is needed"
        )


def _check_media(
    name: str, tensors: tuple[Tensor, ...], num_samples: int, shape: str, *, ndim: int, pixels: bool = False
) -> None:
    if len(tensors) != num_samples:
        raise ValueError(f"{len(tensors)} {name} for {num_samples} samples; one each is needed, an empty one for none")
    for row, x in enumerate(tensors):
        if x.ndim != ndim or not (x.is_floating_point() or (pixels and x.dtype == torch.uint8)):
            kinds = "uint8 pixels or floats" if pixels else "floats"
            raise ValueError(f"{name}[{row}] is {x.dtype} of shape {tuple(x.shape)}; {kinds} {shape} are needed")


def _check_sample(row: int, sample: Sample, config: VidiConfig) -> None:
    placeholder, vocab = config.image_placeholder, config.decoder.vocab_size
    if outside := [token for token in sample.ids if token != placeholder and not 0 <= token < vocab]:
        raise ValueError(f"row {row} holds ids {outside[:5]}; the vocabulary is 0 to {vocab - 1}, and {placeholder}")
    count = sum(token == placeholder for token in sample.ids)
    if count > 1 or (count == 0 and (sample.images is not None or sample.audio is not None)):
        raise ValueError(f"row {row} holds {count} placeholders ({placeholder}); exactly one stands for the video")
    if len(sample.ids) == count:
        raise ValueError(f"row {row} holds no text; at least one token is needed")
    if sample.labels is not None and len(sample.labels) != len(sample.ids):
        raise ValueError(f"row {row} has {len(sample.labels)} labels for {len(sample.ids)} ids; one each is needed")
    side, bins, mel_frames = config.vision.image_size, config.audio.num_mel_bins, config.audio.mel_frames
    if sample.images is not None and tuple(sample.images.shape[1:]) != (3, side, side):
        raise ValueError(f"row {row}: images {tuple(sample.images.shape)}; the model takes (F, 3, {side}, {side})")
    if (sample.audio is None) != (sample.audio_size is None):
        raise ValueError(f"row {row}: audio and audio_size go together: give both, or neither")
    if sample.audio is not None and tuple(sample.audio.shape[1:]) != (bins, mel_frames):
        raise ValueError(f"row {row}: audio {tuple(sample.audio.shape)}; the model takes (P, {bins}, {mel_frames})")
