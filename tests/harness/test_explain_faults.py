"""The stored sketches recognise every known fault in our own model, planted again under other arithmetic, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from stageparity.faults.judge import Bench
from stageparity.faults.plant import Fault
from stageparity.faults.tensors import tensors
from stageparity.fingerprint import ieee
from stageparity.port.explain import Explanation, explain_case
from stageparity.port.sketches import Sketches
from tests.harness.new_bugs import NEW, NEW_7B
from tools.studies import runs
from tools.studies.sketches import PLAIN
from vidi.parity import faults
from vidi.parity.goldens import goldens_dir

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("explain")]

GOLDENS = goldens_dir()
KNOWN = {name: fault for name, fault in (faults.FAULTS | faults.FAULTS_7B).items() if not fault.needs}
#: other libraries and other orders of summation than the sketches were made with
OTHER = runs.Setting("float32", (), mkldnn=False, stream_chunk=5, key_chunk=3)


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
    bench: Bench, sketches: Sketches, place: str, dtype: str, *planted: Fault, passes: str = "chained forced"
) -> list[Explanation]:
    made = tensors(bench, place, dtype, *planted, setting=planted[0].setting)
    given = {name: made[name] for name in passes.split()}
    return explain_case(sketches, bench.case(place), given, bench.tolerances, dtype=dtype)


def _recognised(fault: Fault, bench: Bench, sketches: Sketches) -> bool:
    dtype = fault.dtype if fault.dtype in ("bfloat16", "float16") else "float32"
    (found,) = _explained(bench, sketches, fault.place, dtype, fault)
    return fault.name in found.faults


def test_the_store_knows_all_faults(sketches: Sketches) -> None:
    assert [fault.name for fault in sketches.faults] == list(KNOWN)
    assert [fault.what for fault in sketches.faults] == [fault.what for fault in KNOWN.values()]
    shown = {n for table in sketches.tables.values() for n in table.fault.tolist()}
    assert [fault.name for n, fault in enumerate(sketches.faults) if n not in shown] == []
    for fault in KNOWN.values():
        assert (fault.place, "chained") in sketches.tables


@pytest.mark.parametrize("name", list(KNOWN)[7::30])
def test_a_known_fault_is_recognised(name: str, bench: Bench, sketches: Sketches) -> None:
    assert _recognised(KNOWN[name], bench, sketches)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_every_known_fault_is_recognised(part: int, bench: Bench, sketches: Sketches) -> None:
    missed = [name for name in list(KNOWN)[part::10] if not _recognised(KNOWN[name], bench, sketches)]
    assert set(missed) <= set(UNTOLD)


#: why a fault is not told from noise, or from the others, in its own case
UNTOLD: dict[str, str] = {}


@pytest.mark.parametrize("bug", [*NEW, *NEW_7B], ids=lambda bug: bug.name)
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


def test_a_sound_model_needs_no_explanation(bench: Bench, sketches: Sketches) -> None:
    for place in ("small/base", "official/single", "small-7b/base"):
        made: Any = tensors(bench, place, "float32")
        assert explain_case(sketches, bench.case(place), made, bench.tolerances) == []
