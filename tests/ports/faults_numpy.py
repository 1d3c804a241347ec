"""Faults of the forward pass in NumPy (`goldens/oracle`, a copy of it), whose dump is judged without adapter or tracer.

A dump does not say what a step was given, so a caller's error is told as that of the step itself.
"""

from __future__ import annotations

from tests.ports.planted import Planted, together

__all__ = ["FAULTS", "MISSED"]

STAGE, TRACING = "stage", "tracing"
PROJECTORS = {"vision.projector{g}": STAGE, "audio.projector": STAGE}
OUT, CROSS, SELF, OUTPUT = "xattn.{i}.{m}.out", "layer.{i}.t2{m}", "layer.{i}.t2t", "layer.{i}.output"
ATTENTION = {OUT: STAGE, CROSS: STAGE, SELF: STAGE}
STREAMS = {"layer.{i}.image_stream": STAGE, "layer.{i}.audio_stream": STAGE}
KEYS = {"xattn.{i}.{m}.k": STAGE, "xattn.{i}.{m}.v": STAGE}
ADDED = {f"vision.pos_{axis}{{g}}": STAGE for axis in "hwt"} | {"audio.pos_t": STAGE}
EMBEDS = {
    "vision.pos_h.embed{g}": STAGE,
    "vision.pos_w.embed{g}": STAGE,
    "vision.pos_t.embed.{b}": STAGE,
    "audio.pos_t.embed.{b}": STAGE,
}
DUMP = ("oracle_dump.py", "stage: x.copy()")


def _oracle(file: str, name: str, old: str, new: str, guilty: dict[str, str], *known: str) -> Planted:
    return Planted(name, ((f"goldens/oracle/{file}.py", old, new),), guilty, frozenset(known))


def _dump(name: str, stage: str, written: str, convicted: str = "") -> Planted:
    new = f"stage: ({written} if stage == {stage!r} else x).copy()"
    return Planted(name, ((*DUMP, new),), {convicted or stage: TRACING})


PAD = _oracle(
    "nine",
    "pad_top_left",
    "np.pad(x_FCyx, ((0, 0), (0, 0), (0, short), (0, short)))",
    "np.pad(x_FCyx, ((0, 0), (0, 0), (short, 0), (short, 0)))",
    {"vision.pad": STAGE},
    "bridge.pad_top_left",
)
PIECES = _oracle(
    "bridge",
    "pieces_reversed",
    "trimmed.append(pieces_PLC.reshape(",
    "trimmed.append(pieces_PLC[::-1].reshape(",
    {"audio.trim": STAGE},
    "audio.pieces_reversed",
)
WINDOW = _oracle(
    "decoder",
    "window_one_short",
    "(behind <= (length if window is None else window))",
    "(behind < (length if window is None else window))",
    {SELF: STAGE},
    "attention.window_one_short",
)
LOGITS = _oracle(
    "nine",
    "attention_softcap_on_logits",
    "ar.work(sizes.final_softcap)",
    "ar.work(sizes.attn_softcap)",
    {"logits": STAGE},
    "decoding.attention_softcap_on_logits",
)
CHANNELS_LAST = _dump("channels_last", "vision.pad", "x.transpose(0, 2, 3, 1)")

FAULTS: tuple[Planted, ...] = (
    # ---- towers and bridge
    _oracle(
        "towers",
        "hidden_state_last",
        "range(sizes.vision_layers_run)",
        "range(sizes.vision_layers_run + 1)",
        {"vision.tower": STAGE},
        "towers.hidden_state_last",
    ),
    _oracle(
        "towers",
        "siglip_gelu_erf",
        "gelu_tanh(hidden)",
        "gelu_erf(hidden)",
        {"vision.tower": STAGE},
        "towers.siglip_gelu_erf",
    ),
    _oracle(
        "towers",
        "whisper_without_last_norm",
        'layer_norm(ar, x_PLC, w(root + "layer_norm.weight"), w(root + "layer_norm.bias"), eps)',
        "x_PLC",
        {"audio.tower": STAGE},
        "towers.whisper_without_last_norm",
    ),
    PAD,
    _oracle(
        "nine",
        "fold_dx_before_dy",
        "blocks.transpose(0, 1, 3, 5, 2, 4)",
        "blocks.transpose(0, 1, 5, 3, 2, 4)",
        {"vision.space_to_depth{g}": STAGE},
        "bridge.fold_dx_before_dy",
    ),
    _oracle(
        "bridge",
        "projector_gelu_tanh",
        "import gelu_erf",
        "import gelu_tanh as gelu_erf",
        PROJECTORS,
        "bridge.projector_gelu_tanh",
    ),
    _oracle(
        "positions",
        "rms_eps",
        "EPS = 1e-5",
        "EPS = 1e-6",
        {"vision.norm{g}": STAGE, "audio.norm": STAGE, **ADDED, "vision.llm_norm": STAGE, "audio.llm_norm": STAGE},
        "norms.rms_eps",
    ),
    _oracle(
        "positions",
        "length_off_by_one",
        "ar.wide(max(length - 1, 1))",
        "ar.wide(length)",
        EMBEDS,
        "position.length_off_by_one",
    ),
    _oracle(
        "positions",
        "cosine_first",
        "np.stack([np.sin(exact), np.cos(exact)], axis=-1)",
        "np.stack([np.cos(exact), np.sin(exact)], axis=-1)",
        EMBEDS,
        "position.cosine_first",
    ),
    _oracle(
        "bridge",
        "height_not_normed",
        "grid_FyxD + rms(ar, embeds[stage])",
        "grid_FyxD + embeds[stage]",
        {"vision.pos_h{g}": STAGE, "vision.pos_w{g}": STAGE},
    ),
    PIECES,
    _oracle(
        "bridge",
        "pool_backwards",
        "np.swapaxes(windows, 2, 3)",
        "np.swapaxes(windows[:, :, ::-1], 2, 3)",
        {"audio.pool": STAGE},
        "audio.pool_backwards",
    ),
    _oracle(
        "bridge",
        "llm_norm_one_percent",
        'w("model.mm_rand_llm_norm.weight"))',
        'w("model.mm_rand_llm_norm.weight") * np.float32(1.01))',
        {"vision.llm_norm": STAGE, "audio.llm_norm": STAGE},
        "norms.llm_norm_one_percent",
    ),
    # ---- text and decoder
    _oracle(
        "text",
        "padding_embedded",
        " * keep_BT[:, :, None].astype(ar.work)",
        "",
        {"text.embeds": STAGE},
        "text.padding_embedded",
    ),
    _oracle(
        "decoder",
        "factor_is_width",
        "np.array(sizes.embed_factor, np.float64)",
        "np.array(sizes.width, np.float64)",
        {"layer.0.input": STAGE, "layer.0.image_input": STAGE, "layer.0.audio_input": STAGE},
        "text.factor_is_width",
    ),
    _oracle(
        "nine",
        "norm_without_one",
        "(ar.wide(1) + ar.widen(weight))",
        "ar.widen(weight)",
        {
            "xattn.{i}.{m}.q": STAGE, **KEYS, SELF: STAGE, CROSS: STAGE, OUTPUT: STAGE, **STREAMS, "final.norm": STAGE,
        },
        "decoder.norm_weight_plain",
    ),
    WINDOW,
    _oracle(
        "decoder",
        "no_softcap",
        "softcap(scores_BNTL, sizes.attn_softcap)",
        "scores_BNTL",
        ATTENTION,
        "attention.no_softcap_self",
        "attention.no_softcap_cross",
    ),
    _oracle(
        "decoder",
        "heads_tiled",
        "np.repeat(x, sizes.num_heads // sizes.num_kv_heads, axis=1) for x in (k_BGLH, v_BGLH)",
        "np.tile(x, (1, sizes.num_heads // sizes.num_kv_heads, 1, 1)) for x in (k_BGLH, v_BGLH)",
        ATTENTION,
        "attention.heads_tiled_self",
        "attention.heads_tiled_cross",
    ),
    _oracle(
        "decoder",
        "rotated_backwards",
        "np.concatenate([-second, first], axis=-1)",
        "np.concatenate([second, -first], axis=-1)",
        {SELF: STAGE},
    ),
    _oracle(
        "decoder",
        "stream_not_normed",
        'n_BLD = layer.norm("input_layernorm", x_BLD)',
        "n_BLD = x_BLD",
        {**KEYS, CROSS: STAGE, **STREAMS},
        "decoder.stream_keys_not_normed",
    ),
    _oracle(
        "decoder",
        "gate_needs_every_token",
        "stream.keep_BL.any(axis=1)",
        "stream.keep_BL.all(axis=1)",
        {"layer.{i}.t2{m}.gate": STAGE},
    ),
    _oracle(
        "nine",
        "post_attn_norm_missing",
        'x + layer.norm("post_attention_layernorm", added)',
        "x + added",
        {OUTPUT: STAGE, **STREAMS},
        "decoder.post_attn_norm_missing",
    ),
    _oracle(
        "nine",
        "streams_subtracted",
        "layer.ar.store(added + output)",
        "layer.ar.store(added - output)",
        {OUTPUT: STAGE},
    ),
    LOGITS,
    # ---- how it is dumped
    CHANNELS_LAST,
    _dump("keys_not_repeated", "xattn.0.v.k", "x[:, ::2]", "xattn.{i}.{m}.k"),
    _dump("rows_of_the_padding", "audio.trim", "np.pad(x, ((0, 0), (0, 3), (0, 0)))"),
    # ---- two at once
    together(PAD, PIECES),
    together(PIECES, LOGITS),
    together(CHANNELS_LAST, WINDOW),
)  # fmt: skip

#: i / L, divided at once, is not what our list has, (i / (L - 1)) · (L - 1) / L: at the end of time an ulp of a position is
#: 6e-4 rad.
MISSED = frozenset({"length_off_by_one"})
