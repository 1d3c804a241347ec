"""The decoder layers (spec §7), cross-attention taken apart (§9)."""

from __future__ import annotations

from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.decoder.attention import repeat_heads
from vidi.parity import trace
from vidi.parity.bench import Site, Stage
from vidi.parity.registry import code

__all__ = ["STAGES"]

CROSS = ("vidi.attention.eager.[cross]", "vidi.attention.dispatch.[cross]", "vidi.attention.mask.zero_rows")
SELF = ("vidi.attention.eager.[self]", "vidi.attention.dispatch.[self]", "vidi.attention.mask.zero_rows")
NORM = (code.DECODER + "norm.", code.LAYER_PART + "input_norm", code.LAYER_PART + "attention")
QUERIES = (code.ATTENTION + "queries", *NORM)
KEYS_VALUES = (code.ATTENTION + "keys_values", *NORM)
STREAM_KEYS = (code.LAYER + "stream_keys_values", *KEYS_VALUES)
TO_STREAM = code.LAYER + "text_to_stream"
FEED = (
    code.LAYER + "feed_forward",
    code.DECODER + "mlp.",
    code.DECODER + "norm.",
    *(code.LAYER_PART + x for x in ("mlp", "post_attn_norm", "pre_ffn_norm", "post_ffn_norm")),
)
STREAM = (
    code.LAYER + "update_stream",
    code.ATTENTION + "attend_own_token",
    code.ATTENTION + "output",
    code.DECODER + "attention.repeat_heads",
    code.DECODER + "decoder.update_in_chunks",
    *STREAM_KEYS,
    *FEED,
)


def _xattn_out(s: Site) -> Tensor:
    group = s.model.config.decoder.num_heads // s.model.config.decoder.num_kv_heads
    q, k, v = (s[f"xattn.{{i}}.{{m}}.{part}"].transpose(1, 2) for part in "qkv")
    return s.layer.attention.attend_stream(
        q,
        k[:, :, ::group],
        v[:, :, ::group],
        keep_q=Rows(s["text.mask"]),
        keep_k=Rows(s["{path}.mask"]),
        backend=s.model.backend,
    )


def _xattn_key(s: Site, part: int) -> Tensor:
    value = s.layer.stream_keys_values(s["{stream}"])[part]
    return repeat_heads(value, s.model.config.decoder.num_heads).transpose(1, 2)


def _unpad(s: Site) -> Tensor:
    prefix = s.id("xattn.{i}.{m}")
    q, k, v = (s[f"xattn.{{i}}.{{m}}.{part}"].transpose(1, 2) for part in "qkv")
    flat = dict(trace.unpadded(prefix, q, k, v, Rows(s["text.mask"]), Rows(s["{path}.mask"])))
    return flat[prefix + s.stage.template.removeprefix("xattn.{i}.{m}")]


def _output(s: Site) -> Tensor:
    branches = [s["layer.{i}.t2t"]]
    branches += [s.bench.golden(x) for m in "va" if s.bench.holds(x := s.id(f"layer.{{i}}.t2{m}"))]
    return s.layer.merge(s["layer.{i}.input"], branches)


def _stream(s: Site) -> Tensor:
    x = s["{stream}"]
    return s.layer.update_stream(x, s.layer.stream_keys_values(x)[1])


STAGES: tuple[Stage, ...] = (
    Stage(
        "layer.{i}.t2t",
        ("layer.{i}.input", "rope.cos", "rope.sin", "text.mask"),
        lambda s: s.layer.text_to_text(s.layer.input_norm(s["layer.{i}.input"]), s.text),
        (
            code.LAYER + "text_to_text[whole]",
            code.ATTENTION + "attend_self",
            code.ATTENTION + "keys_values",
            code.ATTENTION + "output",
            "vidi.attention.mask.sees[whole]",
            "vidi.attention.rope.apply",
            code.LAYER_PART + "window",
            *SELF,
            *QUERIES,
        ),
        "§7",
        "causal self-attention, window on even layers",
    ),
    Stage(
        "xattn.{i}.{m}.q",
        ("layer.{i}.input",),
        lambda s: s.layer.attention.queries(s.layer.input_norm(s["layer.{i}.input"])).transpose(1, 2),
        (TO_STREAM + "[queries]", *QUERIES),
        "§7",
        "queries, not rotated",
    ),
    Stage(
        "xattn.{i}.{m}.k",
        ("{stream}",),
        lambda s: _xattn_key(s, 0),
        (code.LAYER + "stream_keys_values[keys]", *KEYS_VALUES),
        "§7",
        "stream keys, not rotated; recorded with heads repeated",
    ),
    Stage(
        "xattn.{i}.{m}.v",
        ("{stream}",),
        lambda s: _xattn_key(s, 1),
        (code.LAYER + "stream_keys_values[values]", *KEYS_VALUES),
        "§7",
        "stream values; recorded with heads repeated",
    ),
    # Recorded beside the attention, told from the masks after the run: a wrong mask in attention shows in `out`.
    Stage("xattn.{i}.{m}.q_mask", ("text.mask",), lambda s: s["text.mask"], (), "§9", "the text mask"),
    Stage("xattn.{i}.{m}.kv_mask", ("{path}.mask",), lambda s: s["{path}.mask"], (), "§9", "the stream's mask"),
    *(
        Stage(
            f"xattn.{{i}}.{{m}}.unpad.{name}",
            ("xattn.{i}.{m}.q", "xattn.{i}.{m}.k", "xattn.{i}.{m}.v", "text.mask", "{path}.mask"),
            _unpad,
            (f"vidi.attention.unpad._unpad_xattn_input[{name}]", *(f"vidi.attention.unpad.{site}" for site in sites)),
            "§9",
            what,
        )
        for name, sites, what in (
            ("indices_q", ("Rows.indices",), "flat places of the kept queries"),
            ("cu_seqlens_q", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative query lengths"),
            ("cu_seqlens_k", ("Rows.cu_seqlens", "Rows.lengths_B"), "cumulative key lengths"),
            ("max_seqlen", ("Rows.max_seqlen", "Rows.lengths_B"), "longest query and key length"),
            ("q", ("Rows.indices", "unpad"), "kept queries on one axis"),
            ("k", ("Rows.indices", "unpad"), "kept keys on one axis"),
            ("v", ("Rows.indices", "unpad"), "kept values on one axis"),
        )
    ),
    Stage(
        "xattn.{i}.{m}.out",
        ("xattn.{i}.{m}.q", "xattn.{i}.{m}.k", "xattn.{i}.{m}.v", "text.mask", "{path}.mask"),
        _xattn_out,
        (
            code.ATTENTION + "attend_stream",
            TO_STREAM + "[text mask]",
            TO_STREAM + "[stream mask]",
            "vidi.attention.unpad.",
            *CROSS,
        ),
        "§7",
        "cross-attention, before the output projection",
    ),
    Stage(
        "layer.{i}.t2{m}",
        ("layer.{i}.input", "rope.cos", "rope.sin", "text.mask", "{stream}", "{path}.mask"),
        lambda s: s.layer.text_to_stream(s.layer.input_norm(s["layer.{i}.input"]), s.text, s.keys, s.places["m"]),
        (
            TO_STREAM,
            code.ATTENTION + "attend_stream",
            code.ATTENTION + "output",
            "vidi.attention.unpad.",
            *CROSS,
            *QUERIES,
            *STREAM_KEYS,
        ),
        "§7",
        "text to one stream",
    ),
    Stage(
        "layer.{i}.t2{m}.gate",
        ("{path}.mask",),
        lambda s: s["{path}.mask"].any(-1),
        (),
        "§7",
        "does the sample keep a token",
    ),
    Stage(
        "layer.{i}.image_stream",
        ("{stream}",),
        _stream,
        STREAM,
        "§7",
        "visual stream after the layer",
    ),
    Stage(
        "layer.{i}.audio_stream",
        ("{stream}",),
        _stream,
        STREAM,
        "§7",
        "audio stream after the layer",
    ),
    Stage(
        "layer.{i}.output",
        ("layer.{i}.input", "layer.{i}.t2t", "layer.{i}.t2v", "layer.{i}.t2a"),
        _output,
        (code.LAYER + "merge", *FEED),
        "§7",
        "text after the layer",
    ),
)
