"""Where the forward pass leaves the model's dtype (spec §5 to §7)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests import seven, tiny
from vidi import precision


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 59.75), (torch.float16, 59.875), (torch.float64, 3584**0.5)]
)
def test_the_factor_on_embeddings_is_rounded_to_the_models_dtype(dtype, factor):
    found = precision.sqrt_in(3584, dtype)
    assert (type(found), found) == (float, factor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_position_mlps_stay_at_least_float32(dtype):
    model = precision.cast_model(copy.deepcopy(tiny.model()), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (wide if ".pos_" in name else dtype), name
    assert model.bridge.pos_t.freq_K.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_position_mlps_keep_every_bit(dtype):
    """A float32 checkpoint's are used as they are; those of the 7B pass through the model's dtype, as in its loader."""
    for plain, rounded in ((tiny.model(), False), (seven.model(), True)):
        given = {name: x.detach().float() for name, x in plain.named_parameters() if ".pos_" in name}
        model = precision.cast_model(copy.deepcopy(plain).float(), dtype)
        found = {name: x for name, x in model.named_parameters() if name in given}
        assert len(found) >= 4
        for name, x in found.items():
            assert torch.equal(x, given[name].to(dtype).float() if rounded else given[name]), name
            assert rounded or not torch.equal(x, x.to(dtype).float()), name


class Dtypes(TorchDispatchMode):
    """The floating dtypes that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[torch.dtype, set[str]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                self.seen.setdefault(x.dtype, set()).add(str(func))
        return out


def test_a_float64_model_computes_nothing_in_float32():
    """Pure mathematics: no operation of the whole pass gives a float32 tensor, save reading the table of frequencies."""
    batch = tiny.make([tiny.sample(12, 3, 60)])
    with Dtypes() as dtypes:
        out = tiny.model()(batch)
    assert out.dtype == torch.float64
    assert dtypes.seen.get(torch.float32, set()) <= {
        "aten.unsqueeze.default",
        "aten.slice.Tensor",
        "aten.detach.default",
    }
    assert torch.bfloat16 not in dtypes.seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_stage_of_a_half_precision_model_is_in_its_dtype(dtype):
    model = precision.cast_model(copy.deepcopy(tiny.model()), dtype)
    sample = tiny.sample(12, 3, 60)
    seen = tiny.Seen()
    out = model(tiny.make([sample]).to(dtype=dtype), last_stream=True, tap=seen)
    assert out.dtype == dtype
    real = {stage: x.dtype for stage, x in seen.items() if x.is_floating_point()}
    assert len(real) > 60
    assert {stage for stage, kind in real.items() if kind != dtype} == set()
