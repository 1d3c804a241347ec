"""What a port's tracer keeps of a tensor on a GPU is what the harness keeps of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stageparity import sketch
from stageparity.golden import Sketched
from stageparity.port import sketched, stagetrace
from vidi.parity.stages import STAGES

pytestmark = pytest.mark.gpu

#: several blocks, the last not full; fewer rows than one; wider than a CPU projects at once
SHAPES = [(1, 9000, 384), (1, 25, 1152), (1, 30, 20_000)]
STAGE = "layer.0.output"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_tracers_sketch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, note: Callable) -> None:
    """Blocks within float32's own sums; entries and largest values bit for bit."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    truth = x.double().numpy().reshape(-1, shape[-1])
    spec = sketch.SketchSpec(block_rows=4096, column_buckets=128)
    wanted = sketch.make(truth, spec)
    rule = sketched.rule_of({STAGE: Sketched(shape, "float32", wanted)}, STAGES)
    found = stagetrace._copied(stagetrace.Sketcher(rule)(STAGE, x.to(device)))
    error = np.linalg.norm(found["blocks"] - wanted.blocks) / np.linalg.norm(wanted.blocks)
    note("blocks, of their norm", f"{error:.2g}")
    assert error < 3e-7
    for name in ("block_max", "top_value", "sample_value"):
        np.testing.assert_array_equal(found[name], getattr(wanted, name), name)
    spoiled = x.clone()
    spoiled[0, -1, 5] = torch.nan
    parts = stagetrace.Sketcher(rule)(STAGE, spoiled.to(device))
    assert not parts["block_max"].isfinite().all()
