"""The stored sketches recognise every known fault in our own model, planted again under other arithmetic, and nothing else."""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from stageparity.faults.judge import Bench
from stageparity.faults.plant import Fault, planted
from stageparity.faults.tensors import tensors
from stageparity.fingerprint import ieee
from stageparity.port import sketches as store
from stageparity.port.explain import Explanation, Match, explain, explain_case
from stageparity.port.sketches import Sketches
from stageparity.run import Trace
from tests.harness.new_bugs import NEW, NEW_7B
from tools.studies import runs
from tools.studies.sketches import PLAIN
from vidi.cli import main
from vidi.parity import faults, mixed
from vidi.parity.goldens import goldens_dir

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("explain")]

GOLDENS = goldens_dir()
KNOWN = {name: fault for name, fault in (faults.FAULTS | faults.FAULTS_7B).items() if not fault.needs}
#: other libraries and other orders of summation than the sketches were made with
OTHER = runs.Setting("float32", (), mkldnn=False, key_chunk=3)

SEEN_IN_HALF: tuple[str, ...] = (
    "dtypes.position_mlp_in_half",
    "dtypes.positions_in_half",
    "dtypes.factor_rounded_to_bf16",
    "dtypes.positions_in_half_7b",
)
_BITS = "it rounds in another place, which bits tell and no rms in half precision"
_ROUNDING = "in float32 it moves no tensor by more than the noise of rounding"
_TOKENS = "what it decodes freely hangs on a near tie, which another order of summation decides otherwise"
_CONSTANT = "another machine's libraries give a table that differs by as much"
#: why a fault is not told in its own case
UNTOLD = {
    **dict.fromkeys(("decoder.branches_averaged", "decoder.final_norm_eps", "decoder.final_norm_eps_7b"), _ROUNDING),
    **{
        name: _BITS
        for name, fault in KNOWN.items()
        if fault.dtype in ("bfloat16", "float16") and name not in SEEN_IN_HALF
    },
    **dict.fromkeys(("caches.aligned_at_the_end", "caches.aligned_at_the_end_7b"), _TOKENS),
    **{f"position.frequencies_{how}{model}": _CONSTANT for how in ("in_float64", "by_power") for model in ("", "_7b")},
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return faults.bench(GOLDENS)


@pytest.fixture(scope="module")
def sketches() -> Sketches:
    found = Sketches.load(GOLDENS)
    assert found is not None, "python tools/study.py sketches --accept"
    return found


@pytest.fixture(autouse=True)
def other_arithmetic() -> Iterator[None]:
    with ieee(), runs._computed(OTHER):
        yield


def _explained(
    bench: Bench, sketches: Sketches, place: str, dtype: str, *chosen: Fault, passes: str = "chained forced"
) -> list[Explanation]:
    made = tensors(bench, place, dtype, *chosen, setting=chosen[0].setting)
    given = {name: made[name] for name in passes.split()}
    return explain_case(sketches, bench.case(place), given, bench.tolerances, dtype=dtype)


def _recognised(fault: Fault, bench: Bench, sketches: Sketches) -> bool:
    dtype = fault.dtype if fault.dtype in ("bfloat16", "float16") else "float32"
    return any(fault.name in e.faults for e in _explained(bench, sketches, fault.place, dtype, fault))


def test_the_store_knows_all_faults(sketches: Sketches) -> None:
    assert [fault.name for fault in sketches.faults] == list(KNOWN)
    assert [fault.what for fault in sketches.faults] == [fault.what for fault in KNOWN.values()]
    shown = {n for table in sketches.tables.values() for n in table.fault.tolist()}
    assert [fault.name for n, fault in enumerate(sketches.faults) if n not in shown] == []
    for fault in KNOWN.values():
        assert (fault.place, "chained") in sketches.tables


@pytest.mark.parametrize("name", [name for name in list(KNOWN)[7::30] if name not in UNTOLD])
def test_a_known_fault_is_recognised(name: str, bench: Bench, sketches: Sketches) -> None:
    assert _recognised(KNOWN[name], bench, sketches)


@pytest.mark.parametrize(
    ("name", "words"), [("decoder.mlp_silu", "(the 7B's way)"), ("seven.gelu_of_the_9b", "(the 9B's way)")]
)
def test_the_other_models_way_is_called_so(name: str, words: str, bench: Bench, sketches: Sketches) -> None:
    found = mixed.named(_explained(bench, sketches, KNOWN[name].place, "float32", KNOWN[name]))
    assert f"known fault `{name}` {words} within" in " ".join(one.text() for one in found)
    assert set(mixed.WAYS) <= set(KNOWN)


@pytest.mark.parametrize("alike", [(), ("decoder.norm_centred",)])
def test_of_faults_that_are_not_told_apart_it_says_which(alike: tuple[str, ...]) -> None:
    near = Match("decoder.mlp_gelu_erf", "", 0.1, ("logits",), (*alike, "decoder.mlp_silu"))
    (found,) = mixed.named([Explanation(("logits",), (near,), recognised=True)])
    assert "do not tell apart (`decoder.mlp_silu` is the 7B's way), within" in found.text()
    (found,) = mixed.named([Explanation(("logits",), (replace(near, alike=alike),), recognised=True)])
    assert "way" not in found.text()


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_known_fault_is_recognised(part: int, bench: Bench, sketches: Sketches) -> None:
    missed = [name for name in list(KNOWN)[part::10] if not _recognised(KNOWN[name], bench, sketches)]
    assert set(missed) <= set(UNTOLD) <= set(KNOWN)


@pytest.mark.parametrize(
    "bug",
    [*NEW, *(pytest.param(bug, marks=pytest.mark.slow) for bug in NEW_7B)],
    ids=lambda bug: bug.name,
)
def test_a_new_bug_is_no_known_fault(bug: Fault, bench: Bench, sketches: Sketches) -> None:
    for passes in ("chained", "forced"):
        found = _explained(bench, sketches, bug.place, "float32", bug, passes=passes)
        assert found, "it changes nothing: choose another"
        assert [e.text() for e in found if e.recognised] == []


PAIRS = [
    ("bridge.projector_gelu_tanh", "attention.window_one_short"),
    ("norms.rms_eps", "decoder.mlp_gelu_erf"),
    ("towers.whisper_gelu_tanh", "masks.stream_mask_ignored"),
    ("bridge.fold_channels_last", "rotation.rope_theta"),
    ("attention.heads_tiled_cross", "decoding.no_final_softcap"),
]


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_two_faults_at_once_are_both_named(names: tuple[str, str], bench: Bench, sketches: Sketches) -> None:
    found = _explained(bench, sketches, "small/base", "float32", *(KNOWN[name] for name in names))
    named = {name for e in found for name in e.faults}
    assert set(names) <= named
    assert all(e.recognised for e in found)


#: what a hook on each module of a port sees
MODULES = ("*.tower", "*.projector", "*.llm_norm", "text.embeds", "*.t2?", "*.output", "final.norm", "logits")
UNSEEN = [
    ("norms.rms_centred", "rotation.rope_theta"),
    ("position.sum_normed", "decoder.mlp_gelu_erf"),
    ("audio.one_position_late", "attention.heads_tiled_cross"),
    ("bridge.fold_channels_last", "masks.stream_mask_ignored"),
]


@pytest.mark.parametrize("names", UNSEEN, ids="+".join)
def test_a_port_that_traces_few_stages(names: tuple[str, str], bench: Bench, sketches: Sketches) -> None:
    """Of neither fault a stage of its own is traced: the forced run shows each at the next one that is."""
    case = bench.case("small/base")
    targets, model = case.variant("cast"), bench.model("small/base", "float32")

    def traced(stage: str) -> bool:
        return any(fnmatch.fnmatchcase(stage, glob) for glob in MODULES)

    def feeds(stage: str) -> list[str]:
        entry = bench.tolerances.stages.find(stage)
        return [on_bench.id(template, stage) for template in entry[0].inputs] if entry else []

    on_bench = bench.subject("float32").bench(case, model, targets)
    chained, forced = Trace(traced), Trace(traced, lambda stage: targets[stage].array)  # type: ignore[union-attr]
    with contextlib.ExitStack() as planting:
        for name in names:
            planting.enter_context(planted(KNOWN[name], model))
        for tap in (chained, forced):
            on_bench.run(tap)
    made = {"chained": chained.tensors(), "forced": forced.tensors()}
    found = explain_case(sketches, case, made, bench.tolerances, feeds=feeds)
    assert all(e.recognised for e in found), [e.text() for e in found]
    assert {name for e in found for name in e.faults} >= set(names)


@pytest.mark.parametrize(
    ("model", "name"), [("9b", "bridge.projector_gelu_tanh"), ("7b", "attention.heads_tiled_self_7b")]
)
def test_a_recording_takes_a_second(model: str, name: str, bench: Bench, sketches: Sketches) -> None:
    made = tensors(bench, PLAIN[model][0], "float32", KNOWN[name])
    case = bench.case(PLAIN[model][0])
    start = time.perf_counter()
    (found,) = explain_case(sketches, case, made, bench.tolerances)
    assert time.perf_counter() - start < 10
    assert found.faults == (name,)
    assert found.matches[0].distance < 0.5
    assert found.matches[1].distance > 5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_parity_run_names_it(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    with planted(KNOWN["attention.window_one_short"], None):
        assert main(["parity", "--case", "small/base", "--dtype", dtype, "--chained", "--quiet"]) == 1
    assert "the same tensors as known fault `attention.window_one_short` within 0." in capsys.readouterr().out


def test_a_sound_model_needs_no_explanation(bench: Bench, sketches: Sketches) -> None:
    for place in ("small/base", "official/single", "small-7b/base"):
        made: Any = tensors(bench, place, "float32")
        assert explain_case(sketches, bench.case(place), made, bench.tolerances) == []


# ---- a model that is approximate on purpose ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def eight_bits() -> Bench:
    """A bench whose model of small/base has every matrix of its layers in eight bits, row by row."""
    bench = faults.bench(GOLDENS)
    with torch.no_grad():
        for name, weight in bench.model("small/base", "float32").named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                step = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
                weight.copy_((weight / step).round() * step)
    return bench


@pytest.mark.parametrize(
    "name",
    [
        "bridge.fold_channels_last",
        "attention.window_one_short",
        "attention.heads_tiled_cross",
        "decoder.streams_not_updated",
        "masks.stream_mask_ignored",
        "rotation.rope_theta",
        "norms.rms_centred",
    ],
)
def test_a_fault_under_a_declared_error_is_named(name: str, eight_bits: Bench, sketches: Sketches) -> None:
    """Declared is a quarter more than the model errs without it, a thousand times what float32 may."""
    case, stages = eight_bits.case("small/base"), eight_bits.tolerances.stages
    judging = store.goldens(case.variant("cast"), stages)
    sound = tensors(eight_bits, "small/base", "float32")
    faulty = tensors(eight_bits, "small/base", "float32", KNOWN[name])
    told = []
    for passes in ("chained", "forced"):
        usual = store.units(judging, eight_bits.tolerances, stages, "float32-cast", "small/base", passes)
        errs = {s: 1.25 * store.difference(x, judging[s], usual[s]).rms for s, x in sound[passes].items()}
        allowed = {s: usual[s] * max(errs.get(s, 1.0), 1.0) for s in usual}
        how: Any = {"judging": judging, "allowed": allowed, "stages": stages}
        assert explain(sketches, "small/base", sound[passes], passes, **how) == []
        told.append({f for e in explain(sketches, "small/base", faulty[passes], passes, **how) for f in e.faults})
    assert name in told[0] | told[1], told
