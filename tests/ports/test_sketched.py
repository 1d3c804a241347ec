"""Sketches in the place of tensors: the tracer's are the harness's own; pieces and layouts; what is refused; their size."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stageparity import sketch, store
from stageparity.golden import GoldenError, Sketched, Whole
from stageparity.port import sketched, stagetrace
from stageparity.port.stagetrace import call
from stageparity.result import Rule
from vidi.commands import cases
from vidi.parity import full, port, port_full
from vidi.parity.goldens import goldens_dir
from vidi.parity.stages import STAGES

MEGABYTES = 20  # of a whole trace of 60 frames and 42 layers
SPEC = sketch.SketchSpec(block_rows=64, column_buckets=16, seed=5)


def golden_of(x: np.ndarray, spec: sketch.SketchSpec = SPEC) -> Sketched:
    matrix = x.reshape(-1, x.shape[-1]).astype(np.float64)
    return Sketched(x.shape, "float32", sketch.make(matrix, spec))


def sketcher(golden: Sketched, stage: str = "layer.0.output") -> stagetrace.Sketcher:
    return stagetrace.Sketcher(sketched.rule_of({stage: golden}, STAGES))


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---- the same numbers ---------------------------------------------------------------------------------------------------------


def test_both_generators_give_the_same_words() -> None:
    assert stagetrace.SKETCH == sketch.VERSION
    counters = np.concatenate([np.arange(5000), np.array([2**31, 2**32 - 1, 2**40])])
    for seed, stream in ((0, 0), (0, 3), (7, 1), (2**32 - 1, 2)):
        np.testing.assert_array_equal(
            stagetrace.words(seed, stream, counters), sketch.words(seed, stream, counters), f"{seed} {stream}"
        )


#: one block of few rows; several, the last not full; wider than what is projected at once
SHAPES = [(1, 20, 40), (2, 75, 33), (1, 3, 20_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["numpy", "float64", "float32", "bfloat16"])
def test_a_tracers_sketch_is_the_harness_own(shape: tuple[int, ...], kind: str) -> None:
    """Blocks within one rounding of float32, for sums run in another order; entries and largest values bit for bit."""
    x = drawn(*shape)
    mine: Any = x
    if kind != "numpy":
        mine = torch.from_numpy(x).to(getattr(torch, kind))
        x = mine.double().numpy()
    golden = golden_of(drawn(*shape, seed=1))  # its largest entries stand elsewhere
    parts = {name: stagetrace.to_numpy(part)[0] for name, part in sketcher(golden)("layer.0.output", mine).items()}
    wanted = sketch.make(x.reshape(-1, x.shape[-1]), SPEC, golden.sketch.top_index)
    assert parts["blocks"].dtype == np.float32
    np.testing.assert_allclose(parts["blocks"], wanted.blocks, rtol=1.2e-7, atol=1e-10)
    for name in ("block_max", "top_value", "sample_value"):
        np.testing.assert_array_equal(parts[name], getattr(wanted, name), name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_of_halves_gives_the_same_sketch(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a GPU, its product by a CPU; tests/gpu/test_gpu_sketch.py has its own."""
    x = torch.from_numpy(drawn(*shape)).bfloat16()
    golden = golden_of(drawn(*shape, seed=1))
    wanted = sketcher(golden)("layer.0.output", x)
    monkeypatch.setattr(stagetrace, "_half_on_gpu", lambda x: True)
    monkeypatch.setattr(stagetrace, "_product", lambda a, b: a.float() @ b.float())
    parts = sketcher(golden)("layer.0.output", x)
    torch.testing.assert_close(parts["blocks"], wanted["blocks"], rtol=1e-6, atol=1e-5)
    for name in ("block_max", "top_value", "sample_value"):
        torch.testing.assert_close(parts[name], wanted[name], rtol=0, atol=0)
    for value in (math.nan, -math.inf):
        x[0, -1, 3] = value
        assert not sketcher(golden)("layer.0.output", x)["block_max"].isfinite().all()


def test_axes_that_tell_rows_apart_come_first() -> None:
    """Channels stand before the grid in the golden, and are the columns of its sketch."""
    x = torch.from_numpy(drawn(2, 50, 12, 12))
    golden = full.sketched("vision.pad", x)
    assert isinstance(golden, Sketched)
    parts = sketcher(golden, "vision.pad")("vision.pad", x)
    np.testing.assert_allclose(parts["blocks"].numpy(), golden.sketch.blocks, rtol=1.2e-7, atol=1e-10)
    np.testing.assert_array_equal(parts["top_value"].numpy(), golden.sketch.top_value)


def test_another_version_is_refused() -> None:
    rule = sketched.rule_of({"layer.0.output": golden_of(drawn(1, 9, 9))}, STAGES)
    with pytest.raises(ValueError, match="wants sketches of version 2, this tracer makes 1"):
        stagetrace.Sketcher({**rule, "version": 2})
    assert "version" in rule


@pytest.mark.parametrize(
    "pattern", ["a b c -> b a c", "a b c -> a (b r) c", "a (b d) c -> a b d c", "a b c -> 1 a c b"]
)
def test_layouts_of_torch_are_those_of_numpy(pattern: str) -> None:
    x = drawn(2, 6, 4)
    wanted = stagetrace.arrange(x, pattern, r=3, d=2)
    np.testing.assert_array_equal(stagetrace.arrange(torch.from_numpy(x), pattern, r=3, d=2).numpy(), wanted)


# ---- a run --------------------------------------------------------------------------------------------------------------------


def traced(x: np.ndarray, *pieces: Any, **how: Any) -> tuple[stagetrace.Trace, Sketched]:
    """A run that meets these pieces of the stage whose golden is x."""
    golden = golden_of(x)
    trace = stagetrace.Trace(["layer.0.output"], {"layer.0.output": list(x.shape)}, None, sketcher(golden))
    for piece in pieces:
        assert trace.record("layer.0.output", piece, call("", **how)) is piece
    return trace, golden


def judged(trace: stagetrace.Trace, golden: Sketched, budget: float = 1e-6) -> Any:
    rule = {key: value for key, value in trace.sketcher.rule.items() if key != "stages"}
    said = {"sketch": rule, "shapes": trace.seen, "dtypes": trace.dtypes}
    found = sketched.assembled(said, trace.tensors(), {"layer.0.output": golden})["layer.0.output"]
    return sketched.held(
        "layer.0.output", found, golden, Rule("test", "why", rms=budget), STAGES.axes("layer.0.output")
    )


def test_pieces_are_joined_before_and_may_be_written_into_after() -> None:
    x = drawn(4, 30, 12)
    pieces = [torch.from_numpy(x[:1].copy()), torch.from_numpy(x[1:].copy())]
    trace, golden = traced(x)
    trace.record("layer.0.output", pieces[0], call("", join=0))
    pieces[0].zero_()
    trace.record("layer.0.output", pieces[1], call("", join=0))
    assert judged(trace, golden).ok
    assert trace.pieces["layer.0.output"] == [], "what is sketched is let go"
    for surplus in (1, 2):  # a piece too many is another shape, however many follow
        trace.record("layer.0.output", pieces[1], call("", join=0))
        assert judged(trace, golden).problems == (f"shape [{4 + 3 * surplus}, 30, 12], golden has [4, 30, 12]",)


def test_a_tensor_of_another_shape_is_let_go_and_met_once() -> None:
    x = drawn(2, 30, 12)
    trace, golden = traced(x, torch.from_numpy(x.transpose(0, 2, 1).copy()), torch.from_numpy(x))
    assert trace.pieces["layer.0.output"] == []
    assert "met more than once" in trace.notes["layer.0.output"]
    assert judged(trace, golden).problems == ("shape [2, 12, 30], golden has [2, 30, 12]",)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_numbers_that_are_no_floats_end_no_run(library: Any) -> None:
    x = drawn(2, 30, 12)
    trace, _ = traced(x, library(x.astype(np.complex64)))
    assert "no real numbers" in trace.notes["layer.0.output"]
    for kind in (np.bool_, np.uint8, np.int64):
        trace, golden = traced(x, library(x.astype(kind)))
        assert f"dtype {np.dtype(kind).name}" in judged(trace, golden).problems[0]


def test_padded_rows_and_layouts_are_dealt_with_where_the_tensor_lies() -> None:
    x = drawn(2, 30, 12)
    padded = torch.from_numpy(np.concatenate([x, np.ones((2, 3, 12), np.float32)], 1).transpose(2, 0, 1).copy())
    trace, golden = traced(x, padded, keep=lambda n, x: x[..., :30], layout="d b t -> b t d")
    assert judged(trace, golden).ok


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda x: x.transpose(0, 2, 1), r"shape [2, 12, 30], golden has [2, 30, 12]"),
        (lambda x: x[:1], "shape [1, 30, 12]"),
        (lambda x: np.where(x == x.max(), np.nan, x), "NaN or Inf"),
        (lambda x: np.where(x == x.max(), -np.inf, x), "NaN or Inf"),
        (lambda x: x.astype(np.int64), "dtype int64, golden has float32"),
        (lambda x: x * 1.001, "rms"),
    ],
)
def test_what_differs_is_said(spoil: Any, words: str) -> None:
    x = drawn(2, 30, 12)
    result = judged(*traced(x, torch.from_numpy(np.ascontiguousarray(spoil(x)))), budget=5e-4)
    assert not result.ok
    assert words in result.text()


@pytest.mark.parametrize("change", [{"seed": 1}, {"version": 2}, {"block_rows": 63}, {"column_buckets": 32}])
def test_a_sketch_by_another_rule_is_refused(change: dict[str, int]) -> None:
    x = drawn(2, 30, 12)
    trace, golden = traced(x, x)
    trace.sketcher.rule |= change
    with pytest.raises(ValueError, match=f"sketched with {next(iter(change))}"):
        judged(trace, golden)


def test_a_part_that_is_missing_or_of_another_form_is_refused() -> None:
    x = drawn(2, 30, 12)
    trace, golden = traced(x, x)
    blocks = trace.kept["layer.0.output"].pop("layer.0.output/blocks")
    with pytest.raises(ValueError, match="its sketch has no blocks"):
        judged(trace, golden)
    trace.kept["layer.0.output"]["layer.0.output/blocks"] = blocks[:, 1:]
    with pytest.raises(ValueError, match="blocks has shape"):
        judged(trace, golden)


# ---- the stored case ----------------------------------------------------------------------------------------------------------


def stored() -> store.Case:
    (ref,) = cases.for_ports(goldens_dir(), ["full/frames60"])
    return store.open_case(ref.folder, ref.name)


def test_cases_known_by_sketches_are_meant_where_their_set_is_named() -> None:
    """A run of one takes a GPU: a pattern that matches everything does not mean it."""
    for glob in ("full/frames60", "full/*", "full/frames*"):
        assert [f"{ref.set}/{ref.name}" for ref in cases.for_ports(goldens_dir(), [glob])] == ["full/frames60"]
    assert [ref.set for ref in cases.for_ports(goldens_dir(), ["official/single", "full/*"])] == ["official", "full"]
    for glob in ("*", "*/*"):
        assert "full" not in {ref.set for ref in cases.for_ports(goldens_dir(), [glob])}
    with pytest.raises(GoldenError, match="no case 'f"):
        cases.for_ports(goldens_dir(), ["f*/*"])


def test_a_whole_trace_takes_a_few_megabytes(tmp_path: Path) -> None:
    """Written as the tracer writes it, of tensors as large as every stage's of 60 frames and 42 layers leaves."""
    case = stored()
    targets = dict(case.variant(full.VARIANT).items())
    assert (case.info["num_frames"], case.config["num_hidden_layers"]) == (60, 42)
    assert all(f"layer.{i}.{part}" in targets for i in range(42) for part in ("t2t", "t2v", "t2a", "output"))
    tensors: dict[str, np.ndarray] = {}
    for stage, golden in targets.items():
        if isinstance(golden, Whole):
            tensors[stage] = golden.array
            continue
        assert isinstance(golden, Sketched)
        held = {part: getattr(golden.sketch, part, np.zeros(1)) for part in sketched.PARTS}
        tensors |= {f"{stage}/{part}": np.asarray(x).reshape(-1) for part, x in held.items()}
    stagetrace.write_tensors(str(tmp_path / "chained.safetensors"), tensors)
    size = (tmp_path / "chained.safetensors").stat().st_size
    assert size < MEGABYTES * 1e6
    assert size == pytest.approx(2.2e6, rel=0.05), "docs/ports/full.md tells another size"


def test_the_case_tells_a_tracer_how_to_sketch_and_no_golden() -> None:
    case = stored()
    targets = case.variant(full.VARIANT)
    rule = sketched.rule_of(targets, port.load_table().stages)
    spec = {key: value for key, value in rule.items() if key != "stages"}
    assert spec == {"version": 1, "seed": 0, "block_rows": 4096, "row_buckets": 8, "column_buckets": 128, "samples": 64}
    assert rule["stages"]["vision.pad"]["rows"] == [0, 2, 3]
    assert len(rule["stages"]) == 321
    assert all(set(own) == {"rows", "top"} and len(own["top"]) == 16 for own in rule["stages"].values())


def test_what_stages_may_err_by_is_read_without_torch_as_the_full_run_reads_it(tmp_path: Path) -> None:
    found = sketched.Stored.load(goldens_dir(), None)  # type: ignore[arg-type]
    assert sketched.ERRORS == full.NOISE
    assert found.errors == full.stored_noise(goldens_dir())
    assert sketched.Stored.load(tmp_path, None).errors == {}  # type: ignore[arg-type]
    (tmp_path / "measured").mkdir()
    (tmp_path / full.NOISE).write_text('{"stages": {"logits": 3}}')
    with pytest.raises(ValueError, match="damaged"):
        sketched.Stored.load(tmp_path, None)  # type: ignore[arg-type]


def test_the_sound_is_rounded_as_the_model_rounds_it() -> None:
    x = np.concatenate([drawn(5000), np.float32([0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 3e38])])
    np.testing.assert_array_equal(port_full._rounded(x), torch.from_numpy(x).bfloat16().float().numpy())


def test_weights_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    held = {"a.w": torch.randn(3, 4).bfloat16(), "a.b": torch.randn(4), "n": torch.arange(3)}
    for n, names in enumerate((("a.w", "n"), ("a.b",))):
        save_file({name: held[name] for name in names}, tmp_path / f"{n}.safetensors")
    weights = stagetrace.Weights(stagetrace.Checkpoint(str(tmp_path), ""), {"a.*": "mine.*"}, "bfloat16")
    assert sorted(weights) == ["a.b", "a.w", "mine.b", "mine.w", "n"]
    assert weights.folder == str(tmp_path)
    np.testing.assert_array_equal(weights["mine.w"], held["a.w"].float().numpy())
    np.testing.assert_array_equal(weights["a.b"], held["a.b"].numpy())
    assert weights["n"].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="vidi synth"):
        dict(stagetrace.Weights(stagetrace.Checkpoint(None, port_full.MAKE), {}, "bfloat16"))
