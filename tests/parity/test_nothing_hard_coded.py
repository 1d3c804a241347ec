"""Is every number of the configuration read from it, by the plain and by the fast path, cached and uncached?

The case small/odd has another number for each. Written into the code, the release's would give another tensor there.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.runs import GOLDENS
from vidi import generate
from vidi.attention import dispatch, eager, rope
from vidi.attention.call import AttentionCall
from vidi.cli import main
from vidi.config import DecoderConfig, VidiConfig
from vidi.decoder import decoder
from vidi.fast import twins
from vidi.fast.operands import Residual

FULL = VidiConfig.full()
ODD = VidiConfig.from_official(json.loads((GOLDENS / "small" / "odd.json").read_text())["config"])
SMALL = [
    VidiConfig.from_official(json.loads(path.read_text())["config"])
    for path in sorted((GOLDENS / "small").glob("*.json"))
    if path.stem not in ("odd", "oddone")
]
#: Fields that have one value everywhere, and why.
ONE_VALUE = {
    "vision.num_channels": "pictures are RGB (§2)",
    "image_pool_size": "only 2 is specified (§3.3)",
    "decoder.windowed_every": "of the kind of decoder: no field of a config.json says it",
    "positions_rounded": "of the kind of decoder: no field of a config.json says it",
}


def numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float | None]]:
    """(dotted name, value) of every numeric field."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif not isinstance(value, str):
            yield prefix + field.name, value


def derived(config: VidiConfig) -> dict[str, float]:
    """Numbers that code could take for a constant although they follow from fields."""
    d, v, a = config.decoder, config.vision, config.audio
    return {
        "query heads per kv head": d.num_heads // d.num_kv_heads,
        "scale": d.scale,
        "scale over the usual one": round(d.scale * d.head_dim**0.5, 9) if d.scale != d.head_dim**-0.5 else 1,
        "query width over width": d.num_heads * d.head_dim / d.hidden_size,
        "mlp over width": d.intermediate_size / d.hidden_size,
        "vision head": v.hidden_size // v.num_heads,
        "audio head": a.hidden_size // a.num_heads,
        "patches a side": v.patches_per_side,
        "mel frames": a.mel_frames,
        "last layer has a window": d.num_layers % 2,
    }


# ---- the cases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, _ in numbers(ODD)])
def test_a_number_of_the_odd_case_is_no_other_cases(name: str) -> None:
    others = {dict(numbers(config))[name] for config in (FULL, *SMALL)}
    if name in ONE_VALUE:
        assert others == {dict(numbers(ODD))[name]}, f"{name} varies: it needs no exception"
    else:
        assert dict(numbers(ODD))[name] not in others, f"{name} has a value that another case, or the release, has"


def test_the_odd_cases_choice_of_scope_is_another_too() -> None:
    assert ODD.budget_scope != FULL.budget_scope


@pytest.mark.parametrize("name", derived(ODD))
def test_what_follows_from_the_numbers_differs_from_the_release(name: str) -> None:
    assert derived(ODD)[name] != derived(FULL)[name] or name == "last layer has a window"
    both = [config for config in (ODD, *SMALL) if derived(config)["last layer has a window"]]
    assert both, "one case's last layer has a window, one's has none"
    assert ODD.vision.image_size % ODD.vision.patch_size, "pixels are left over, as in the release"


def test_a_number_that_all_cases_share_would_be_named() -> None:
    same = dataclasses.replace(ODD, decoder=dataclasses.replace(ODD.decoder, rope_theta=FULL.decoder.rope_theta))
    others = {dict(numbers(config))["decoder.rope_theta"] for config in (FULL, *SMALL)}
    assert dict(numbers(same))["decoder.rope_theta"] in others


# ---- the runs -----------------------------------------------------------------------------------------------------------


def parity(case: str, path: str, dtype: str, tmp_path: Path) -> list[str]:
    """Stages of a case that differ, by the command a user has: among them cached and uncached decoding. Path "chained": the
    plain one without stages fed alone, for a model of shapes that the case's goldens do not fit."""
    told = tmp_path / "told.json"
    how = ["--chained"] if path == "chained" else ["--path", path]
    code = main(["parity", "--case", f"small/{case}", "--dtype", dtype, *how, "--json", str(told), "--quiet"])
    assert code in (0, 1), "what crashes is not judged"
    (found,) = json.loads(told.read_text())["cases"]
    assert not found["not_run"]
    rows = {row["stage"]: row["ok"] for row in found["stages"]}
    assert len(rows) > 90
    assert {f"{case}.cached.logits", f"{case}.nocache.logits", f"{case}.tokens", f"{case}.lengths"} <= rows.keys()
    red = [stage for stage, ok in rows.items() if not ok]
    assert code == bool(red)
    return red


FIRST = {("odd", "float64"), ("oddone", "bfloat16")}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=() if (case, dtype) in FIRST else pytest.mark.slow)
        for case in ("odd", "oddone")
        for dtype in ("float64", "float32", "bfloat16", "float16")
    ],
)
def test_the_fast_path(case: str, dtype: str, tmp_path: Path) -> None:
    """The plain one: test_stages, all dtypes. One sample decodes by the fused step, two by rows."""
    assert parity(case, "fast", dtype, tmp_path) == []


# ---- numbers written into the code -----------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def _field(part: str | None, **values: float) -> Plant:
    """The configuration that is read says the release's."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        read = VidiConfig.from_official.__func__  # type: ignore[attr-defined]

        def wrong(cls: type[VidiConfig], raw: Mapping[str, Any], **towers: Any) -> VidiConfig:
            found = read(cls, raw, **towers)
            if part is None:
                return dataclasses.replace(found, **values)
            return dataclasses.replace(found, **{part: dataclasses.replace(getattr(found, part), **values)})

        patch.setattr(VidiConfig, "from_official", classmethod(wrong))

    return plant


def _argument(owner: Any, name: str, at: int, value: Any) -> Plant:
    """A function is always given one value at a place."""
    return _operand(owner, name, at, lambda _: value)


def _operand(
    owner: Any, name: str, at: int, wrong: Callable[[Any], Any], when: Callable[[Any], bool] = lambda first: True
) -> Plant:
    """A function is given what ``wrong`` makes of the operand at a place, where its first one says so."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def planted(*given: Any) -> Any:
            return original(*given[:at], wrong(given[at]), *given[at + 1 :]) if when(given[0]) else original(*given)

        patch.setattr(owner, name, planted)

    return plant


def _with(**values: Any) -> Callable[[Any], Any]:
    return lambda operand: None if operand is None else dataclasses.replace(operand, **values)


def _eps(residual: Residual) -> Residual:
    """Both of its norms have the release's."""
    return dataclasses.replace(
        residual, post=_with(eps=1e-6)(residual.post), following=_with(eps=1e-6)(residual.following)
    )


def _only_one_row(**values: Any) -> Plant:
    """Scores of the fast path's attention of a single new row."""
    return _operand(twins, "attend", 2, _with(**values), lambda queries: len(queries.q_TX) == 1)


def _one_row_cross_in_bfloat16(call: AttentionCall) -> bool:
    decoding, cross = call.q_BTNH.shape[1] == 1, call.q_pos_BT is None
    return decoding and cross and call.softcap is not None and call.q_BTNH.dtype == torch.bfloat16


def _stop_of_the_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(generate, "greedy", _stopping_at_107(generate.greedy))


def _stopping_at_107(greedy: Any) -> Any:
    def wrong(model: Any, *given: Any, **options: Any) -> Any:
        plain = getattr(model, "plain", model)
        held = model.config
        model.config = plain.config = dataclasses.replace(held, end_of_turn_id=107)
        try:
            return greedy(model, *given, **options)
        finally:
            model.config = plain.config = held

    return wrong


# What is wrong: (dtype, path, stage that must differ, how). Plain unless only the fast path has the code.
HARD_CODED: Mapping[str, tuple[str, str, str, Plant]] = {
    "vision eps": ("float64", "plain", "vision.tower", _field("vision", layer_norm_eps=1e-6)),
    "audio eps": ("float64", "plain", "audio.tower", _field("audio", layer_norm_eps=1e-5)),
    "vision heads": ("float64", "plain", "vision.tower", _field("vision", num_heads=2)),
    "audio heads": ("float64", "plain", "audio.tower", _field("audio", num_heads=2)),
    "time interval": ("float64", "plain", "vision.pos_t.0", _field(None, time_interval=10000)),
    "token budget": ("float64", "chained", "vision.resize.0", _field(None, visual_token_budget=60000)),
    "decoder eps": ("float64", "plain", "layer.0.t2t", _field("decoder", rms_norm_eps=1e-6)),
    "theta": ("float64", "plain", "rope.cos", _field("decoder", rope_theta=10000.0)),
    "window": ("float64", "plain", "layer.0.t2t", _field("decoder", sliding_window=4096)),
    "scale": ("float64", "plain", "layer.0.t2t", _field("decoder", query_pre_attn_scalar=256)),
    "scale of head_dim": ("float64", "plain", "layer.0.t2t", _field("decoder", query_pre_attn_scalar=8)),
    "attention softcap": ("float64", "plain", "layer.0.t2t", _field("decoder", attn_softcap=50.0)),
    "final softcap": ("float64", "plain", "logits", _field("decoder", final_softcap=30.0)),
    "stop": ("float64", "plain", "odd.tokens", _stop_of_the_release),
    "heads and kv heads": ("float64", "chained", "layer.0.t2t", _field("decoder", num_heads=18, num_kv_heads=6, head_dim=4)),
    "softcap of the head's function": ("float64", "plain", "logits", _argument(decoder, "softcap", 1, 30.0)),
    "theta in the angles": ("bfloat16", "plain", "rope.cos", _argument(rope, "angles", 2, 10000.0)),
    "cap in eager attention": ("bfloat16", "plain", "layer.0.t2v", _argument(eager, "softcapped", 1, 50.0)),
    "no cap in a step's cross-attention, bfloat16": (
        "bfloat16", "plain", "odd.cached.logits",
        _operand(dispatch, "attend", 0, _with(softcap=None), _one_row_cross_in_bfloat16),
    ),
    "window by layer": (
        "float64", "plain", "layer.2.t2t",
        lambda patch: patch.setattr(DecoderConfig, "window", lambda self, i: self.sliding_window if i == 0 else None),
    ),
    "fast theta": ("float64", "fast", "rope.cos", _argument(rope, "angles", 2, 10000.0)),
    "fast eps in norms": ("float64", "fast", "layer.0.image_stream", _operand(twins, "add_norm", 0, _eps)),
    "fast cap": ("bfloat16", "fast", "layer.0.t2t", _operand(twins, "attend", 2, _with(cap=50.0))),
    "fast scale": ("float64", "fast", "layer.0.t2t", _operand(twins, "attend", 2, _with(scale=1 / 16))),
    "fast window": ("float64", "fast", "layer.0.t2t", _operand(twins, "attend", 2, _with(window=4096))),
    "fast tower eps": ("float64", "fast", "vision.tower", _operand(twins, "layer_norm", 2, _with(eps=1e-6))),
    "fast step: final softcap": ("float64", "step", "oddone.cached.logits", _operand(twins, "head_step", 2, _with(cap=30.0))),
    "fast step: eps": ("float64", "step", "oddone.cached.logits", _operand(twins, "qkv_step", 0, _eps)),
    "fast step: eps of the feed-forward": ("float64", "step", "oddone.cached.logits", _operand(twins, "gate_up_step", 0, _eps)),
    "fast step: eps of the last norm": ("float64", "step", "oddone.cached.logits", _operand(twins, "head_step", 0, _eps)),
    "fast step: cap": ("float64", "step", "oddone.cached.logits", _only_one_row(cap=50.0)),
    "fast step: scale": ("float64", "step", "oddone.cached.logits", _only_one_row(scale=1 / 16)),
    "fast step: window": ("float64", "step", "oddone.cached.logits", _only_one_row(window=4096)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("what", HARD_CODED)
def test_a_number_written_into_the_code_is_seen(what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dtype, path, stage, plant = HARD_CODED[what]
    plant(monkeypatch)
    case, path = ("oddone", "fast") if path == "step" else ("odd", path)
    red = parity(case, path, dtype, tmp_path)
    assert stage in red
    if path == "fast" and case == "oddone":  # the prompt's pass is another code
        assert "logits" not in red
