"""What goes into a forward pass: sizes, weights and the case's inputs, read from official names; and what comes out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .casts import Arithmetic

__all__ = ["IMAGE_PLACEHOLDER", "Keep", "Sizes", "Trace", "Weights", "audio_samples", "video_samples"]

IMAGE_PLACEHOLDER = -200
Keep = None | str | Iterable[str] | Callable[[str], bool]


@dataclass(frozen=True)
class Sizes:
    """The numbers of an official config.json (+ "vision_config", "audio_config") that the mathematics needs (§1)."""

    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    score_scale: float
    attn_softcap: float
    final_softcap: float
    norm_eps: float
    rope_theta: float
    image_pool: int
    audio_pool: int
    time_interval: int
    token_budget: int
    budget_scope: str
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

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> "Sizes":
        """From the official dict. Missing optional keys take the released values of spec §1."""
        vision, audio = config["vision_config"], config["audio_config"]
        scope = config.get("budget_scope", "batch")
        if scope not in ("batch", "video"):
            raise ValueError(f"budget_scope is {scope!r}; it must be 'batch' or 'video'")
        if config.get("mm_image_pool_size", 2) != 2:
            raise ValueError(f"mm_image_pool_size is {config['mm_image_pool_size']}; only 2 is specified (§3)")
        # hidden state k is the output after k layers; -2 of (layers + 1) states is one layer short of the end
        layers_run = vision["num_hidden_layers"] + 1 + config.get("mm_vision_select_layer", -2)
        return cls(
            width=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
            window=config["sliding_window"],
            score_scale=float(config["query_pre_attn_scalar"]) ** -0.5,
            attn_softcap=config["attn_logit_softcapping"],
            final_softcap=config["final_logit_softcapping"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=config.get("rope_theta", 10000.0),
            image_pool=2,
            audio_pool=config.get("mm_audio_pool_size", 5),
            time_interval=config.get("mm_time_interval", 10000),
            token_budget=config.get("visual_token_budget", 60000),
            budget_scope=scope,
            patch=vision["patch_size"],
            vision_layers_run=layers_run,
            vision_heads=vision["num_attention_heads"],
            vision_eps=vision.get("layer_norm_eps", 1e-6),
            audio_layers=audio["encoder_layers"],
            audio_heads=audio["encoder_attention_heads"],
            audio_positions=audio["max_source_positions"],
            audio_eps=audio.get("layer_norm_eps", 1e-5),
            stop_id=config.get("end_of_turn_id", 107),
            placeholder=config.get("image_placeholder", IMAGE_PLACEHOLDER),
        )


class Weights:
    """The weights by official name, rounded to the run's dtype on first use. `wide` gives one as the position MLPs have
    it: float32 also in a half-precision model (§5)."""

    def __init__(self, ar: Arithmetic, tensors: Mapping[str, np.ndarray]) -> None:
        self._ar, self._tensors, self._stored = ar, tensors, dict[str, np.ndarray]()

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
        """Unrounded, in the dtype of the float32-forced steps."""
        return self._ar.widen(self._raw(name))


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
