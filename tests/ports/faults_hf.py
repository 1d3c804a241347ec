"""Faults of the port made of transformers (`hf_port/`): what a porter gets wrong, line by line."""

from __future__ import annotations

from tests.ports.planted import Planted, together

__all__ = ["FAULTS"]

STAGE, WIRING, TRACING = "stage", "wiring", "tracing"
GATE, OUT, CROSS, SELF = "layer.{i}.t2{m}.gate", "xattn.{i}.{m}.out", "layer.{i}.t2{m}", "layer.{i}.t2t"
STREAMS = {"layer.{i}.image_stream": STAGE, "layer.{i}.audio_stream": STAGE}
KEYS = {"xattn.{i}.{m}.k": STAGE, "xattn.{i}.{m}.v": STAGE}
READS = {"xattn.{i}.{m}.out": STAGE, "layer.{i}.t2{m}": STAGE}
NORMED = {"xattn.{i}.{m}.q": STAGE, **KEYS, SELF: STAGE, CROSS: STAGE, "layer.{i}.output": STAGE, **STREAMS}
ADDED = {f"vision.pos_{axis}{{g}}": STAGE for axis in "hwt"} | {"audio.pos_t": STAGE}
EMBEDS = {
    "vision.pos_h.embed{g}": STAGE,
    "vision.pos_w.embed{g}": STAGE,
    "vision.pos_t.embed.{b}": STAGE,
    "audio.pos_t.embed.{b}": STAGE,
}


def _model(name: str, old: str, new: str, guilty: dict[str, str], *known: str, case: str = "small/base") -> Planted:
    return Planted(name, (("model.py", old, new),), guilty, frozenset(known), case)


def _adapter(name: str, old: str, new: str, *stages: str, case: str = "small/base") -> Planted:
    return Planted(name, (("adapter.py", old, new),), dict.fromkeys(stages, TRACING), case=case)


FOLD = _model(
    "fold_channels_last",
    'functional.pixel_unshuffle(grid, self.config["mm_image_pool_size"])',
    "functional.pixel_unshuffle(grid, 2).unflatten(1, (-1, 4)).transpose(1, 2).flatten(1, 2)",
    {"vision.space_to_depth{g}": STAGE},
    "bridge.fold_channels_last",
)
NO_SOFTCAP = _model(
    "no_softcap_cross",
    "softcap=self.attn_logit_softcapping",
    "softcap=None",
    READS,
    "attention.no_softcap_cross",
)
WINDOW = _model(
    "window_of_transformers",
    'fields["sliding_window"] += 1',
    "pass",
    {SELF: STAGE},
    "attention.window_one_short",
)
POOL = _model(
    "audio_trimmed_at_the_front",
    "row[: length // pool]",
    "row[len(row) - length // pool :]",
    {"audio.projector": STAGE},
    "audio.tokens_from_the_end",
)
LOGITS = _model(
    "no_final_softcap",
    "torch.tanh(x @ self.model.embed_tokens.weight.T / cap) * cap",
    "x @ self.model.embed_tokens.weight.T",
    {"logits": STAGE},
    "decoding.no_final_softcap",
)
HEADS = _adapter(
    "heads_not_repeated",
    'arg=1, order="m", layout=HEADS',
    'arg=1, order="m"',
    "xattn.{i}.{m}.k",
)

FAULTS: tuple[Planted, ...] = (
    # ---- towers and bridge
    _model(
        "hidden_state_last",
        'hidden_states[self.config["mm_vision_select_layer"]]',
        "hidden_states[-1]",
        {"vision.tower": STAGE},
        "towers.hidden_state_last",
    ),
    _model(
        "pad_top_left",
        "(0, odd, 0, odd)",
        "(odd, 0, odd, 0)",
        {"vision.pad": STAGE},
        "bridge.pad_top_left",
    ),
    FOLD,
    _model(
        "projector_gelu_tanh",
        "nn.Sequential(nn.Linear(width_in, width), nn.GELU(),",
        'nn.Sequential(nn.Linear(width_in, width), nn.GELU("tanh"),',
        {"vision.projector{g}": STAGE, "audio.projector": STAGE},
        "bridge.projector_gelu_tanh",
    ),
    _model(
        "rms_eps",
        "+ 1e-5)",
        "+ 1e-6)",
        {
            "vision.norm{g}": STAGE, "audio.norm": STAGE, **ADDED, "vision.llm_norm": STAGE, "audio.llm_norm": STAGE,
        },
        "norms.rms_eps",
    ),
    _model(
        "positions_end_at_the_extent",
        "(extent - 1)",
        "extent",
        EMBEDS,
        "position.extent_off_by_one",
    ),
    _model(
        "sines_then_cosines",
        "torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)",
        "torch.cat((angle.sin(), angle.cos()), dim=-1)",
        EMBEDS,
        "position.halves_not_interleaved",
    ),
    _model(
        "embeddings_of_height_and_width_exchanged",
        "self.add(self.add(x, height), width)",
        "self.add(self.add(x, width.transpose(1, 2)), height.transpose(1, 2))",
        {"vision.pos_h{g}": WIRING, "vision.pos_w{g}": WIRING},
        "position.height_and_width_given_to_each_other",
    ),
    _model(
        "width_before_height",
        "self.add(self.add(x, height), width)",
        "self.add(self.add(x, width), height)",
        {"vision.pos_h{g}": STAGE, "vision.pos_w{g}": WIRING, "vision.pos_t{g}": WIRING},
        case="official/single",
    ),
    _model(
        "audio_norm_of_the_frames",
        "self.mm_rand_aud_norm(self.mm_rand_aud_projector(x))",
        "self.mm_rand_img_norm(self.mm_rand_aud_projector(x))",
        {"audio.pos_t": STAGE},
        "norms.audio_norm_is_image_norm",
    ),
    _model(
        "llm_norm_one_percent",
        "self.mm_rand_llm_norm(x) * keep",
        "1.01 * self.mm_rand_llm_norm(x) * keep",
        {"vision.llm_norm": STAGE, "audio.llm_norm": STAGE},
        "norms.llm_norm_one_percent",
    ),
    POOL,
    # ---- decoder
    _model(
        "no_factor",
        'x = x * torch.tensor(self.decoder.hidden_size**0.5, dtype=x.dtype)',
        "x = x * 1.0",
        {"layer.0.input": STAGE, "layer.0.image_input": STAGE, "layer.0.audio_input": STAGE},
        "text.factor_omitted",
    ),
    _model(
        "norm_without_one",
        "PLACEHOLDER = -200",
        "PLACEHOLDER = -200\ngemma2.Gemma2RMSNorm.forward = lambda self, x: self._norm(x.float()) * self.weight",
        {**NORMED, "final.norm": STAGE},
        "decoder.norm_weight_plain",
    ),
    _model(
        "norm_eps",
        'fields["sliding_window"] += 1',
        'fields["sliding_window"] += 1; fields["rms_norm_eps"] = 1e-5',
        {**NORMED, "final.norm": STAGE},
        "decoder.norm_eps",
    ),
    _model(
        "theta",
        'fields["sliding_window"] += 1',
        'fields["sliding_window"] += 1; fields["rope_theta"] = 1e6',
        {"rope.cos": STAGE, "rope.sin": STAGE},
        "rotation.rope_theta",
    ),
    WINDOW,
    _model(
        "text_not_normed",
        "n = self.input_layernorm(x)",
        "n = x",
        {"xattn.{i}.{m}.q": STAGE, SELF: STAGE, CROSS: STAGE},
    ),
    NO_SOFTCAP,
    _model(
        "scale_one_percent",
        "scaling=self.scaling",
        "scaling=self.scaling * 1.01",
        READS,
        "attention.scale_one_percent",
    ),
    _model(
        "key_mask_ignored",
        ".masked_fill(~keep_s, torch.finfo(q.dtype).min)",
        "",
        READS,
        "masks.stream_mask_ignored",
    ),
    _model(
        "heads_tiled_in_streams",
        "gemma2.repeat_kv(self.heads(self.v_proj, s), self.num_key_value_groups)",
        "self.heads(self.v_proj, s).repeat(1, self.num_key_value_groups, 1, 1)",
        STREAMS,
        "attention.heads_tiled_stream",
    ),
    _model(
        "gate_needs_every_token",
        'gate", keep_s.any(1))',
        'gate", keep_s.all(1))',
        {GATE: STAGE},
    ),
    _model(
        "stream_read_after_its_update",
        '            attended = attended + self.read("a", n, audio, keep, keep_audio)\n'
        '            audio = tap(f"layer.{self.index}.audio_stream", self.carry(audio))\n',
        '            audio = tap(f"layer.{self.index}.audio_stream", self.carry(audio))\n'
        '            attended = attended + self.read("a", n, audio, keep, keep_audio)\n',
        {**KEYS, CROSS: STAGE},
    ),
    _model(
        "gelu_erf_in_the_decoder",
        'fields["sliding_window"] += 1',
        'fields["sliding_window"] += 1; fields["hidden_activation"] = "gelu"',
        {"layer.{i}.output": STAGE, **STREAMS},
        "decoder.mlp_gelu_erf",
    ),
    Planted(
        "last_layer_lost",
        (
            ("model.py", 'x = tap(f"layer.{i}.input", x)', 'x = before = tap(f"layer.{i}.input", x)'),
            ("model.py", "return self.norm(x)", "return self.norm(before)"),
        ),
        {"final.norm": WIRING},
    ),
    LOGITS,
    _model("half_a_degree_too_warm", "softcap=self.attn_logit_softcapping", "softcap=47.0", READS),
    # ---- how it is traced
    HEADS,
    _adapter("queries_with_tokens_first", 'arg=0, order="m"', 'arg=0, order="m", layout="B N T H -> B T N H"', "xattn.{i}.{m}.q"),
    _adapter("first_piece_alone", 'call("model.see", join=0)', '"model.see"', "vision.tower", case="official/single"),
    _model(
        "pieces_padded",
        "self.see(piece)",
        "self.see(functional.pad(piece, (0, 0, 0, 0, 0, 0, 0, FRAMES_AT_ONCE - len(piece))))[: len(piece)]",
        {"vision.tower": TRACING},
    ),
    # ---- two at once
    together(FOLD, NO_SOFTCAP),
    together(WINDOW, LOGITS),
    together(POOL, HEADS),
)  # fmt: skip
