"""Three graphs that torch exported from our model, run by ONNX Runtime in an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.ports.doctor import examine
from tests.ports.environment import folder_of, interpreter
from tests.ports.planted import Planted

PORT = Path(__file__).parent / "onnx_port"
CASE = ["official/single"]
FAULTS = (
    Planted(
        "frames_backwards_between_graphs",
        (("adapter.py", "self.bridge(features=features)", "self.bridge(features=features[::-1].copy())"),),
        {"vision.pad": "wiring"},
    ),
    Planted(
        "factor_forgotten",
        (("adapter.py", '["vision.llm_norm"] * self.root', '["vision.llm_norm"]'),),
        {"layer.0.image_input": "stage"},
    ),
    Planted(
        "pixels_from_zero",
        (("adapter.py", 'model(inputs["images.0"])', 'model((inputs["images.0"] + 1) / 2)'),),
        {"vision.tower": "stage"},
    ),
)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def python() -> Path:
    return interpreter("onnx", "onnxruntime>=1.22,<2", "numpy>=2")


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter beside graphs that were exported here."""
    return _exported(tmp_path_factory.mktemp("graphs"))


def _exported(folder: Path, before: str = "") -> Path:
    """Export in an interpreter of its own, after the statements ``before``: a fault that the graphs are to hold."""
    packages = folder_of("onnx-export", "onnx", "onnxscript", "onnx_ir", "ml_dtypes", "protobuf")
    code = f"{before}\nfrom pathlib import Path\nfrom tests.ports.onnx_port import export\nexport.export(Path({str(folder)!r}))"
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{packages}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder / "adapter.py").write_text((PORT / "adapter.py").read_text())
    return folder


def test_every_stage_of_the_graphs_is_equal(port: Path, python: Path, tmp_path: Path) -> None:
    seen = examine(port, tmp_path / "port", python, CASE)
    assert (seen.status, seen.compared) == (0, 21)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_between_graphs_is_named(fault: Planted, port: Path, python: Path, tmp_path: Path) -> None:
    seen = examine(port, tmp_path / "port", python, CASE, fault=fault)
    assert seen.guilty == dict(fault.guilty)
    assert seen.status == 1


def test_a_fault_inside_a_graph_is_named(python: Path, tmp_path: Path) -> None:
    """Nothing can be put in the place of what lies inside: what feeds a stage there is equal, and that tells."""
    wrong = _exported(
        tmp_path / "graphs",
        "import torch.nn.functional as nnf\nfrom vidi.bridge.projector import Projector\n"
        "Projector.forward = lambda self, x: self.fc2(nnf.gelu(self.fc1(x), approximate='tanh'))",
    )
    seen = examine(wrong, tmp_path / "port", python, CASE)
    assert seen.guilty == {"vision.projector{g}": "stage"}
    assert "vision.norm" in {row["stage"] for row in seen.report["cases"][0]["stages"] if not row["ok"]}
