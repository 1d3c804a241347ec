"""The faults of shared code once more, over a case of the 7B: a fault is code and a case that sees it. Left out is what is no
fault there, by name and reason.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace

from stageparity.faults.plant import Fault

__all__ = ["LEFT_OUT", "over_the_7b"]

#: case of the 9B -> one of the 7B that holds what it does
CASES = {"base": "base", "novideo": "base", "train": "train", "absent": "absent", "decode": "decode", "holes": "decode"}
LEFT_OUT = {
    "code that the 7B does not run": (
        *("bridge.pad_*", "bridge.resize_*", "bridge.fold_*", "text.factor_*", "decoder.norm_*", "dtypes.gemma_norm_*"),
        *("dtypes.factor_*", "decoder.post_*_norm_missing", "decoder.ffn_norms_exchanged", "decoding.loss_*"),
        *("dtypes.loss_in_half", "dtypes.*_norm_added_unrounded", "decoder.branches_normed_apart"),
    ),
    "a softcap, which it has not (`seven` gives it one)": (
        *("*softcap*", "caches.embedding_not_scaled_in_steps", "text.visual_factor_omitted", "text.audio_factor_twice"),
    ),
    "what it does itself": ("attention.scale_of_head_dim*", "attention.window_on_odd_layer", "decoder.mlp_silu"),
    "other sizes make it another fault, or none": (
        *("bridge.audio_projector_skipped", "position.time_in_frames", "audio.stride_four", "audio.pool_padded"),
        *("position.noise_after_scaling", "rotation.rope_theta", "decoding.head_off_by_one"),
    ),
    "no error: one rotation turned both ways is none": ("rotation.rope_backwards", "rotation.rope_queries_only"),
    "loud there: a shape or an end changes": (
        *("text.labels_keep_placeholder", "caches.written_one_early", "caches.queries_of_steps_unrotated"),
        *("decoding.labels_rolled", "decoding.last_but_one_read", "decoding.second_best"),
    ),
    "it is in the other embeddings too, above their noise": (
        "dtypes.sinusoid_in_float64",
        "dtypes.position_mlp_in_half",
    ),
}


def over_the_7b(faults: Iterable[Fault]) -> list[Fault]:
    """Their twins, called NAME_7b; half precision is float16, which is what the 7B's official command uses."""
    left_out = [glob for globs in LEFT_OUT.values() for glob in globs]
    return [
        replace(
            fault,
            name=f"{fault.name}_7b",
            case=f"small-7b/{CASES[fault.case]}",
            dtype=fault.dtype.replace("bfloat16", "float16"),
        )
        for fault in faults
        if fault.case in CASES and not fault.needs and not any(fnmatch.fnmatchcase(fault.name, g) for g in left_out)
    ]
