"""Vidi in MLX, held against the goldens by the port doctor: as it is, with faults, with 8-bit weights, with faults in those."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ports import faults_mlx as faults
from tests.ports.doctor import examine, recognised
from tests.ports.environment import interpreter
from tests.ports.planted import Planted
from vidi.parity.faults import FAULTS

PORT = Path(__file__).parent / "mlx_port"
BUDGET = ("--budget", str(PORT / "budget.toml"))
CASES = (
    "official/single",
    "official/batch",
    "official/silent",
    "small/base",
    "small/budget",
    "small/holes",
    "small/absent",
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> Path:
    """MLX on a CPU is two packages, and the second is for Linux."""
    return interpreter("mlx", "mlx==0.32.4", "mlx-cpu==0.32.4", "numpy>=2")


def test_every_stage_that_it_has_is_equal(python: Path, tmp_path: Path) -> None:
    """All but the unpadded tensors of varlen kernels, which MLX does not have."""
    seen = examine(
        PORT, tmp_path / "port", python, CASES, "--require", "80%,padding,resize,window,several videos,silent modality"
    )
    assert seen.status == 0
    lacking = [gap["stage"] for case in seen.report["cases"] for gap in case["not_run"]]
    assert lacking
    assert all(".unpad." in stage for stage in lacking)


@pytest.mark.parametrize("fault", [*faults.FLOAT32, *faults.RECORDED, *faults.TOGETHER], ids=lambda fault: fault.name)
def test_a_fault_is_named(fault: Planted, python: Path, tmp_path: Path) -> None:
    seen = examine(PORT, tmp_path / "port", python, [fault.case], fault=fault)
    assert seen.guilty == dict(fault.guilty)
    assert seen.kinds <= {*fault.guilty.values(), "inherited", "chained"}
    assert seen.status == (2 if set(fault.guilty.values()) == {"tracing"} else 1)
    assert recognised(tmp_path / "port" / "trace") == fault.known


def test_eight_bits_are_within_what_their_steps_allow(python: Path, tmp_path: Path) -> None:
    cases = CASES[:2]
    seen = examine(PORT, tmp_path / "port", python, cases, *BUDGET, adapter="adapter8.py")
    assert seen.status == 0
    undeclared = examine(PORT, tmp_path / "undeclared", python, cases, adapter="adapter8.py")
    assert undeclared.status == 1
    assert undeclared.compared == seen.compared
    # What has no weights in 8 bits is still held to float32.
    rules = {row["stage"]: row["forced"]["rule"] for row in seen.report["cases"][1]["stages"] if row["forced"]}
    assert {rules[stage] for stage in ("vision.tower", "vision.norm", "vision.pos_t", "rope.cos", "final.norm")} == {
        "float32-recorded"
    }


@pytest.mark.parametrize("fault", faults.QUANTISED, ids=lambda fault: fault.name)
def test_a_fault_among_eight_bits_is_named(fault: Planted, python: Path, tmp_path: Path) -> None:
    seen = examine(PORT, tmp_path / "port", python, [fault.case], *BUDGET, adapter="adapter8.py", fault=fault)
    assert seen.guilty == dict(fault.guilty)
    assert seen.status == 1


def test_what_eight_bits_hide_float32_shows(python: Path, tmp_path: Path) -> None:
    """A tanh GELU in the projectors moves them by a tenth of what a step of 8 bits does: why float32 comes first."""
    fault = faults.BY_NAME["projector_gelu_tanh"]
    case = ["official/single"]
    assert examine(PORT, tmp_path / "8", python, case, *BUDGET, adapter="adapter8.py", fault=fault).status == 0
    assert examine(PORT, tmp_path / "32", python, case, fault=fault).guilty == dict(fault.guilty)


def test_known_faults_are_called_by_their_names() -> None:
    assert {name for fault in (*faults.FLOAT32, *faults.QUANTISED) for name in fault.known} <= set(FAULTS)
