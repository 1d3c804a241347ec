"""Why a tensor does not fit, in the model's terms (spec §1, §3, §4, §11). Texts hold no layer number, so that a report
can say one thing once for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set

from vidi.checkpoint import names
from vidi.checkpoint.headers import Entry
from vidi.checkpoint.names import Expected
from vidi.config import VidiConfig

__all__ = ["FLOATS", "dtype", "facts", "missing", "shape", "signs_of", "unexpected"]

FLOATS = ("BF16", "F16", "F32", "F64")


def shape(want: Expected, got: tuple[int, ...], config: VidiConfig) -> str:
    """Why a tensor of shape ``got`` stands where the config asks for ``want.shape``."""
    return f"{_list(got)} where the config asks for {_list(want.shape)}: {_shape_reason(want, got, config)}"


def _shape_reason(want: Expected, got: tuple[int, ...], config: VidiConfig) -> str:
    v, a, d = config.vision, config.audio, config.decoder
    if d.kind == "mistral" and want.part == "bridge" and (reason := _reason_7b(want, got, config)):
        return reason
    width, folded = v.hidden_size, 4 * v.hidden_size
    if want.ours == "bridge.audio_pool.weight" and len(got) == 3:
        if got[0] == got[1]:
            return (
                f"the 7B layout, whose audio pool keeps the encoder's width ({got[1]}→{got[0]}) and widens in the "
                f"projector; the 9B pools and widens in one step ({a.hidden_size}→{d.hidden_size})"
            )
        if got[:2] == want.shape[:2]:
            return f"a pool over {got[2]} positions; the config says mm_audio_pool_size {config.audio_pool_size}"
    if want.ours == "bridge.image_projector.fc1.weight" and len(got) == 2:
        if got[1] == width:
            return (
                f"the 7B layout, which projects each location alone ({width} channels); the 9B folds 2×2 patches into "
                f"channels first, 4·{width} = {folded}"
            )
        pool = math.isqrt(got[1] // width) if got[1] % width == 0 else 0
        if pool > 0 and pool * pool * width == got[1] and pool != 2:
            return (
                f"{pool}×{pool} patches folded into channels ({pool * pool}·{width}); "
                f"the 9B folds 2×2, 4·{width} = {folded}"
            )
    if want.ours == "bridge.audio_projector.fc1.weight" and len(got) == 2 and got[1] == a.hidden_size != d.hidden_size:
        return f"the 7B layout, whose projector widens {a.hidden_size}→{got[0]}; in the 9B the audio pool does that"
    if want.ours == "vision_tower.position.weight" and len(got) == 2 and math.isqrt(got[0]) ** 2 == got[0] > 0:
        side = math.isqrt(got[0])
        return (
            f"{side}×{side} patches, a tower for {side * v.patch_size}-pixel images; "
            f"the config has {v.patches_per_side}×{v.patches_per_side} ({v.image_size} pixels)"
        )
    if want.ours == "audio_tower.conv1.weight" and len(got) == 3 and got[1] != want.shape[1]:
        other = " (Whisper before large-v3)" if got[1] == 80 else ""
        return f"{got[1]} mel bins{other}; the config has {a.num_mel_bins}"
    if want.ours == "decoder.embed.weight" and len(got) == 2 and got[1] == d.hidden_size:
        return f"a vocabulary of {got[0]}; the config has {d.vocab_size}. Tokens were added or cut"
    if got == want.shape[::-1]:
        return "transposed; rows are outputs here, columns inputs"
    heads_differ = want.ours.endswith((".q.weight", ".k.weight", ".v.weight")) and want.part == "decoder"
    if heads_differ and len(got) == 2 and got[1] == want.shape[1]:
        heads = d.num_heads if want.ours.endswith("q.weight") else d.num_kv_heads
        return f"{got[0] / d.head_dim:g} heads of {d.head_dim}; the config has {heads}"
    if widths := _other_width(want.shape, got, d.hidden_size):
        return f"a decoder of width {widths}; the config has {d.hidden_size}"
    if math.prod(got) == math.prod(want.shape):
        return "the same number of values in another shape"
    return "another size of model than the config describes"


def _reason_7b(want: Expected, got: tuple[int, ...], config: VidiConfig) -> str:
    """The bridge of the 7B; nothing where what holds for both models says enough."""
    v, a = config.vision.hidden_size, config.audio.hidden_size
    if want.ours == "bridge.image_grid.conv.weight" and len(got) == 4:
        side, pool = config.vision.patches_per_side, config.image_pool_size
        return f"a kernel of {got[2]}×{got[3]}; {side} patches a side and mm_image_pool_size {pool} give {config.image_kernel}"
    if want.ours == "bridge.image_projector.fc1.weight" and got[1:] == (4 * v,):
        return f"1.5 9B's layout, which folds 2×2 patches into channels (4·{v}); the 7B projects each location alone"
    if want.ours == "bridge.audio_pool.weight" and len(got) == 3 and got[0] != got[1]:
        return f"1.5 9B's layout, whose audio pool widens ({got[1]}→{got[0]}); the 7B's keeps the encoder's {a}"
    if want.ours == "bridge.audio_projector.fc1.weight" and len(got) == 2 and got[0] == got[1]:
        return f"1.5 9B's layout, whose audio pool has widened before; the 7B's projector widens from {a}"
    return ""


def _other_width(want: tuple[int, ...], got: tuple[int, ...], width: int) -> int | None:
    """The one size that stands in ``got`` wherever ``want`` has the decoder's width; None if that is not all."""
    if len(want) != len(got) or any(a != b for a, b in zip(want, got, strict=True) if a != width):
        return None
    found = {b for a, b in zip(want, got, strict=True) if a == width}
    return found.pop() if len(found) == 1 else None


def dtype(want: Expected, got: str) -> str:
    """Why the stored dtype ``got`` cannot serve."""
    kind = "quantised weights" if got.startswith("F8") or got in ("I8", "U8") else "no floating-point weights"
    return f"{got}: {kind}; {', '.join(FLOATS)} are read" + (", position MLPs as float32" if want.is_float32 else "")


def missing(want: Expected, stored_layers: Set[tuple[str | None, int | None]]) -> str:
    """What the absence of a tensor means; ``stored_layers`` are the (part, layer) of which something is stored."""
    if want.ours.startswith("vision_tower.unused."):
        return "feeds nothing, but belongs to a whole checkpoint (the pooling head and post-norm of the tower)"
    if want.ours.endswith(("pre_ffn_norm.weight", "post_ffn_norm.weight")):
        return "Gemma 2 norms around the feed-forward; Mistral and Gemma 1 have none"
    if want.layer is not None and (want.part, want.layer) not in stored_layers:
        return "the whole layer is missing; the config asks for more layers than are stored"
    if want.ours.startswith("bridge."):
        return "part of the bridge: without it this is no multimodal checkpoint of this release"
    return "no shard holds it"


def unexpected(name: str, entry: Entry, wanted: Mapping[str, Expected], config: VidiConfig) -> str:
    """What a tensor might be that the config has no place for."""
    if names.our_name(name, config) is not None:
        part = names.part_of(name)
        tower = config.vision if part == "vision_tower" else config.audio if part == "audio_tower" else config.decoder
        return f"a layer beyond the config's {tower.num_layers} (0 to {tower.num_layers - 1})"
    if "lora_" in name:
        return "a LoRA adapter; merge it into the weights first"
    if name.endswith("inv_freq"):
        return "rotary frequencies are computed from the config, not stored"
    if name.endswith(".bias") and name.removesuffix("bias") + "weight" in wanted:
        return "this layer has no bias"
    if names.part_of(name) == "decoder" and "feedforward_layernorm" in name:
        return "a Gemma 2 norm around the feed-forward: 1.5 9B has it, the 7B has not"
    if names.part_of(name) == "bridge" and len(entry.shape) == 4:
        return f"a learned Conv2d over the image grid {_list(entry.shape)}, the 7B's pool; the 9B pools nothing"
    for cut in (".", "model.", "module.", "base_model.model."):
        stripped = name.partition(".")[2] if cut == "." else name.removeprefix(cut)
        if stripped != name and stripped in wanted:
            return f"would fit as {stripped}: a wrapper's prefix was saved with it"
    if "model." + name in wanted:
        return f"would fit as model.{name}: the prefix was stripped"
    return "no tensor of this model"


def signs_of(kind: str, tensors: Mapping[str, Entry]) -> list[str]:
    """What says that tensors are those of Vidi 7B ("mistral") or 1.5 9B ("gemma2"); empty where they are not. One odd shape
    alone is no proof."""
    by_ours = {names.our_name(name): entry.shape for name, entry in tensors.items() if names.part_of(name) == "bridge"}
    pool = by_ours.get("bridge.audio_pool.weight", ())
    image = by_ours.get("bridge.image_projector.fc1.weight", ())
    audio = by_ours.get("bridge.audio_projector.fc1.weight", ())
    position = tensors.get(names.official_name("vision_tower.position.weight") or "")
    width = position.shape[1] if position is not None and len(position.shape) == 2 else 0
    signs = _signs_of_9b(pool, image, width, tensors) if kind == "gemma2" else []
    if kind == "mistral":
        if len(pool) == 3 and pool[0] == pool[1]:
            signs.append(f"the audio pool {_list(pool)} keeps the encoder's width")
        if len(image) == 2 and image[1] == width:
            signs.append(f"the image projector {_list(image)} takes one location at a time")
        if len(audio) == 2 and len(pool) == 3 and audio[1] == pool[1] != audio[0]:
            signs.append(f"the audio projector {_list(audio)} does the widening")
        if any(len(entry.shape) == 4 and names.part_of(name) == "bridge" for name, entry in tensors.items()):
            signs.append("a learned Conv2d pools the image grid")
    return signs if len(signs) >= 2 else []


def _signs_of_9b(pool: tuple[int, ...], image: tuple[int, ...], width: int, tensors: Mapping[str, Entry]) -> list[str]:
    signs = []
    if len(pool) == 3 and pool[0] != pool[1]:
        signs.append(f"the audio pool {_list(pool)} widens")
    if len(image) == 2 and image[1] == 4 * width:
        signs.append(f"the image projector {_list(image)} takes 2×2 patches at a time")
    if any("feedforward_layernorm" in name for name in tensors):
        signs.append("Gemma 2 norms around the feed-forward")
    return signs


def facts(config: VidiConfig, head_stored: bool) -> list[str]:
    """What the shapes mean, said once in every report (the questions people ask first)."""
    v, a, d = config.vision, config.audio, config.decoder
    if d.kind == "mistral":
        pool, k = config.image_pool_size, config.image_kernel
        return [
            f"image pool [{v.hidden_size}, {v.hidden_size}, {k}, {k}]: a learned convolution, then {pool}×{pool} = {pool**2} "
            "samples a frame from corner to corner",
            f"audio pool [{a.hidden_size}, {a.hidden_size}, {config.audio_pool_size}]: pooling alone; the projector widens",
            f"{names.HEAD}: stored and not tied",
        ]
    side = (v.patches_per_side + 1) // 2
    return [
        f"image projector [{d.hidden_size}, {4 * v.hidden_size}]: 2×2 patches are folded into channels "
        f"(4·{v.hidden_size}), not pooled to 2×2; {side}×{side} = {side * side} tokens a frame",
        f"audio pool [{d.hidden_size}, {a.hidden_size}, {config.audio_pool_size}]: pooling and widening in one step",
        f"{names.HEAD}: "
        + ("stored, though tied; its bits are compared at loading" if head_stored else "absent, as it should be: tied"),
    ]


def _list(sizes: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
