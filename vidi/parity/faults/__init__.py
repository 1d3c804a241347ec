"""Known faults of this model, each in the code of one stage, by area; `stageparity.faults` plants and judges them.

The 28 faults whose effect on the release's logits was measured are among them (`MEASURED`).
"""

from __future__ import annotations

from pathlib import Path

from stageparity import tolerance
from stageparity.faults.judge import Bench
from stageparity.faults.plant import Fault
from vidi.parity.faults import (
    again,
    attention,
    audio,
    bridge,
    caches,
    decoder,
    decoding,
    dtypes,
    masks,
    norms,
    packing,
    position,
    rotation,
    seven,
    text,
    towers,
    unpadding,
)  # fmt: skip
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

__all__ = ["FAULTS", "FAULTS_7B", "MEASURED", "MEASURED_7B", "bench"]

_AREAS = (
    *(towers, bridge, norms, position, packing, masks, audio, text),
    *(rotation, attention, decoder, unpadding, caches, decoding, dtypes),
)

#: every fault by name, in data-flow order of the areas
FAULTS: dict[str, Fault] = {
    fault.name: fault for area in _AREAS for fault in vars(area).values() if isinstance(fault, Fault)
}

#: those of the 7B: of shared code over one of its cases, and of its own
FAULTS_7B: dict[str, Fault] = {
    fault.name: fault
    for fault in (*again.over_the_7b(FAULTS.values()), *(f for f in vars(seven).values() if isinstance(f, Fault)))
}

#: the faults measured on the release itself (largest movement of its logits known), by the name given there
MEASURED: dict[str, str] = {
    "no attn softcap in cross attention": "attention.no_softcap_cross",
    "no attn softcap in self attention": "attention.no_softcap_self",
    "no final softcap": "decoding.no_final_softcap",
    "sliding window w instead of w+1 keys": "attention.window_one_short",
    "no sliding window": "attention.window_missing",
    "mm rms_norm eps 1e-6 (all)": "norms.rms_eps",
    "no rms_norm on position embeddings": "position.embedding_not_normed",
    "gemma norm eps 1e-5": "decoder.norm_eps",
    "gelu tanh in projectors+pos mlps": "bridge.projector_gelu_tanh",
    "gelu erf in gemma mlp": "decoder.mlp_gelu_erf",
    "position sinusoid computed in float64": "dtypes.sinusoid_in_float64",
    "position i*((N-1)/(l-1)) in float32": "dtypes.positions_step_first",
    "sin/cos concatenated, not interleaved": "position.halves_not_interleaved",
    "h and w embeddings swapped": "position.height_and_width_exchanged",
    "space_to_depth channel order (m,m,C)": "bridge.fold_channels_last",
    "pad top/left instead of bottom/right": "bridge.pad_top_left",
    "replicate pad": "bridge.pad_replicate",
    "resize align_corners=True": "bridge.resize_align_corners",
    "resize antialias=True": "bridge.resize_antialias",
    "resize bicubic": "bridge.resize_bicubic",
    "vision select_layer -1": "towers.hidden_state_last",
    "rotary on cross attention": "rotation.rope_on_stream",
    "kv mask ignored in cross attention": "masks.stream_mask_ignored",
    "cross attention scale off by 1%": "attention.scale_one_percent",
    "kv heads tiled instead of repeat_interleaved (xattn)": "attention.heads_tiled_cross",
    "streams not updated through the layers": "decoder.streams_not_updated",
    "llm_norm 1% too large": "norms.llm_norm_one_percent",
    "audio: one frame late before pooling": "audio.one_position_late",
}

#: the same for the 7B's release; None: it moves nothing, or it changes a shape, which nobody misses
MEASURED_7B: dict[str, str | None] = {
    "align_corners=False in the pool": "seven.pool_corners_not_aligned",
    "nearest instead of bilinear": "seven.pool_nearest",
    "h and w of the pool swapped": "seven.pool_height_and_width_exchanged",
    "tower output -1 instead of -2": "towers.hidden_state_last_7b",
    "projector GELU tanh": "bridge.projector_gelu_tanh_7b",
    "bridge eps 1e-6": "norms.rms_eps_7b",
    "decoder eps 1e-5 <-> 1e-6": "seven.norm_eps_of_the_9b",
    "pos_h and pos_w swapped": "position.height_and_width_exchanged_7b",
    "pos over 0..P instead of 0..P-1": "position.extent_off_by_one_7b",
    "sin and cos as halves, not interleaved": "position.halves_not_interleaved_7b",
    "position table in float64": "position.frequencies_in_float64_7b",
    "no rms() on the position embeddings": "position.embedding_not_normed_7b",
    "tokens ordered (t, w, h)": "packing.flattened_columns_first_7b",
    "llm norm left out": "seven.llm_norm_missing",
    "audio trim rounded up": "audio.trimmed_by_one_more_7b",
    "audio tokens rounded up": None,
    "sqrt(D) factor on the text": "seven.factor_of_the_9b",
    "norm weight 1 + w": "seven.norm_weight_plus_one",
    "rope on the cross-attention queries": "rotation.rope_on_stream_queries_7b",
    "window: w keys instead of w+1": "attention.window_one_short_7b",
    "window ignored": "attention.window_missing_7b",
    "window on even layers only (as the 9B)": "seven.window_on_even_layers",
    "kv head n % G": "attention.heads_tiled_self_7b",
    "scale with H+1": "seven.scale_of_one_more",
    "FFN GELU tanh instead of SiLU": "seven.gelu_of_the_9b",
    "stream not normed before k, v": "decoder.stream_keys_not_normed_7b",
    "stream keeps the value without feed-forward": "decoder.streams_without_mlp_7b",
    "stream never updated": "decoder.streams_not_updated_7b",
    "key mask ignored in the cross-attention": "masks.stream_mask_ignored_7b",
    "gate ignored": None,
    "raw-frame half of the mask rule ignored": "masks.black_frames_count_7b",
    "text padding not zeroed": "text.padding_embedded_7b",
    "placeholder kept as a position": "text.placeholder_kept_7b",
    "head tied to the embedding": "seven.head_tied",
    "final softcap 30": "seven.final_softcap_of_the_9b",
    "attention softcap 50": "seven.softcap_of_the_9b",
}


def bench(goldens: Path) -> Bench:
    """Where the faults are planted: our plain model on a CPU, over the cases of a golden folder."""
    return Bench(VidiSubject, goldens, tolerance.load(goldens, STAGES))
