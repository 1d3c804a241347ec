"""Sizes and constants of the model: frozen dataclasses, read from the official ``config.json`` (spec §1).

The official file describes the decoder and the bridge; the towers are two public models that it only names, so
their sizes default to those models and may be given as ``vision_config`` / ``audio_config`` beside the other fields.
Defaults are the release's, read from `release.toml`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from stageparity import strict
from vidi import official, official_7b
from vidi.release import RELEASE, ReleaseWarning, contradictions

__all__ = ["AudioConfig", "ConfigError", "DecoderConfig", "VidiConfig", "VisionConfig"]


class ConfigError(ValueError):
    """A configuration that this model cannot honour; the text names the fields, in one line of bounded length."""

    def __init__(self, problem: str) -> None:
        super().__init__(strict.one_line(problem))


_VISION, _AUDIO, _BRIDGE, _TOKENS = (RELEASE[table] for table in ("vision", "audio", "bridge", "tokens"))
_MAY_BE_NEGATIVE = {"image_placeholder"}
_MAY_BE_ZERO = {"pad_id", "bos_id", "end_of_turn_id"}
# Sizes and positions are counted in 32 bits; real values beyond these would overflow the dtypes that they are cast to.
_LARGEST, _SMALLEST_REAL, _LARGEST_REAL = 2**31 - 1, 1e-12, 1e9


def _mistyped(part: Any) -> Iterator[str]:
    """What is no number where one is declared, or out of its range: counts are at least 1, real values above 0."""
    for entry in fields(part):
        value, declared = getattr(part, entry.name), str(entry.type)
        if value is None and "None" in declared:
            continue
        least = -_LARGEST if entry.name in _MAY_BE_NEGATIVE else 0 if entry.name in _MAY_BE_ZERO else 1
        if declared.startswith("int") and not (type(value) is int and least <= value <= _LARGEST):
            yield f"{entry.name} = {_shown(value)} (a whole number from {least} to {_LARGEST:,})"
        real = type(value) in (int, float) and _SMALLEST_REAL <= value <= _LARGEST_REAL
        if "float" in declared and not real:
            yield f"{entry.name} = {_shown(value)} (a number from {_SMALLEST_REAL} to {_LARGEST_REAL:,.0f})"


def _shown(value: Any) -> str:
    text = "an integer of many digits" if type(value) is int and abs(value) > 10**30 else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _Checked:
    """A part of the configuration that refuses fields of the wrong type."""

    def __post_init__(self) -> None:
        if wrong := list(_mistyped(self)):
            raise ConfigError("fields of the wrong type or range: " + "; ".join(wrong))


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Checked):
    """SigLIP2 tower. Defaults: so400m patch14-384."""

    image_size: int = _VISION["image_size"]
    patch_size: int = _VISION["patch_size"]
    num_channels: int = _VISION["num_channels"]
    hidden_size: int = _VISION["hidden_size"]
    num_layers: int = _VISION["num_layers"]
    num_heads: int = _VISION["num_heads"]
    intermediate_size: int = _VISION["intermediate_size"]
    layer_norm_eps: float = _VISION["layer_norm_eps"]

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class AudioConfig(_Checked):
    """Whisper encoder. Defaults: large-v3."""

    num_mel_bins: int = _AUDIO["num_mel_bins"]
    hidden_size: int = _AUDIO["hidden_size"]
    num_layers: int = _AUDIO["num_layers"]
    num_heads: int = _AUDIO["num_heads"]
    intermediate_size: int = _AUDIO["intermediate_size"]
    max_source_positions: int = _AUDIO["max_source_positions"]
    layer_norm_eps: float = _AUDIO["layer_norm_eps"]

    @property
    def mel_frames(self) -> int:
        """Mel frames of one piece; the tower's second convolution halves them to ``max_source_positions``."""
        return 2 * self.max_source_positions


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(_Checked):
    """Gemma 2 or Mistral. Every field is given by the checkpoint; what has a default here is absent from the 7B's.

    kind: chooses norms, activation, head and how they are joined (`vidi.decoder.parts`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    rms_norm_eps: float
    rope_theta: float
    query_pre_attn_scalar: float | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    kind: Literal["gemma2", "mistral"] = "gemma2"
    windowed_every: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = ("sliding_window", "query_pre_attn_scalar", "attn_softcap", "final_softcap")
        if self.kind == "gemma2" and (absent := [name for name in needed if getattr(self, name) is None]):
            raise ConfigError(f"fields of the wrong type or range: {', '.join(f'{name} = None' for name in absent)}")

    def window(self, layer_idx: int) -> int | None:
        """Past keys that layer ``layer_idx`` sees beside the query itself; None = all (spec §7)."""
        return self.sliding_window if layer_idx % self.windowed_every == 0 else None

    @property
    def scale(self) -> float:
        return (self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar) ** -0.5


@dataclass(frozen=True, kw_only=True)
class VidiConfig(_Checked):
    vision: VisionConfig
    audio: AudioConfig
    decoder: DecoderConfig
    image_pool_size: int = _BRIDGE["image_pool_size"]
    audio_pool_size: int = _BRIDGE["audio_pool_size"]
    time_interval: int = _BRIDGE["time_interval"]
    norm_std: float = _BRIDGE["norm_std"]
    visual_token_budget: int = _BRIDGE["visual_token_budget"]
    budget_scope: Literal["batch", "video"] = _BRIDGE["budget_scope"]
    loss_threshold: float | None = None
    bos_id: int = _TOKENS["bos_id"]
    pad_id: int = _TOKENS["pad_id"]
    end_of_turn_id: int = _TOKENS["end_of_turn_id"]
    image_placeholder: int = _TOKENS["image_placeholder"]
    max_positions: int = _TOKENS["max_positions"]
    # Which parts the bridge has: how patches become tokens, which step gives sound the decoder's width, and whether the
    # position MLPs' weights pass through the model's dtype on their way to float32.
    image_grid: Literal["fold", "conv"] = "fold"
    audio_widens: Literal["pool", "projector"] = "pool"
    positions_rounded: bool = False

    @property
    def image_kernel(self) -> int:
        """Side of the learned pool's kernel, ceil(patches / pool): 14 for 2 tokens a side of 27 patches, 9 for 3, 7 for 4."""
        return -(-self.vision.patches_per_side // self.image_pool_size)

    @property
    def audio_pool_width(self) -> int:
        """Channels after the audio pool: the decoder's width where the pool widens, the encoder's where the projector does."""
        return {"pool": self.decoder.hidden_size, "projector": self.audio.hidden_size}[self.audio_widens]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self, "norm_std", float(self.norm_std)
        )  # weights start from it: a file's 1 must not make integers
        wrong = []
        if self.image_grid == "fold" and self.image_pool_size != 2:
            wrong.append(f"mm_image_pool_size {self.image_pool_size}: only 2 is specified")
        if self.image_grid == "conv" and self.image_pool_size > self.vision.patches_per_side:
            wrong.append(
                f"mm_image_pool_size {self.image_pool_size}: the grid has {self.vision.patches_per_side} patches a side"
            )
        if self.budget_scope not in ("batch", "video"):
            wrong.append(f"budget_scope {_shown(self.budget_scope)}: 'batch' or 'video'")
        if self.visual_token_budget < 1:
            wrong.append(f"visual_token_budget {self.visual_token_budget}: at least 1")
        d = self.decoder
        if d.num_heads % d.num_kv_heads:
            wrong.append(f"num_attention_heads {d.num_heads} is no multiple of num_key_value_heads {d.num_kv_heads}")
        if d.head_dim % 2:
            wrong.append(f"head_dim {d.head_dim} is odd; rotary embedding pairs its halves")
        for name, tower in (("vision", self.vision), ("audio", self.audio)):
            if tower.hidden_size % tower.num_heads:
                wrong.append(f"{name} width {tower.hidden_size} is no multiple of its {tower.num_heads} heads")
        if self.vision.patch_size > self.vision.image_size:
            wrong.append(f"patches of {self.vision.patch_size} pixels in images of {self.vision.image_size}")
        if self.vision.num_layers < 2:
            wrong.append("the vision tower is read at the layer before its last: it needs at least 2 layers")
        if wrong:
            raise ConfigError("contradictory configuration: " + "; ".join(wrong))

    # ---- the official config.json -----------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        raw: Mapping[str, Any],
        *,
        vision: VisionConfig | Mapping[str, Any] | None = None,
        audio: AudioConfig | Mapping[str, Any] | None = None,
    ) -> VidiConfig:
        """Read the fields of an official ``config.json`` (spec §1).

        ``vision`` and ``audio`` give the towers' sizes (ours, or a Hugging Face tower config as a mapping); without
        them ``raw["vision_config"]`` / ``raw["audio_config"]`` count, and without those the two public models.

        Raises ConfigError naming every unknown, missing or contradictory field. Warns (`ReleaseWarning`), naming the
        fields, where a model of the released widths has other numbers than the release: weights that fit them may be
        the released ones, and would give wrong answers.
        """
        known = official_7b.SEVEN if _is_7b(raw) else official.NINE
        wrong = []
        for name, allowed in known.values.items():
            if name in raw and raw[name] not in allowed:
                wrong.append(f"{name} = {_shown(raw[name])} (this model computes {' or '.join(map(repr, allowed))})")
        if wrong:
            raise ConfigError("fields that this model cannot honour: " + "; ".join(wrong))
        needed = known.needed if vision or "vision_config" in raw else (*known.needed, *known.tower)
        if missing := sorted(name for name in needed if name not in raw):
            raise ConfigError(f"missing fields: {', '.join(missing)}")
        if unknown := sorted(set(raw) - known.known):
            raise ConfigError(
                f"unknown fields: {', '.join(unknown)}; remove them, or teach vidi/config.py their meaning"
            )
        config = cls(
            vision=_tower(
                VisionConfig,
                official.VISION_FIELDS,
                official.VISION_REQUIRED,
                raw.get("vision_config"),
                vision,
                "vision",
            ),
            audio=_tower(
                AudioConfig, official.AUDIO_FIELDS, official.AUDIO_REQUIRED, raw.get("audio_config"), audio, "audio"
            ),
            decoder=DecoderConfig(**_decoder_fields(raw, known)),
            **known.bridge_parts,
            **{ours: raw[name] for name, ours in known.bridge.items() if name in raw and not _absent(raw, name)},
        )
        if found := contradictions(config):
            warnings.warn(
                f"a model of the released widths whose config.json contradicts the release: {'; '.join(found)}. Where its "
                "weights are the released ones, answers will be wrong: correct config.json",
                ReleaseWarning,
                stacklevel=2,
            )
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> VidiConfig:
        """Read ``config.json`` (or the folder that holds it). Raises ConfigError naming the file."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            return cls.from_official(strict.read_json(path, hub_cache=True))
        except strict.Missing:
            text = "no such file; a checkpoint folder holds config.json beside its shards"
            raise ConfigError(f"{path}: {text}") from None
        except strict.Refused as error:
            raise ConfigError(str(error)) from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def to_official(self) -> dict[str, Any]:
        """The official fields, with the towers' sizes beside them where they are not the public models'."""
        known = official_7b.SEVEN if self.decoder.kind == "mistral" else official.NINE
        raw: dict[str, Any] = {"model_type": known.values["model_type"][0], "architectures": [known.architecture]}
        raw |= {name: getattr(self.decoder, ours) for name, ours in known.decoder.items()}
        raw |= {name: getattr(self, ours) for name, ours in known.bridge.items()}
        raw |= {name: allowed[0] for name, allowed in known.values.items() if name != "model_type"}
        raw["torch_dtype"] = "bfloat16"
        if self.vision != VisionConfig():
            raw["vision_config"] = {name: getattr(self.vision, ours) for name, ours in official.VISION_FIELDS.items()}
        if self.audio != AudioConfig():
            raw["audio_config"] = {name: getattr(self.audio, ours) for name, ours in official.AUDIO_FIELDS.items()}
        return raw

    # ---- sizes ------------------------------------------------------------------------------------------------

    @classmethod
    def full(cls) -> VidiConfig:
        """The released 9B checkpoint (spec §1)."""
        return cls(vision=VisionConfig(), audio=AudioConfig(), decoder=DecoderConfig(**RELEASE["decoder"]))

    @classmethod
    def tiny(cls) -> VidiConfig:
        """Sizes for tests and the embedded checkpoint, chosen so that every feature bites.

        sqrt(40) is inexact in every dtype, the attention scale is not head_dim^-0.5, N·H differs from D, kv heads are
        shared, the window is shorter than a prompt, the patch grid is odd, one audio piece is one second, and more than 16
        frames pass the token budget.
        """
        return cls(
            visual_token_budget=16 * 49,
            vision=VisionConfig(
                image_size=26, patch_size=2, hidden_size=32, num_layers=3, num_heads=4, intermediate_size=64
            ),
            audio=AudioConfig(
                num_mel_bins=16,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                intermediate_size=64,
                max_source_positions=50,
            ),
            decoder=DecoderConfig(
                vocab_size=512,
                hidden_size=40,
                intermediate_size=96,
                num_layers=4,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                sliding_window=8,
                query_pre_attn_scalar=12,
                attn_softcap=50.0,
                final_softcap=30.0,
                rms_norm_eps=1e-6,
                rope_theta=10000.0,
            ),
        )


def _is_7b(raw: Mapping[str, Any]) -> bool:
    """Recordings lack `model_type`; Gemma 2's own scale tells the models apart then."""
    return (
        raw.get("model_type", "dattn_gemma2" if "query_pre_attn_scalar" in raw else "dattn_mistral") == "dattn_mistral"
    )


def _decoder_fields(raw: Mapping[str, Any], known: official.Fields) -> dict[str, Any]:
    found = {ours: raw[name] for name, ours in known.decoder.items() if name in raw} | known.decoder_parts
    if "head_dim" not in known.needed and found.get("head_dim") is None:
        found["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    return found


def _tower(
    kind: Any, fields: Mapping[str, str], required: Mapping[str, Any], in_file: Any, given: Any, name: str
) -> Any:
    if isinstance(given, kind):
        return given
    raw = given if given is not None else in_file
    if raw is None:
        return kind()
    if not isinstance(raw, Mapping):
        raise ConfigError(f"{name}_config: an object is expected, found {type(raw).__name__}")
    if unknown := sorted(set(raw) - set(fields) - set(required) - official.GENERIC - official.TOWER_IGNORED):
        raise ConfigError(f"unknown fields in {name}_config: {', '.join(unknown)}")
    for field_name, value in required.items():
        if field_name in raw and raw[field_name] != value:
            raise ConfigError(f"{name}_config.{field_name} = {_shown(raw[field_name])} (this model computes {value!r})")
    config = kind(**{ours: raw[theirs] for theirs, ours in fields.items() if theirs in raw})
    if isinstance(config, AudioConfig) and raw.get("nb_max_frames", config.mel_frames) != config.mel_frames:
        raise ConfigError(
            f"audio_config.nb_max_frames {_shown(raw['nb_max_frames'])} is not twice max_source_positions "
            f"{config.max_source_positions}"
        )
    return config


def _absent(raw: Mapping[str, Any], name: str) -> bool:
    """A null in the file means "not set" for every bridge field but the loss threshold, where it is the value."""
    return raw[name] is None and name != "loss_thres"
