"""Faults planted in the MLX port (`mlx_port/`), in float32 and among 8-bit weights, and what must be said of each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tests.ports.planted import Edit, Planted, together

__all__ = ["BY_NAME", "FLOAT32", "QUANTISED", "RECORDED", "TOGETHER"]

STAGE, WIRING, TRACING = "stage", "wiring", "tracing"
EMBEDS = ("vision.pos_h.embed{g}", "vision.pos_w.embed{g}", "vision.pos_t.embed.{b}", "audio.pos_t.embed.{b}")
STREAMS = ("layer.{i}.image_stream", "layer.{i}.audio_stream")
KEYS = ("xattn.{i}.{m}.k", "xattn.{i}.{m}.v")
SELF, OUTPUT = "layer.{i}.t2t", "layer.{i}.output"
# Goldens hold the inside of cross-attention for the first and the last layer alone: in the others it shows in what it gives.
CROSS = "layer.{i}.t2{m}"


def _plant(
    name: str, kind: str, stages: Iterable[str], *edits: Edit, known: Iterable[str] = (), case: str = "small/base"
) -> Planted:
    return Planted(name, edits, dict.fromkeys(stages, kind), frozenset(known), case)


FLOAT32 = (
    _plant(
        "whisper_gelu_tanh", STAGE, ["audio.tower"],
        ("towers.py", "self.fc2(nn.gelu(self.fc1(", "self.fc2(nn.gelu_approx(self.fc1("),
        known=["towers.whisper_gelu_tanh"],
    ),
    _plant(
        "hidden_state_minus_three", STAGE, ["vision.tower"],
        ("towers.py", "in self.encoder.layers:", "in self.encoder.layers[:-1]:"),
        known=["towers.hidden_state_minus_three"],
    ),
    _plant(
        "pad_top_left", STAGE, ["vision.pad"],
        ("model.py", "[(0, 0), (0, more), (0, more), (0, 0)]", "[(0, 0), (more, 0), (more, 0), (0, 0)]"),
        known=["bridge.pad_top_left"],
    ),
    _plant(
        "resize_align_corners", STAGE, ["vision.resize{g}"],
        ("model.py", "(np.arange(side) + 0.5) * (old / side) - 0.5", "np.arange(side) * ((old - 1) / (side - 1))"),
        known=["bridge.resize_align_corners"], case="small/budget",
    ),
    _plant(
        "fold_dx_before_dy", STAGE, ["vision.space_to_depth{g}"],
        ("model.py", "transpose(0, 1, 3, 5, 2, 4)", "transpose(0, 1, 3, 5, 4, 2)"),
        known=["bridge.fold_dx_before_dy"],
    ),
    _plant(
        "projector_gelu_tanh", STAGE, ["vision.projector{g}", "audio.projector"],
        ("model.py", "[nn.Linear(inner, width), nn.GELU(), ", '[nn.Linear(inner, width), nn.GELU("tanh"), '),
        known=["bridge.projector_gelu_tanh"],
    ),
    _plant(
        "position_off_by_one", STAGE, EMBEDS,
        ("model.py", "max(length - 1, 1) * (self.span - 1)", "length * (self.span - 1)"),
        # In other words `position.length_off_by_one`; but that rounds elsewhere, and at p = 9999 the embedding of the time is
        # 34 budgets from its own. Of the sound the two cannot be told apart.
        known=["position.audio_time_in_visual_steps"],
    ),
    _plant(
        "height_and_width_exchanged", STAGE, EMBEDS[:2],
        ("model.py", "self.mm_rand_pos_h(x.shape[1]", "self.mm_rand_pos_w(x.shape[1]"),
        ("model.py", "self.mm_rand_pos_w(x.shape[2]", "self.mm_rand_pos_h(x.shape[2]"),
        known=["position.height_and_width_exchanged"],
    ),
    _plant(
        "audio_pool_backwards", STAGE, ["audio.pool"],
        ("model.py", "mx.conv1d(x, self.weight, ", "mx.conv1d(x, self.weight[:, ::-1], "),
        known=["audio.pool_backwards"],
    ),
    _plant(
        "silence_counts_as_signal", STAGE, ["vision.mask", "audio.mask"],
        ("model.py", "(mx.abs(packed).sum(axis=-1) != 0) & signal[:, None]", "mx.abs(packed).sum(axis=-1) != 0"),
        known=["masks.black_frames_count", "masks.silence_counts"], case="small/absent",
    ),
    _plant(
        "llm_norm_is_image_norm", STAGE, ["vision.llm_norm"],
        (
            "model.py",
            'kept(packed, videos))\n        return self.mm_rand_llm_norm(packed)',
            'kept(packed, videos))\n        return self.mm_rand_img_norm(packed)',
        ),
    ),
    _plant(
        "visual_factor_omitted", STAGE, ["layer.0.image_input"],
        ("model.py", "x * root, image * root,", "x * root, image,"),
        known=["text.visual_factor_omitted"],
    ),
    _plant(
        "rope_from_one", STAGE, ["rope.cos", "rope.sin"],
        ("model.py", "turned = mx.tile(positions[", "turned = mx.tile((positions + 1)["),
        known=["rotation.rope_from_one"],
    ),
    _plant(
        "window_one_short", STAGE, [SELF],
        ("decoder.py", "<= self.window", "< self.window"),
        known=["attention.window_one_short"],
    ),
    _plant(
        "heads_tiled_cross", STAGE, ["xattn.{i}.{m}.out", CROSS],
        (
            "decoder.py",
            "        return self.attend(q, k, v, keep[:, None])",
            "        k, v = (mx.tile(x, (1, 1, self.heads // self.kv_heads, 1)) for x in (k, v))\n"
            "        return self.attend(q, k, v, keep[:, None])",
        ),
        known=["attention.heads_tiled_cross"],
    ),
    _plant(
        "rope_on_stream_queries", STAGE, ["xattn.{i}.{m}.q", CROSS],
        ("decoder.py", "branch + attn.text_to_stream(q, k,", "branch + attn.text_to_stream(rotate(q, cos, sin), k,"),
        # Nobody has listed it: `rotation.rope_on_stream_queries` turns them behind the place where queries are recorded.
    ),
    _plant(
        "stream_keys_not_normed", STAGE, [*KEYS, CROSS, *STREAMS],
        ("decoder.py", "attn.keys_values(self.input_layernorm(stream))", "attn.keys_values(stream)"),
        known=["decoder.stream_keys_not_normed"],
    ),
    _plant(
        "streams_tiled", STAGE, STREAMS,
        (
            "decoder.py",
            "mx.repeat(v, self.heads // self.kv_heads, axis=2)",
            "mx.tile(v, (1, 1, self.heads // self.kv_heads, 1))",
        ),
        known=["attention.heads_tiled_stream"],
    ),
    _plant(
        "branches_normed_apart", STAGE, [OUTPUT],
        (
            "decoder.py",
            "branch = attn.text_to_text(q, n, cos, sin, keep_text)",
            "norm = self.post_attention_layernorm\n        branch = norm(attn.text_to_text(q, n, cos, sin, keep_text))",
        ),
        (
            "decoder.py",
            "branch + attn.text_to_stream(q, k, v, keep_text, keep)",
            "branch + norm(attn.text_to_stream(q, k, v, keep_text, keep))",
        ),
        ("decoder.py", "x + self.post_attention_layernorm(branch)", "x + branch"),
        known=["decoder.branches_normed_apart"],
    ),
    _plant(
        "mlp_gelu_erf", STAGE, [*STREAMS, OUTPUT],
        ("decoder.py", "nn.gelu_approx(self.gate_proj", "nn.gelu(self.gate_proj"),
        known=["decoder.mlp_gelu_erf"],
    ),
    _plant(
        "no_final_softcap", STAGE, ["logits"],
        (
            "model.py",
            "cap * mx.tanh(self.model.embed_tokens.as_linear(x) / cap)",
            "self.model.embed_tokens.as_linear(x)",
        ),
        known=["decoding.no_final_softcap"],
    ),
    # Right stages that are handed the wrong tensor: nobody has a name for these.
    _plant(
        "frames_turned_before_projector", WIRING, ["vision.projector{g}"],
        (
            "model.py",
            "projector(space_to_depth(grid, self.pool))",
            "projector(space_to_depth(grid, self.pool).swapaxes(1, 2))",
        ),
    ),
    _plant(
        "streams_not_carried", WIRING, [*STREAMS, *KEYS, CROSS],
        ("model.py", "x, image, audio = layer(x,", "x, *_ = layer(x,"),
    ),
    _plant(
        "norm_reads_one_layer_early", WIRING, ["final.norm"],
        ("model.py", "            x, image, audio = layer(", "            before = x\n            x, image, audio = layer("),
        ("model.py", "model.norm(x))", "model.norm(before))"),
    ),
    _plant(
        "head_reads_before_the_norm", WIRING, ["logits"],
        ("model.py", "return self.logits(model.norm(x))", "model.norm(x)\n        return self.logits(x)"),
    ),
    # A right model, looked at wrongly.
    _plant(
        "layout_forgotten", TRACING, ["vision.space_to_depth{g}"],
        ("adapter.py", ', layout="F h w C -> F C h w"', ""),
    ),
    _plant(
        "repeats_forgotten", TRACING, ["xattn.{i}.{m}.k"],
        ("adapter.py", 'arg=1, order="m", layout=REPEATED', 'arg=1, order="m"'),
    ),
    _plant(
        "tower_in_pieces", TRACING, ["vision.tower"],
        ("model.py", "self.mm_vis(mx.concatenate(videos))", "mx.concatenate([self.mm_vis(v) for v in videos])"),
    ),
)  # fmt: skip
BY_NAME = {fault.name: fault for fault in FLOAT32}
RECORDED = (
    # Of a projector's input this recording holds rows alone, so no run can be fed it.
    replace(BY_NAME["projector_gelu_tanh"], name="projector_between_samples", case="official/batch"),
    # Here queries have the size of the text that they are made of: being given both is no wrong wiring.
    replace(BY_NAME["window_one_short"], name="window_beside_queries", case="official/single"),
)
TOGETHER = tuple(
    together(BY_NAME[first], BY_NAME[second])
    for first, second in (
        ("fold_dx_before_dy", "no_final_softcap"),
        ("window_one_short", "mlp_gelu_erf"),
        ("frames_turned_before_projector", "heads_tiled_cross"),
        ("audio_pool_backwards", "repeats_forgotten"),
    )
)

# Among 8-bit weights, against the budgets that are declared for them: faults of the model, and of the quantisation.
QUANTISE = "    nn.quantize(model, "
QUANTISED = tuple(
    replace(fault, case="official/single")
    for fault in (
        *(
            BY_NAME[name]
            for name in (
                "fold_dx_before_dy", "height_and_width_exchanged", "visual_factor_omitted", "rope_from_one",
                "window_one_short", "heads_tiled_cross", "stream_keys_not_normed", "streams_tiled",
            )
        ),
        together(BY_NAME["window_one_short"], BY_NAME["fold_dx_before_dy"]),
        _plant(
            "four_bits_in_one_layer", STAGE, [SELF, CROSS, *STREAMS, OUTPUT],
            ("adapter8.py", QUANTISE, f"    nn.quantize(model.model.layers[2], group_size=64, bits=4)\n{QUANTISE}"),
        ),
        _plant(
            "position_mlps_too", STAGE, EMBEDS,
            ("adapter8.py", '"mm_vis", "mm_aud", "mm_rand_pos"', '"mm_vis", "mm_aud"'),
        ),
        _plant(
            "vision_tower_too", STAGE, ["vision.tower"],
            (
                "adapter8.py",
                QUANTISE,
                "    linear = lambda _, m: isinstance(m, nn.Linear)\n"
                f"    nn.quantize(model.model.mm_vis, 32, 8, class_predicate=linear)\n{QUANTISE}",
            ),
        ),
    )
)  # fmt: skip
