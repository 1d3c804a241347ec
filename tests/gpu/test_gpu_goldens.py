"""Every embedded golden on the GPU: float32 in IEEE precision, bf16 and fp16, with every attention backend."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from stageparity import fingerprint, store, tolerance
from stageparity import run as runs
from tests.not_run import not_run
from vidi.bridge import position
from vidi.parity import feed
from vidi.parity.stages import STAGES
from vidi.parity.subject import VidiSubject

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own import of triton parts
]

GOLDENS = Path(__file__).parents[2] / "goldens"
CASES = [(ref.set, ref.name) for ref in store.select(GOLDENS)]
# Decoder and tower backends. sdpa knows no softcap: of a 9B it serves the towers alone.
BACKENDS = {
    "eager": ("eager", "eager"),
    "sdpa in the towers": ("eager", "sdpa"),
    "sdpa": ("sdpa", "sdpa"),
    "flash": ("flash", "flash"),
    "flex": ("flex", "flex"),
}
DTYPES = ("float32", "bfloat16", "float16")
RUNS = [
    (name, backend, dtype)
    for dtype in DTYPES
    for backend in BACKENDS
    for name in CASES
    if not (backend == "flash" and dtype == "float32") and (backend != "sdpa" or name[0].endswith("-7b"))
]


def run(name: tuple[str, str], backends: tuple[str, str], dtype: str, device: torch.device) -> runs.CaseRun:
    case = store.open_case(GOLDENS / name[0], name[1])
    model = feed.load_model(case, feed.DTYPES[dtype], device, backends[0])
    model.tower_backend = backends[1]
    subject = VidiSubject(dtype, device=str(device), backend=backends[0])
    return runs.run_case(subject, case, model, tolerance.load(GOLDENS, STAGES))[0]


@pytest.mark.parametrize(
    ("name", "backend", "dtype"), RUNS, ids=lambda x: x.replace(" ", "-") if isinstance(x, str) else "/".join(x)
)
def test_golden(
    name: tuple[str, str],
    backend: str,
    dtype: str,
    device: torch.device,
    able: Callable,
    note: Callable,
) -> None:
    """Chained from raw inputs and each stage alone; every budget is the harness's own."""
    if device.type == "cpu" and backend == "flex":
        not_run("flex has no gradient on a CPU, and some cases need one")
    able(backend.split()[0], dtype=feed.DTYPES[dtype], head_dim=16)
    fingerprint.assert_ieee()
    done = run(name, BACKENDS[backend], dtype, device)
    compared = [r for row in done.rows for r in row.results]
    note("stages", len(done.rows))
    # A stage that is the machine's doing, its table of frequencies, is equal or not, and has no ratio.
    note("worst error over budget", f"{max((r.ratio for r in compared if math.isfinite(r.ratio)), default=0):.3g}")
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


@pytest.mark.parametrize("width", ["24", "64", "3584"])
def test_position_table_of_the_device(width: str, device: torch.device, note: Callable) -> None:
    """The model's table against the stored one. Machines differ in exp by one unit in the last place of a few entries,
    3e-4 rad at the far end of time, so a run is held to goldens over their own table; more would be another formula.
    """
    stored = torch.from_numpy(load_file(GOLDENS / "pos_freq.safetensors")[width])
    with torch.device(device):  # a model built straight on the device has the CPU's table
        own = position.frequencies(int(width))
    moved = position.PositionEmbedding(int(width), 10_000).to(device).freq_K
    assert torch.equal(own.cpu(), moved.cpu())
    even = torch.arange(0, int(width), 2, dtype=torch.float32, device=device)
    on_device = torch.exp(even * (-math.log(10000.0) / int(width))).cpu()
    for name, table in (("CPU of this machine", own.cpu()), ("device", on_device)):
        ulps = (table.view(torch.int32) - stored.view(torch.int32)).abs()
        note(f"{name}: entries that differ from the stored table", int((ulps > 0).sum()))
        assert ulps.max() <= (1 if name != "device" else 2), f"{name}: {int(ulps.max())} units in the last place"
