"""Known faults of this model, each in the code of one stage, by area; `stageparity.faults` plants and judges them.

The 28 faults whose effect on the release's logits was measured are among them (`MEASURED`).
"""

from __future__ import annotations

from pathlib import Path

from stageparity import tolerance
from stageparity.faults.judge import Bench
from stageparity.faults.plant import Fault
from vidi.parity.faults import (
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
    text,
    towers,
    unpadding,
)  # fmt: skip
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

__all__ = ["FAULTS", "MEASURED", "bench"]

_AREAS = (
    *(towers, bridge, norms, position, packing, masks, audio, text),
    *(rotation, attention, decoder, unpadding, caches, decoding, dtypes),
)

#: every fault by name, in data-flow order of the areas
FAULTS: dict[str, Fault] = {
    fault.name: fault for area in _AREAS for fault in vars(area).values() if isinstance(fault, Fault)
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


def bench(goldens: Path) -> Bench:
    """Where the faults are planted: our plain model on a CPU, over the cases of a golden folder."""
    return Bench(VidiSubject, goldens, tolerance.load(goldens, STAGES))
