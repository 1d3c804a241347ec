"""Our own model with its steps under `torch.compile`, as a port: the compiler is what is judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.ports.doctor import examine
from tests.ports.planted import Planted

PORT, PYTHON = Path(__file__).parent / "compiled_port", Path(sys.executable)
pytestmark = pytest.mark.slow

REWRITES = """
def rewrites_gelu(graph, inputs):
    for node in graph.graph.nodes:
        if node.target is torch.nn.functional.gelu:
            node.kwargs = {**node.kwargs, "approximate": "tanh"}
    graph.recompile()
    return graph.forward


BACKEND = rewrites_gelu
"""
#: a compiler that takes the fast GELU for the exact one: everything that has the exact one, and nothing else
MISCOMPILED = Planted(
    "gelu_rewritten",
    (("adapter.py", 'BACKEND = os.environ.get("COMPILED_PORT_BACKEND", "inductor")\n', REWRITES),),
    {"audio.tower": "stage", "vision.projector{g}": "stage", "audio.projector": "stage"},
    frozenset({"towers.whisper_gelu_tanh", "bridge.projector_gelu_tanh"}),
    "official/single",
)


@pytest.mark.parametrize(("backend", "case"), [("inductor", "official/single"), ("aot_eager", "small/base")])
def test_every_stage_is_equal(backend: str, case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_PORT_BACKEND", backend)
    assert examine(PORT, tmp_path / "port", PYTHON, [case], "--require", "all").status == 0


def test_a_wrong_rewrite_is_named(tmp_path: Path) -> None:
    seen = examine(PORT, tmp_path / "port", PYTHON, [MISCOMPILED.case], fault=MISCOMPILED)
    assert seen.guilty == dict(MISCOMPILED.guilty)
    assert seen.kinds == {"stage", "inherited"}
