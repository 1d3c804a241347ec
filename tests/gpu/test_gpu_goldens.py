"""Every embedded golden on the GPU: float32 in IEEE precision, bf16 and fp16, with every attention backend."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from goldens.oracle import forward
from tests.gpu.judge import MEASURE
from tests.not_run import not_run
from vidi.bridge import position
from vidi.parity import feed, fingerprint, ids, store, suite, tolerance
from vidi.parity.compare import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

GOLDENS = Path(__file__).parents[2] / "goldens"
CASES = [(ref.set, ref.name) for ref in suite.select(GOLDENS)]
# Decoder and tower backends. sdpa knows no softcap: it serves towers alone.
BACKENDS = {
    "eager": ("eager", "eager"),
    "sdpa in the towers": ("eager", "sdpa"),
    "flash": ("flash", "flash"),
    "flex": ("flex", "flex"),
}
DTYPES = ("float32", "bfloat16", "float16")
# The recordings hold float32. What a half-precision run may differ by from them is measured with the oracle, which has no
# gradients; sums over the tensors kept as samples assume independent errors, which rounding to half is not. So one
# recording stands for them in half precision, and the small cases do the rest.
HALVES = {"bfloat16": "bf16", "float16": "fp16"}
IN_HALF = [case for case in CASES if case[0] == "small" or case[1] == "single"]
RUNS = [
    (name, backend, dtype)
    for dtype in DTYPES
    for backend in BACKENDS
    for name in (IN_HALF if dtype in HALVES else CASES)
    if not (backend == "flash" and dtype == "float32")
]


def run(name: tuple[str, str], backends: tuple[str, str], dtype: str, device: torch.device) -> suite.CaseRun:
    case = store.open_case(GOLDENS / name[0], name[1])
    model = feed.load_model(case, feed.DTYPES[dtype], device, backends[0])
    model.tower_backend = backends[1]
    tolerances = tolerance.load(GOLDENS)
    if name[0] == "official" and dtype in HALVES:
        measured = {dtype: {case.name: baselines(name, dtype)}}
        tolerances = dataclasses.replace(tolerances, baselines=measured)
    return suite.run_case(case, model, tolerances, dtype=dtype)[0]


@cache
def baselines(name: tuple[str, str], dtype: str) -> dict[str, dict[str, float]]:
    """Stage -> worst error of naive runs in ``dtype`` against the recording, in two orders of summation."""
    case = store.open_case(GOLDENS / name[0], name[1])
    inputs = {key: np.asarray(case.inputs[key]) for key in case.inputs}
    naive = [
        forward(
            case.config,
            case.weights(),
            inputs,
            casts="official",
            round_to=HALVES[dtype],
            order_seed=order,
            pos_freq=position.frequencies(case.config["hidden_size"]).numpy(),
        )
        for order in (None, 1)
    ]
    return {
        stage: tolerance.baseline_of([compare(stage, run[stage], golden, MEASURE) for run in naive])
        for stage, golden in case.targets.items()
        if not ids.is_exact(stage) and stage in naive[0]
    }


@pytest.mark.parametrize(
    ("name", "backend", "dtype"), RUNS, ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "/".join(x)
)
def test_golden(
    name: tuple[str, str],
    backend: str,
    dtype: str,
    device: torch.device,
    able: Callable,
    record_property: Callable,
) -> None:
    """Chained from raw inputs and each stage alone; every budget is the harness's own."""
    if device.type == "cpu" and backend == "flex":
        not_run("flex has no gradient on a CPU, and some cases need one")
    able(backend.split()[0], dtype=feed.DTYPES[dtype], head_dim=16)
    fingerprint.assert_ieee()
    done = run(name, BACKENDS[backend], dtype, device)
    compared = [r for row in done.rows for r in row.results]
    record_property("stages", len(done.rows))
    record_property("worst error over budget", f"{max((r.ratio for r in compared), default=0):.3g}")
    assert compared, f"nothing was compared: {done.not_run}"
    assert not done.not_run, done.not_run
    assert not [r for r in compared if not r.ok], "\n".join(r.text() for r in compared if not r.ok)


def test_tf32_is_seen(device: torch.device) -> None:
    """The switch that parity turns off is a fault that it would notice: float32 stages leave their budgets."""
    if device.type == "cpu":
        not_run("TF32 is a mode of GPUs")
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        done = run(("small", "base"), ("eager", "eager"), "float32", device)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert done.first_divergence is not None


def test_position_table_of_the_device(device: torch.device) -> None:
    """The model's frequencies are the stored table, bit for bit, wherever the model lives; the device's own exp is
    not: at the far end of time, 1 unit in the last place of a frequency is 6e-4 rad."""
    stored = load_file(GOLDENS / "pos_freq.safetensors")
    assert stored, "the stored table is empty"
    for name, table in stored.items():
        width = 2 * len(table)
        golden = torch.from_numpy(table)
        assert torch.equal(position.frequencies(width), golden), name
        moved = position.PositionEmbedding(width, 10_000).to(device)
        assert torch.equal(moved.freq_K.cpu(), golden), name
        assert position.frequencies(width).device.type == "cpu"
        with torch.device(device):  # a model built straight on the device has the same table
            assert torch.equal(position.frequencies(width).cpu(), golden), name
        even = torch.arange(0, width, 2, dtype=torch.float32, device=device)
        own = torch.exp(even * (-torch.tensor(10000.0).log().item() / width)).cpu()
        assert (own / golden - 1).abs().max() < 1e-6, f"{name}: the device's exp is not an exp"
