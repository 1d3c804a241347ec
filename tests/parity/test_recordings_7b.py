"""The model against the full recordings of the 7B's official release, every recorded row (NOT RUN where they are absent).

They are imported as any folder of recordings would be. float32 files are held chained from raw inputs within 1e-4 of a
stage's rms (measured 2e-5); the float64 file at the stages that no float32 step precedes. The model has no float32 steps in
float64; behind the first norm the oracle's small cases judge it (`test_small_7b.py`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.not_run import not_run
from tests.oracle.recordings import FOLDER_7B
from tools.import_official import import_recordings
from vidi import generate, loss
from vidi.checkpoint import names
from vidi.parity import feed, store, trace
from vidi.parity.compare import compare
from vidi.parity.golden import Whole
from vidi.parity.ids import before_float32
from vidi.parity.tolerance import Rule

CASES = ("single", "batch", "silent", "holes", "nowindow", "videoonly", "audioonly")
WITHIN = Rule("recorded", "chained from raw inputs", max=1e-4, zero_rows=False)
PURE = Rule("recorded", "double precision up to here", max=1e-12, zero_rows=False)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (FOLDER_7B / "weights.safetensors").is_file():
        not_run(f"no recordings in {FOLDER_7B.name}; set VIDI_RECORDINGS_7B to the folder that holds them")
    place = tmp_path_factory.mktemp("recordings-7b") / "full"
    import_recordings(FOLDER_7B, place, full=True)
    return place


def stages_of(case: store.Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One whole pass, every stage as recorded."""
    model, tap = feed.load_model(case, dtype), trace.Trace()
    with torch.no_grad():
        model(feed.batch_of(case.inputs), last_stream=True, tap=tap)
    found = tap.tensors()
    return found | dict(trace.cross_attention(found, model.config.decoder.num_heads))


def off(found: dict[str, torch.Tensor], case: store.Case, stages: list[str], rule: Rule) -> list[str]:
    wrong = []
    for stage in stages:
        golden, value = case.targets[stage], found[stage].detach().numpy()
        if isinstance(golden, Whole) and golden.array.dtype.kind in "bi":
            if not np.array_equal(value, golden.array):
                wrong.append(f"{stage}: not equal")
        elif not (result := compare(stage, value.reshape(golden.shape), golden, rule)).ok:
            wrong.append(result.text())
    return wrong


@pytest.mark.parametrize("name", [*CASES, pytest.param("longvideo", marks=pytest.mark.slow)])
def test_float32_chained_from_raw_inputs(imported: Path, name: str) -> None:
    case = store.open_case(imported, name)
    found = stages_of(case, torch.float32)
    stages = [stage for stage in case.targets if stage != "pos.freq"]
    assert set(stages) <= found.keys()
    assert off(found, case, stages, WITHIN) == []


def test_float64_before_any_float32_step(imported: Path) -> None:
    case = store.open_case(imported, "single.f64")
    stages = [stage for stage in case.targets if before_float32(stage)]
    assert {"vision.conv", "vision.pool", "vision.projector", "audio.pool", "audio.projector"} <= set(stages)
    assert off(stages_of(case, torch.float64), case, stages, PURE) == []


def test_the_unsampled_rows_of_the_convolution_need_not_be_computed(imported: Path) -> None:
    case = store.open_case(imported, "batch")
    model, tap = feed.load_model(case, torch.float32), trace.Trace()
    model.bridge.image_grid.everywhere = False
    with torch.no_grad():
        model.encode_images(feed.batch_of(case.inputs).images, tap)
    found = tap.tensors()
    assert "vision.conv" not in found
    assert off(found, case, ["vision.pool", "vision.llm_norm"], WITHIN) == []


@pytest.mark.parametrize(
    "variant", ["generate.generate", "generate.generate_short", "generate.generate_nowindow", "genpair.genpair"]
)
def test_decoding(imported: Path, variant: str) -> None:
    """Cached = uncached = recorded at every step, and the greedy ids of the uncached release."""
    name, _, variant = variant.partition(".")
    case = store.open_case(imported, name)
    model = feed.with_window(feed.load_model(case, torch.float32), case.info["generate"][variant]["window"])
    batch = feed.batch_of(case.inputs, f"{variant}.prompt_ids")
    forced = torch.from_numpy(case.inputs[f"{variant}.tokens"])
    with torch.inference_mode():
        streams = model.streams(batch)
        whole = trace.whole_pass_logits(model, batch, forced, streams)
        steps = generate.forced_logits(model, batch, forced, streams=streams)
        free = generate.greedy(model, batch, max_new_tokens=forced.shape[1], streams=streams)
    stage = f"{variant}.nocache.logits"
    assert off({stage: whole}, case, [stage], WITHIN) == []
    assert off({stage: steps}, case, [stage], WITHIN) == []
    golden = case.targets[f"{variant}.greedy_nocache.tokens"]
    assert isinstance(golden, Whole)
    assert free.tokens == golden.array.tolist()


def test_losses_and_gradients(imported: Path) -> None:
    """Losses within 1e-5; gradients within 2e-4 of their rms (measured 7e-5)."""
    case = store.open_case(imported, "loss")
    model, tap = feed.load_model(case, torch.float32), trace.Trace()
    losses_N = model.losses(feed.batch_of(case.inputs), tap=tap)
    found = tap.tensors()
    stages = ["text.labels", "loss.kept", "loss.labels", "loss.logits", "loss.per_token"]
    assert off(found, case, stages, WITHIN) == []
    grads = 0
    for name, threshold in case.info["loss_thresholds"].items():
        value, golden = loss.mean_of(losses_N, threshold), case.targets[f"loss.{name}"]
        assert isinstance(golden, Whole)
        assert value.item() == pytest.approx(float(golden.array[0]), abs=1e-5)
        for stage in (stage for stage in case.targets if stage.startswith(f"grad.{name}.")):
            parameter = model.get_parameter(str(names.our_name(stage.removeprefix(f"grad.{name}."), model.config)))
            (slope,) = torch.autograd.grad(value, [parameter], retain_graph=True)
            assert off({stage: slope}, case, [stage], Rule("recorded", "", max=2e-4, zero_rows=False)) == []
            grads += 1
    assert grads == 28


def test_float16_errs_no_more_than_the_release(imported: Path, record_property) -> None:
    """Against float64, stage by stage, at most 1.5 times the release's own error (measured 0.93 to 1.05). The position
    MLPs' outputs are equal bit for bit: their weights pass through float16 first, as in the release's loader."""
    exact, low = (store.open_case(imported, f"single.{short}") for short in ("f64", "f16"))
    found, ratios = stages_of(low, torch.float16), {}
    embeds = [stage for stage in low.targets if ".embed" in stage and stage != "text.embeds"]
    assert len(embeds) == 4
    for stage in embeds:
        assert np.array_equal(found[stage].float().numpy(), low.targets[stage].array), stage
    for stage, golden in low.targets.items():
        truth = exact.targets[stage].array.astype(np.float64)
        if stage != "pos.freq" and truth.dtype.kind == "f" and np.any(golden.array != truth):
            own, theirs = (np.sqrt(np.mean((x - truth) ** 2)) for x in (found[stage].double().numpy(), golden.array))
            ratios[stage] = own / theirs
    assert len(ratios) > 50
    record_property("worst", f"{max(ratios.values()):.2f} times the release's own error")
    assert {stage: ratio for stage, ratio in ratios.items() if ratio > 1.5} == {}
    assert 0.9 < np.median(list(ratios.values())) < 1.1, "some rounding is missing or doubled"
