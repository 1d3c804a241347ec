"""Known faults that are the other model's way: one who ports 1.5 9B from code or files of the 7B, or the reverse, is told so
(docs/rfc-answers.md, "What the 7B does instead", row by row). No torch, no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from stageparity.port.explain import Explanation, Match

__all__ = ["WAYS", "named"]

AS_IN_7B = (
    "attention.no_softcap_cross", "attention.no_softcap_self", "attention.scale_of_head_dim", "attention.scale_of_head_dim_cross",
    "attention.window_on_odd_layer", "bridge.project_each_location", "bridge.resize_align_corners", "decoder.mlp_silu",
    "decoder.norm_eps", "decoder.norm_weight_plain", "decoder.post_attn_norm_missing", "decoder.post_ffn_norm_missing",
    "decoding.no_final_softcap", "text.factor_omitted",
)  # fmt: skip
AS_IN_9B = (
    "seven.factor_of_the_9b", "seven.feed_forward_normed_as_in_the_9b", "seven.final_softcap_of_the_9b", "seven.fold_for_conv",
    "seven.attention_normed_as_in_the_9b", "seven.gelu_of_the_9b", "seven.head_tied", "seven.norm_cast_late",
    "seven.norm_eps_of_the_9b", "seven.norm_weight_plus_one", "seven.pool_corners_not_aligned", "seven.scale_of_the_9b",
    "seven.softcap_of_the_9b", "seven.softcap_of_the_9b_cross", "seven.stop_token_of_the_9b", "seven.window_on_even_layers",
)  # fmt: skip
#: fault -> whose way it is
WAYS = dict.fromkeys(AS_IN_7B, "the 7B's way") | dict.fromkeys(AS_IN_9B, "the 9B's way")


def named(explanations: Iterable[Explanation]) -> list[Explanation]:
    """The same, and of each fault, or one that cannot be told from it, whether it is the other model's way."""
    return [replace(one, matches=tuple(replace(m, way=_way(m)) for m in one.matches)) for one in explanations]


def _way(match: Match) -> str:
    known = [name for name in (match.fault, *match.alike) if name in WAYS]
    which = f"`{known[0]}` is " if known and match.alike else ""
    return which + WAYS[known[0]] if known else ""
