"""The released size: both bfloat16 paths against the stored case, the plain one within its stored error, the fast one within 1.2
times the plain one's; and faults of both that the first must see."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import cache

import pytest
import torch

from stageparity.faults.plant import Fault
from tests.not_run import not_run
from vidi.model import VidiModel
from vidi.parity import faults, full

pytestmark = pytest.mark.full


@cache
def _case() -> tuple[full.FullCase, VidiModel]:
    case = full.FullCase(device="cuda")
    return case, case.build()


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    yield
    _case.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture
def needed(device: torch.device) -> None:
    if device.type != "cuda":
        not_run("the full-size model needs a GPU of 80 GB")


@pytest.mark.usefixtures("needed")
def test_both_paths_at_full_size() -> None:
    case, model = _case()
    found = full.FullRun(tuple(case.judge(*case.passes(model))), "GPU", case.goldens)
    assert case.noise
    assert found.exit_code == 0, found.text()


@pytest.mark.usefixtures("needed")
@pytest.mark.parametrize(("stage", "name"), [(stage, name) for stage, own in full.SHARED.items() for name in own])
def test_a_fault_of_both_paths_is_seen_in_both(stage: str, name: str) -> None:
    case, model = _case()
    change, fault = full.SHARED[stage][name], None
    if change is None:
        fault = faults.FAULTS[name]
    else:
        model = case.build(change(case.config))
    assert isinstance(fault, Fault) == (change is None)
    plain, fast = case.passes(model, fault, upto=stage)
    assert (case.first_over(plain), case.first_over(fast)) == (stage, stage)
