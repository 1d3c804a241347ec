"""One SigLIP layer, one Whisper layer, the whole bridge and one decoder layer at full width, against NumPy float64.

A model of the released sizes with one layer of each kind, run from pixels and log-mel to logits. The oracle gives the
truth, and its own rounded runs give the unit that errors are measured in, as for the small goldens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from goldens.oracle import forward
from goldens.oracle.casts import Arithmetic
from stageparity.faults.plant import Fault, planted
from stageparity.run import Trace
from tests import released
from tests.gpu.judge import judge
from vidi import precision
from vidi.attention import limits
from vidi.bridge import position
from vidi.checkpoint import names, synthetic
from vidi.config import VidiConfig
from vidi.model import VidiModel
from vidi.parity import feed, trace
from vidi.parity.stages import STAGES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("width"),  # they share what the oracle gives
    pytest.mark.timeout(1200),  # the oracle at full width, in five arithmetics
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own import of triton parts
]

DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def config(narrow: bool) -> VidiConfig:
    """``narrow`` (a rehearsal): the tiny sizes."""
    whole = VidiConfig.tiny() if narrow else VidiConfig.full()
    return dataclasses.replace(
        whole,
        vision=dataclasses.replace(whole.vision, num_layers=2),  # the last one is never computed
        audio=dataclasses.replace(whole.audio, num_layers=1),
        decoder=dataclasses.replace(whole.decoder, num_layers=1, vocab_size=512),
    )


def official(narrow: bool) -> dict:
    """What the oracle reads: at full width the tests' own literals, never the model's configuration."""
    if narrow:
        return config(narrow).to_official()
    return released.config(vision_layers=2, audio_layers=1, num_hidden_layers=1, vocab_size=512)


def inputs(narrow: bool) -> dict[str, np.ndarray]:
    """Two samples, the second shorter and without sound, so that masks act; a sixth of an audio piece."""
    draw = np.random.default_rng(5)
    side, mel = (26, (16, 100)) if narrow else (384, (128, 3000))

    def pixels(frames: int) -> np.ndarray:  # multiples of 1/128 in [-1, 1]: exact in every dtype
        return (draw.integers(-128, 129, (frames, 3, side, side)) / 128).astype(np.float32)

    ids_BT = draw.integers(3, 500, (2, 9))
    ids_BT[:, 2] = -200
    return {
        "inputs.input_ids": ids_BT,
        "inputs.attention_mask": np.arange(9) < np.array([[9], [6]]),
        "inputs.images.0": pixels(1),
        "inputs.images.1": pixels(1),
        "inputs.audios.0": (draw.integers(-128, 129, (1, *mel)) / 128).astype(np.float32),
        "inputs.audio_sizes": np.array([mel[1] // 6, 0]),
    }


@cache
def model(narrow: bool, device: str) -> VidiModel:
    """Weights that bf16 holds exactly, in float32."""
    return synthetic.create(config(narrow), seed=3, device=device, dtype=torch.bfloat16)


def one_by_one(device: str) -> Callable[[Arithmetic, np.ndarray, np.ndarray], np.ndarray]:
    """Products as a textbook has them: their terms added one after another in float32. A CPU's library sums in lanes and
    blocks, and errs less than any kernel that runs along the axis; torch serves as the loop alone."""

    def contract(self: Arithmetic, a_MK: np.ndarray, b_KN: np.ndarray) -> np.ndarray:
        a, b = (torch.from_numpy(np.ascontiguousarray(x)).to(device) for x in (a_MK, b_KN))
        total = a.new_zeros(*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
        for k in range(a.shape[-1]):
            total.addcmul_(a[..., k : k + 1], b[..., k : k + 1, :])
        return total.cpu().numpy()

    return contract


@cache
def naive(narrow: bool, device: str, dtype: str) -> list[dict[str, np.ndarray]]:
    """The oracle's rounded runs; in float32, where errors are those of sums alone, a second one over naive products."""
    runs = [oracle(narrow, device, DTYPES[dtype])]
    if dtype == "float32":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Arithmetic, "contract", one_by_one(device))
            runs.append(oracle.__wrapped__(narrow, device, DTYPES[dtype]))
    return runs


@cache
def oracle(narrow: bool, device: str, round_to: str | None) -> dict[str, np.ndarray]:
    sizes = config(narrow)
    weights = {
        want.official: model(narrow, device).get_parameter(want.ours).detach().float().cpu().numpy()
        for want in names.expected(sizes).values()
    }
    tables = load_file(Path(__file__).parents[2] / "goldens" / "pos_freq.safetensors")
    width = sizes.decoder.hidden_size
    table = position.frequencies(width).numpy() if narrow else tables[str(width)]
    casts = "none" if round_to is None else "cast"
    return forward(
        official(narrow),
        weights,
        inputs(narrow),
        casts=casts,
        round_to=round_to,
        pos_freq=table,
        keep=lambda stage: not stage.startswith("loss."),
    )


def hold(
    narrow: bool,
    device: torch.device,
    backends: tuple[str, str],
    dtype: str,
    note: Callable[[str, object], None] = lambda name, value: None,
    fault: Fault | None = None,
) -> None:
    """Every stage of one run against the truth; ``fault`` acts in the run."""
    kind = feed.DTYPES[dtype]
    truth, plain = oracle(narrow, device.type, None), naive(narrow, device.type, dtype)
    runner = precision.cast_model(_copy(model(narrow, device.type), narrow, device), kind)
    runner.backend, runner.tower_backend = backends
    tap = Trace()
    recorded = trace.Recorded(runner.config.decoder, tap)
    with torch.inference_mode(), planted(fault, runner) if fault else contextlib.nullcontext():
        runner(feed.batch_of(inputs(narrow)), last_stream=True, tap=recorded)
        recorded.beside_attention()
    found = {"pos.freq": runner.bridge.pos_t.freq_K, **tap.tensors()}
    failures, worst = [], 0.0
    for stage in STAGES.sort(truth):
        if stage not in found:
            failures.append(f"{stage}: missing")
        elif STAGES.is_exact(stage):
            if not np.array_equal(found[stage].cpu().numpy(), truth[stage]):
                failures.append(f"{stage}: differs, and is exact")
        else:
            result = judge(found[stage], truth[stage], [run[stage] for run in plain], kind, stage)
            worst = max(worst, result.ratio)
            note(stage, f"{result.ratio:.3g}")
            if not result.ok:
                failures.append(result.text())
    note("worst error over budget", f"{worst:.3g}")
    assert {"vision.tower", "audio.tower", "vision.llm_norm", "audio.llm_norm", "layer.0.output"} <= truth.keys()
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "tower"), [("eager", "sdpa"), ("flash", "flash"), ("flex", "eager")])
def test_full_width(backend: str, tower: str, dtype: str, device: torch.device, able: Callable, note: Callable) -> None:
    narrow = device.type == "cpu" and os.environ.get("VIDI_REHEARSE") != "full"
    kind = feed.DTYPES[dtype]
    able(backend, dtype=kind, head_dim=config(narrow).decoder.head_dim, softcap=50.0)
    if limits.why_not(backend, dtype=kind, device=device, head_dim=256, softcap=50.0):
        return  # refused, which test_gpu_attention holds it to
    hold(narrow, device, (backend, tower), dtype, note)


def _copy(source: VidiModel, narrow: bool, device: torch.device) -> VidiModel:
    with torch.device(device):
        twin = VidiModel(config(narrow))
    twin.load_state_dict(source.state_dict())
    if not narrow:  # the table is a constant of the model; this machine's exp may be another one
        tables = load_file(Path(__file__).parents[2] / "goldens" / "pos_freq.safetensors")
        for module in (twin.bridge.pos_h, twin.bridge.pos_w, twin.bridge.pos_t):
            module.freq_K = torch.from_numpy(tables[str(2 * len(module.freq_K))])
    return twin
