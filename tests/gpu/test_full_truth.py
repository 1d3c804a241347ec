"""The full-size case itself, held by the oracle in float64: the plain float32 run makes the stored sketches again, and what it
has at chosen stages is what the oracle makes of the same inputs: both towers whole, both bridges, and the first, a middle and
the last decoder layer with all that text reads of 60 frames, final norm and logits.

The oracle's sizes are the tests' own (`tests.released`). Each part is fed what the run had, so that its error is its own. Some
two minutes of 16 cores; VIDI_REHEARSE=1 runs it on a tiny model.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from goldens.oracle import Arithmetic, bridge, decoder, models, nine, towers
from goldens.oracle.case import Sizes, Trace
from stageparity import fingerprint
from stageparity.golden import Whole
from tests import released
from tests.full_width import weights
from vidi import precision
from vidi.checkpoint import names, synthetic
from vidi.config import VidiConfig
from vidi.model import VidiModel
from vidi.parity import full
from vidi.parity.stages import STAGES

pytestmark = [pytest.mark.full, pytest.mark.timeout(560)]

NEAR = 1e-4  # of a stage's rms, in float32
AR = Arithmetic()
FRAMES = (0, 59)
LETTERS = {"image": "v", "audio": "a"}


class Parameters(Mapping[str, np.ndarray]):
    """A model's weights by official name, float32; decoder layer 0 is ``layer``."""

    def __init__(self, model: VidiModel, layer: int = 0) -> None:
        self._model, self._layer = model, f"model.layers.{layer}."
        self._ours = {want.official: want.ours for want in names.expected(model.config).values()}

    def __getitem__(self, name: str) -> np.ndarray:
        ours = self._ours[name.replace("model.layers.0.", self._layer)]
        return self._model.get_parameter(ours).detach().float().cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._ours)

    def __len__(self) -> int:
        return len(self._ours)

    def __contains__(self, name: object) -> bool:
        return name in self._ours


@dataclasses.dataclass(frozen=True)
class Run:
    """found: stage -> what the plain float32 run had. errors: stage -> from the stored sketch, of its rms."""

    model: VidiModel
    official: dict[str, Any]
    inputs: Mapping[str, np.ndarray]
    found: Mapping[str, np.ndarray]
    errors: Mapping[str, float]

    def sizes(self) -> Sizes:
        return models.read(self.official)

    def weights(self, layer: int = 0) -> weights.Tensors:
        return weights.Tensors(AR, Parameters(self.model, layer))

    def far(self, truth: Mapping[str, np.ndarray], rows: slice | list[int] = slice(None)) -> list[str]:
        """What lies further from the oracle than float32 may."""
        said = []
        for stage, wanted in truth.items():
            own = self.found[stage][rows].astype(np.float64)
            assert own.shape == wanted.shape, (stage, own.shape, wanted.shape)
            if wanted.dtype.kind != "f":
                error = 0.0 if np.array_equal(own, wanted) else np.inf
            else:
                error = float(np.sqrt(np.mean(np.square(own - wanted)) / np.mean(np.square(wanted))))
            if not error <= NEAR:
                said.append(f"{stage}: {error:.3g} of rms")
        return said


@cache
def _run(device: str) -> Run:
    where = torch.device(device)
    if device == "cpu":
        config, num_frames, golden = VidiConfig.tiny(), FRAMES[-1] + 1, {}
        official, model = config.to_official(), synthetic.create(config, full.SEED, dtype=torch.bfloat16)
        model.frame_chunk = num_frames
    else:
        case = full.FullCase(device=device)
        config, num_frames, golden = case.config, case.num_frames, case.golden
        official, model = released.config(), case.build()
    arrays = full.inputs(config, num_frames)
    precision.cast_model(model, torch.float32)
    last = config.decoder.num_layers - 1
    kept = {f"layer.{i}.{x}" for i in _layers(last) for x in ("input", "t2t", "t2v", "t2a", "output")}
    kept |= {f"layer.{j}.{m}_stream" for i in _layers(last) for j in (i - 1, i) for m in LETTERS}
    found: dict[str, np.ndarray] = {}
    errors: dict[str, float] = {}

    def tap(stage: str, x: Tensor) -> Tensor:
        if stage in golden:
            mine = full.sketched(stage, x, like=golden[stage])
            if STAGES.is_exact(stage):
                assert isinstance(mine, Whole)
                errors[stage] = 0.0 if np.array_equal(mine.array, golden[stage].array) else np.inf
            else:
                errors[stage] = full._errors(mine, golden[stage])["rms"]
        if stage in kept or not stage.startswith(("layer.", "xattn.")) or stage.endswith("_input"):
            found[stage] = x.cpu().numpy()
        return x

    with torch.no_grad(), fingerprint.ieee():
        model(full._batch(arrays, where, torch.float32), tap=tap)
    return Run(model, official, arrays, found, errors)


def _layers(last: int) -> tuple[int, ...]:
    return (0, last // 2, last)


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    yield
    _run.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def run(device: torch.device) -> Run:
    return _run(str(device))


def test_the_stored_sketches_are_of_this_run(run: Run, device: torch.device) -> None:
    assert device.type == "cpu" or len(run.errors) > 400
    assert {stage: error for stage, error in run.errors.items() if not error <= NEAR} == {}


def test_the_vision_tower(run: Run) -> None:
    frames = run.inputs["inputs.images_u8.0"][list(FRAMES)] / 127.5 - 1
    tower = towers.siglip(AR, run.sizes(), run.weights(), frames)
    assert run.far({"vision.tower": tower}, list(FRAMES)) == []


def test_the_audio_tower(run: Run) -> None:
    mel = torch.from_numpy(run.inputs["inputs.audios.0"][:1]).bfloat16().double().numpy()
    assert run.far({"audio.tower": towers.whisper(AR, run.sizes(), run.weights(), mel)}, slice(1)) == []


def test_the_visual_bridge(run: Run) -> None:
    trace, tower = Trace(), run.found["vision.tower"].astype(np.float64)
    chunks = iter(np.split(tower, range(bridge.FRAMES_AT_ONCE, len(tower), bridge.FRAMES_AT_ONCE)))
    table = run.model.bridge.pos_t.freq_K.cpu().numpy()  # of the machine; tests/gpu/test_gpu_goldens.py holds it
    with mock.patch.object(bridge, "siglip", side_effect=lambda *_: next(chunks)):
        given = {"inputs.images.0": np.ones((len(tower), 3, 1, 1))}
        bridge.visual_tokens(AR, run.sizes(), run.weights(), given, 1, table, trace)
    truth = {stage: x for stage, x in trace.result().items() if stage in run.found}
    assert {"vision.pos_h", "vision.pos_w", "vision.pos_t", "vision.mask", "vision.llm_norm"} < set(truth)
    assert run.far(truth) == []


def test_the_audio_bridge(run: Run) -> None:
    trace, tower = Trace(), run.found["audio.tower"].astype(np.float64)
    table = run.model.bridge.pos_t.freq_K.cpu().numpy()
    given = {
        "inputs.audios.0": np.ones(run.inputs["inputs.audios.0"].shape),
        "inputs.audio_sizes": run.inputs["inputs.audio_sizes"],
    }
    with mock.patch.object(bridge, "whisper", return_value=tower):
        bridge.audio_tokens(AR, run.sizes(), run.weights(), given, 1, table, trace)
    truth = {stage: x for stage, x in trace.result().items() if stage in run.found and stage != "audio.tower"}
    assert {"audio.pool", "audio.projector", "audio.pos_t", "audio.mask", "audio.llm_norm"} < set(truth)
    assert run.far(truth) == []


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_decoder_layer(run: Run, place: str) -> None:
    """As the oracle's only layer, with the window of its place."""
    last = run.model.config.decoder.num_layers - 1
    i = _layers(last)[("first", "middle", "last").index(place)]
    own = run.sizes()
    sizes = dataclasses.replace(own, num_layers=1, window=None if i % own.windowed_every else own.window)
    held = run.weights(i)
    keep = {
        name: run.found[f"{path}.mask"] for name, path in (("text", "text"), ("image", "vision"), ("audio", "audio"))
    }
    before = {m: run.found[f"layer.{i - 1}.{m}_stream" if i else f"layer.0.{m}_input"] for m in LETTERS}
    given = {"layer.0.input": run.found[f"layer.{i}.input"]} | {f"layer.0.{m}_input": x for m, x in before.items()}
    anchor = {stage: x.astype(np.float64) for stage, x in given.items()}
    trace = Trace(lambda stage: not stage.startswith(("xattn.", "rope.")), anchor=anchor)
    streams = {}
    for name, letter in LETTERS.items():
        x = anchor[f"layer.0.{name}_input"]
        streams[letter] = decoder.carry_stream(AR, sizes, held, name, x, keep[name], trace)
    normed = decoder.run_text(AR, sizes, held, anchor["layer.0.input"], keep["text"], streams, trace)
    if i == last:
        nine.logits(AR, sizes, held, normed, trace)
    parts = ("t2t", "t2v", "t2a", "output", *(f"{m}_stream" for m in LETTERS if f"layer.{i}.{m}_stream" in run.found))
    truth = {f"layer.{i}.{part}": trace.result()[f"layer.0.{part}"] for part in parts}
    truth |= {stage: trace.result()[stage] for stage in ("final.norm", "logits") if i == last}
    assert run.far(truth) == []
