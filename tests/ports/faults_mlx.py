"""Faults planted in the MLX port, and what must be said of them."""

from __future__ import annotations

from dataclasses import replace

from tests.ports.planted import Edit, Planted, together

__all__ = ["BY_NAME", "FLOAT32", "QUANTISED", "TOGETHER"]

EMBEDDINGS = ("vision.pos_h.embed{g}", "vision.pos_w.embed{g}", "vision.pos_t.embed.{b}", "audio.pos_t.embed.{b}")
STREAMS = ("layer.{i}.image_stream", "layer.{i}.audio_stream")
# Goldens hold the inside of cross-attention for the first and the last layer alone: in the others it shows in what it gives.
CROSS = "layer.{i}.t2{m}"


def _in(file: str, old: str, new: str) -> tuple[Edit, ...]:
    return ((file, old, new),)


FLOAT32 = (
    Planted(
        "whisper_gelu_tanh", _in("towers.py", "self.fc2(nn.gelu(self.fc1(", "self.fc2(nn.gelu_approx(self.fc1("),
        {"audio.tower": "stage"}, frozenset({"towers.whisper_gelu_tanh"}),
    ),
    Planted(
        "hidden_state_minus_three", _in("towers.py", "in self.encoder.layers:", "in self.encoder.layers[:-1]:"),
        {"vision.tower": "stage"}, frozenset({"towers.hidden_state_minus_three"}),
    ),
    Planted(
        "fold_dx_before_dy", _in("model.py", "transpose(0, 1, 3, 5, 2, 4)", "transpose(0, 1, 3, 5, 4, 2)"),
        {"vision.space_to_depth{g}": "stage"}, frozenset({"bridge.fold_dx_before_dy"}),
    ),
    Planted(
        "pad_top_left", _in("model.py", "[(0, 0), (0, more), (0, more), (0, 0)]", "[(0, 0), (more, 0), (more, 0), (0, 0)]"),
        {"vision.pad": "stage"}, frozenset({"bridge.pad_top_left"}),
    ),
    Planted(
        "projector_gelu_tanh",
        _in("model.py", "[nn.Linear(inner, width), nn.GELU(), ", '[nn.Linear(inner, width), nn.GELU("tanh"), '),
        {"vision.projector{g}": "stage", "audio.projector": "stage"}, frozenset({"bridge.projector_gelu_tanh"}),
    ),
    Planted(
        "resize_align_corners",
        _in("model.py", "(np.arange(side) + 0.5) * (old / side) - 0.5", "np.arange(side) * ((old - 1) / (side - 1))"),
        {"vision.resize{g}": "stage"}, frozenset({"bridge.resize_align_corners"}), "small/budget",
    ),
    Planted(
        "position_off_by_one", _in("model.py", "max(length - 1, 1) * (self.span - 1)", "length * (self.span - 1)"),
        dict.fromkeys(EMBEDDINGS, "stage"), frozenset({"position.length_off_by_one"}),
    ),
    Planted(
        "height_and_width_exchanged",
        (("model.py", "self.mm_rand_pos_h(x.shape[1]", "self.mm_rand_pos_w(x.shape[1]"),
         ("model.py", "self.mm_rand_pos_w(x.shape[2]", "self.mm_rand_pos_h(x.shape[2]")),
        {"vision.pos_h.embed{g}": "stage", "vision.pos_w.embed{g}": "stage"}, frozenset({"position.height_and_width_exchanged"}),
    ),
    Planted(
        "audio_pool_backwards", _in("model.py", "mx.conv1d(x, self.weight, ", "mx.conv1d(x, self.weight[:, ::-1], "),
        {"audio.pool": "stage"}, frozenset({"audio.pool_backwards"}),
    ),
    Planted(
        "silence_counts_as_signal", _in("model.py", "(mx.abs(packed).sum(axis=-1) != 0) & signal[:, None]", "mx.abs(packed).sum(axis=-1) != 0"),
        {"vision.mask": "stage", "audio.mask": "stage"}, "", "small/absent",
    ),
    Planted(
        "llm_norm_is_image_norm",
        _in("model.py", "keep = tap(\"vision.mask\", kept(packed, videos))\n        return self.mm_rand_llm_norm(packed)",
            "keep = tap(\"vision.mask\", kept(packed, videos))\n        return self.mm_rand_img_norm(packed)"),
        {"vision.llm_norm": "stage"},
    ),
    Planted(
        "visual_factor_omitted", _in("model.py", "x * root, image * root,", "x * root, image,"),
        {"layer.0.image_input": "stage"}, frozenset({"text.visual_factor_omitted"}),
    ),
    Planted(
        "rope_from_one", _in("model.py", "turned = mx.tile(positions[", "turned = mx.tile((positions + 1)["),
        {"rope.cos": "stage", "rope.sin": "stage"}, frozenset({"rotation.rope_from_one"}),
    ),
    Planted(
        "window_one_short", _in("decoder.py", "<= self.window", "< self.window"),
        {"layer.{i}.t2t": "stage"}, frozenset({"attention.window_one_short"}),
    ),
    Planted(
        "heads_tiled_cross",
        _in("decoder.py", "return self.attend(q, k, v, keep[:, None])",
            "k, v = (mx.tile(x, (1, 1, self.heads // self.kv_heads, 1)) for x in (k, v))\n        return self.attend(q, k, v, keep[:, None])"),
        {"xattn.{i}.{m}.out": "stage", CROSS: "stage"}, frozenset({"attention.heads_tiled_cross"}),
    ),
    Planted(
        "rope_on_stream_queries",
        _in("decoder.py", "branch + attn.text_to_stream(q, k,", "branch + attn.text_to_stream(rotate(q, cos, sin), k,"),
        {"xattn.{i}.{m}.q": "stage", CROSS: "stage"}, frozenset({"rotation.rope_on_stream_queries"}),
    ),
    Planted(
        "stream_keys_not_normed", _in("decoder.py", "attn.keys_values(self.input_layernorm(stream))", "attn.keys_values(stream)"),
        dict.fromkeys(("xattn.{i}.{m}.k", "xattn.{i}.{m}.v", CROSS, *STREAMS), "stage"), frozenset({"decoder.stream_keys_not_normed"}),
    ),
    Planted(
        "branches_normed_apart",
        (("decoder.py", "branch = attn.text_to_text(q, n, cos, sin, keep_text)", "branch = self.post_attention_layernorm(attn.text_to_text(q, n, cos, sin, keep_text))"),
         ("decoder.py", "branch + attn.text_to_stream(q, k, v, keep_text, keep)", "branch + self.post_attention_layernorm(attn.text_to_stream(q, k, v, keep_text, keep))"),
         ("decoder.py", "x + self.post_attention_layernorm(branch)", "x + branch")),
        {"layer.{i}.output": "stage"}, frozenset({"decoder.branches_normed_apart"}),
    ),
    Planted(
        "mlp_gelu_erf", _in("decoder.py", "nn.gelu_approx(self.gate_proj", "nn.gelu(self.gate_proj"),
        dict.fromkeys((*STREAMS, "layer.{i}.output"), "stage"), frozenset({"decoder.mlp_gelu_erf"}),
    ),
    Planted(
        "streams_tiled", _in("decoder.py", "mx.repeat(v, self.heads // self.kv_heads, axis=2)", "mx.tile(v, (1, 1, self.heads // self.kv_heads, 1))"),
        dict.fromkeys(STREAMS, "stage"), frozenset({"attention.heads_tiled_stream"}),
    ),
    Planted(
        "no_final_softcap", _in("model.py", "return cap * mx.tanh(self.model.embed_tokens.as_linear(x) / cap)", "return self.model.embed_tokens.as_linear(x)"),
        {"logits": "stage"}, frozenset({"decoding.no_final_softcap"}),
    ),
    Planted(
        "frames_turned_before_projector", _in("model.py", "projector(space_to_depth(grid, self.pool))", "projector(space_to_depth(grid, self.pool).swapaxes(1, 2))"),
        {"vision.projector{g}": "wiring"},
    ),
    Planted(
        "streams_not_carried", _in("model.py", "x, image, audio = layer(x,", "x, *_ = layer(x,"),
        dict.fromkeys((*STREAMS, "xattn.{i}.{m}.k", "xattn.{i}.{m}.v", CROSS), "wiring"),
    ),
    Planted("head_reads_before_the_norm", _in("model.py", "return self.logits(model.norm(x))", "model.norm(x)\n        return self.logits(x)"),
        {"logits": "wiring"},
    ),
    Planted("norm_reads_one_layer_early",
        (("model.py", "            x, image, audio = layer(", "            before = x\n            x, image, audio = layer("), ("model.py", "model.norm(x))", "model.norm(before))")),
        {"final.norm": "wiring"},
    ),
    Planted("layout_forgotten", _in("adapter.py", ', layout="F h w C -> F C h w"', ""), {"vision.space_to_depth{g}": "tracing"}),
    Planted("repeats_forgotten", _in("adapter.py", 'arg=1, order="m", layout=REPEATED', 'arg=1, order="m"'), {"xattn.{i}.{m}.k": "tracing"}),
    Planted(
        "tower_in_pieces", _in("model.py", "self.mm_vis(mx.concatenate(videos))", "mx.concatenate([self.mm_vis(v) for v in videos])"),
        {"vision.tower": "tracing"},
    ),
)  # fmt: skip

BY_NAME = {fault.name: fault for fault in FLOAT32}
TOGETHER = (
    together(BY_NAME["fold_dx_before_dy"], BY_NAME["no_final_softcap"]),
    together(BY_NAME["window_one_short"], BY_NAME["mlp_gelu_erf"]),
    together(BY_NAME["frames_turned_before_projector"], BY_NAME["heads_tiled_cross"]),
    together(BY_NAME["audio_pool_backwards"], BY_NAME["repeats_forgotten"]),
)

# In the port with 8-bit weights, against the budgets that are declared for it.
QUANTISED = (
    *(
        replace(BY_NAME[name], case="official/single")
        for name in (
            "fold_dx_before_dy", "height_and_width_exchanged", "visual_factor_omitted", "rope_from_one", "window_one_short",
            "heads_tiled_cross", "stream_keys_not_normed", "streams_tiled",
        )
    ),
    Planted(
        "four_bits_in_one_layer",
        _in("adapter8.py", "    nn.quantize(model, ", "    nn.quantize(model.model.layers[2], group_size=64, bits=4)\n    nn.quantize(model, "),
        dict.fromkeys((CROSS, "layer.{i}.t2t", *STREAMS, "layer.{i}.output"), "stage"), case="official/single",
    ),
    Planted(
        "position_mlps_too", _in("adapter8.py", '"mm_vis", "mm_aud", "mm_rand_pos"', '"mm_vis", "mm_aud"'),
        dict.fromkeys(EMBEDDINGS, "stage"), case="official/single",
    ),
    Planted(
        "vision_tower_too",
        _in("adapter8.py", "    nn.quantize(model, ", "    nn.quantize(model.model.mm_vis, 32, 8, class_predicate=lambda _, m: isinstance(m, nn.Linear))\n    nn.quantize(model, "),
        {"vision.tower": "stage"}, case="official/single",
    ),
    replace(together(BY_NAME["window_one_short"], BY_NAME["fold_dx_before_dy"]), case="official/single"),
)  # fmt: skip
