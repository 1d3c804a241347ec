"""What goes into a forward pass: sizes, weights and the case's inputs, read from official names; and what comes out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from .casts import Arithmetic

__all__ = ["IMAGE_PLACEHOLDER", "Keep", "Parts", "Sizes", "Trace", "Weights", "audio_samples", "video_samples"]

IMAGE_PLACEHOLDER = -200
Keep = None | str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True)
class Parts:
    """The steps in which the models differ, as functions: `nine.py` and `seven.py` hold those of each."""

    #: (ar, sizes, w, x_FCyx, frames that share the budget, trace, suffix) -> (F, channels, y, x): what the projector sees
    grid: Callable[..., np.ndarray]
    #: (ar, x, weight, eps) -> x: a norm of the decoder
    norm: Callable[..., np.ndarray]
    #: (x) -> x: the feed-forward's
    activation: Callable[[np.ndarray], np.ndarray]
    #: (layer, x, outputs of its attentions) -> x: how they join it
    join: Callable[..., np.ndarray]
    #: (layer, x) -> x: its norms and the MLP
    feed_forward: Callable[..., np.ndarray]
    #: (ar, sizes, w, normed_BTD, trace) -> (B, T, K)
    logits: Callable[..., np.ndarray]
    #: (ar, sizes, w, normed_BTD, labels_BT, thresholds, trace): traces the losses
    losses: Callable[..., None]


@dataclass(frozen=True)
class Sizes:
    """The numbers of an official config.json (+ "vision_config", "audio_config") that the mathematics needs (§1)."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    windowed_every: int  # layers 0, n, 2n, … have the window
    score_scale: float
    attn_softcap: float | None
    embed_factor: float
    norm_eps: float
    rope_theta: float
    image_pool: int
    audio_pool: int
    time_interval: int
    patch: int
    vision_layers_run: int
    vision_heads: int
    vision_eps: float
    audio_layers: int
    audio_heads: int
    audio_positions: int
    audio_eps: float
    stop_id: int
    placeholder: int
    parts: Parts
    rounded_positions: bool = False  # position MLPs' weights, to the model's dtype, before they are widened
    final_softcap: float | None = None
    token_budget: int | None = None
    budget_scope: str = "batch"


class Weights:
    """The weights by official name, rounded to the run's dtype on first use. `wide` gives one as the position MLPs have
    it: float32 also in a half-precision model (§5), from the checkpoint's own values or, `rounded`, from the run's."""

    def __init__(self, ar: Arithmetic, tensors: Mapping[str, np.ndarray], rounded: bool = False) -> None:
        self._ar, self._tensors, self._stored = ar, tensors, dict[str, np.ndarray]()
        self._rounded = rounded

    def _raw(self, name: str) -> np.ndarray:
        if name not in self._tensors:
            raise ValueError(
                f"weight {name!r} is missing among {len(self._tensors)} tensors; names are the official ones"
            )
        return np.asarray(self._tensors[name])

    def __call__(self, name: str) -> np.ndarray:
        if name not in self._stored:
            self._stored[name] = self._ar.store(self._raw(name).astype(self._ar.work))
        return self._stored[name]

    def optional(self, name: str) -> np.ndarray | None:
        """Like a call, None where there is no such tensor (Whisper's k_proj has no bias)."""
        return self(name) if name in self._tensors else None

    def wide(self, name: str) -> np.ndarray:
        """In the dtype of the float32-forced steps."""
        return self._ar.widen(self(name) if self._rounded else self._raw(name))


class Trace:
    """Stage tensors under the recorded ids. `keep` names what to hold: None all, a glob, globs, or a predicate.

    `anchor` gives tensors by stage id: the run goes on with these in place of its own, so that every stage is fed what
    another run had, and its error is its own. `store` rounds them to the run's dtype.
    """

    def __init__(
        self,
        keep: Keep = None,
        anchor: Mapping[str, np.ndarray] | None = None,
        store: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> None:
        self._keep = _predicate(keep)
        self._parts: dict[str, list[np.ndarray]] = {}
        self._anchor, self._store = anchor or {}, store
        self._passed: dict[str, int] = {}

    @property
    def anchored(self) -> bool:
        """Whether some stage is fed from outside."""
        return bool(self._anchor)

    def put(self, stage: str, value: np.ndarray) -> np.ndarray:
        """Hold `value` (further pieces of the same stage follow it on axis 0) and return what the run goes on with."""
        if self._keep(stage):
            self._parts.setdefault(stage, []).append(value)
        if stage not in self._anchor or value.ndim == 0:
            return value
        start = self._passed.get(stage, 0)
        self._passed[stage] = start + len(value)
        # a case with losses holds its logits flat
        piece = self._anchor[stage].reshape(-1, *value.shape[1:])[start : start + len(value)]
        return self._store(piece) if piece.dtype.kind == "f" else piece

    def result(self) -> dict[str, np.ndarray]:
        """Every held stage, pieces joined on axis 0."""
        return {stage: parts[0] if len(parts) == 1 else np.concatenate(parts) for stage, parts in self._parts.items()}


def _predicate(keep: Keep) -> Callable[[str], bool]:
    if keep is None:
        return lambda stage: True
    if callable(keep):
        return keep
    globs = [keep] if isinstance(keep, str) else list(keep)
    return lambda stage: any(fnmatchcase(stage, glob) for glob in globs)


def video_samples(inputs: Mapping[str, np.ndarray], batch: int) -> list[np.ndarray] | None:
    """Raw frames per sample, (F_b, 3, S, S) float; None where the case has no frames at all.

    `inputs.images.b`, else `inputs.images_u8.b` as u8/127.5 - 1 in float32. A sample without either has no frame.
    """
    found: dict[int, np.ndarray] = {}
    for b in range(batch):
        if f"inputs.images.{b}" in inputs:
            found[b] = np.asarray(inputs[f"inputs.images.{b}"])
        elif f"inputs.images_u8.{b}" in inputs:
            u8 = np.asarray(inputs[f"inputs.images_u8.{b}"])
            found[b] = u8.astype(np.float32) / np.float32(127.5) - np.float32(1)
    return _samples(found, batch)


def audio_samples(inputs: Mapping[str, np.ndarray], batch: int) -> list[np.ndarray] | None:
    """Log-mel pieces per sample, (P_b, M, mel frames); None where the case has no audio at all."""
    found = {b: np.asarray(inputs[f"inputs.audios.{b}"]) for b in range(batch) if f"inputs.audios.{b}" in inputs}
    return _samples(found, batch)


def _samples(found: dict[int, np.ndarray], batch: int) -> list[np.ndarray] | None:
    """One array per sample; a sample that has nothing gets a length 0 of the others' shape."""
    if not any(len(array) for array in found.values()):
        return None
    nothing = next(iter(found.values()))[:0]
    return [found.get(b, nothing) for b in range(batch)]
