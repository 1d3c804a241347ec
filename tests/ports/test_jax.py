"""The visual path in JAX, held against the goldens by the port doctor: as it is, under jit, in float64, and with faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ports.doctor import examine, recognised
from tests.ports.environment import interpreter
from tests.ports.planted import Planted

PORT = Path(__file__).parent / "jax_port"
CASE = ["official/single"]
STAGES = 14
#: everything in one jit, as a port in production has it
WHOLE = (
    ("adapter.py", "import jax.numpy as jnp\n", "import jax\nimport jax.numpy as jnp\n"),
    (
        "adapter.py",
        "return model.visual(self.weights, self.config, images, freq)",
        "return jax.jit(lambda p, *x: model.visual(p, self.config, *x))(self.weights, images, freq)",
    ),
)
#: one inside a jitted step, one of a caller between two
FAULTS = Planted(
    "projector_gelu_tanh and frames_backwards",
    (
        (
            "model.py",
            '"model.mm_rand_img_projector.model", x, "0", "2", approximate=False',
            '"model.mm_rand_img_projector.model", x, "0", "2", approximate=True',
        ),
        ("model.py", "fold(pad(x, pool), pool)", "fold(pad(x[::-1], pool), pool)"),
    ),
    {"vision.pad": "wiring", "vision.projector{g}": "stage"},
    frozenset({"bridge.projector_gelu_tanh"}),
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> Path:
    return interpreter("jax", "jax==0.10.2", "jaxlib==0.10.2", "numpy>=2")


def test_every_stage_that_it_has_is_equal(python: Path, tmp_path: Path) -> None:
    """Chained and forced: arrays that cannot be written into, steps under jit hooked from outside."""
    seen = examine(PORT, tmp_path / "port", python, CASE)
    assert (seen.status, seen.compared) == (0, STAGES)
    (case,) = seen.report["cases"]
    assert all(row["forced"] for row in case["stages"])
    assert case["notes"] == []


def test_float64_is_float64(python: Path, tmp_path: Path) -> None:
    """JAX makes float32 of it unless it is told, and a rounding error would be taken for one of code."""
    assert examine(PORT, tmp_path / "port", python, ["small/oneframe"], "--dtype", "float64").status == 0


def test_what_is_inside_a_jit_is_not_run_by_name(python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Planted("jit", WHOLE, {})
    seen = examine(PORT, tmp_path / "port", python, CASE, fault=whole)
    assert (seen.status, seen.compared) == (0, 1)  # what the jitted call returns
    reasons = {gap["stage"]: gap["reason"] for gap in seen.report["cases"][0]["not_run"]}
    for stage in ("vision.tower", "vision.pos_h", "vision.mask"):
        assert "met inside jax.jit" in reasons[stage], stage
    monkeypatch.setenv("JAX_DISABLE_JIT", "1")
    assert examine(PORT, tmp_path / "again", python, CASE, fault=whole).compared == STAGES


def test_two_faults_are_both_named(python: Path, tmp_path: Path) -> None:
    seen = examine(PORT, tmp_path / "port", python, CASE, fault=FAULTS)
    assert seen.guilty == dict(FAULTS.guilty)
    assert seen.status == 1
    assert recognised(tmp_path / "port" / "trace") == FAULTS.known
