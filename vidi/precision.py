"""Where the forward pass leaves the model's dtype (spec §5, §7).

Steps that the specification fixes to float32 are written as promotion to *at least* float32: in a bf16 or fp16 model
they are the specified casts, in a float64 model they vanish and the same code is pure mathematics.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

__all__ = ["at_least_float32", "cast_model", "promoted", "sqrt_in"]

M = TypeVar("M", bound=nn.Module)


def promoted(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a "float32 step" inside a model of ``dtype``."""
    return torch.promote_types(dtype, torch.float32)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(promoted(x.dtype))


def sqrt_in(value: int, dtype: torch.dtype) -> float:
    """sqrt(value) rounded to ``dtype``: the factor on embeddings is 59.75 in bf16 and 59.875 in fp16 at D = 3584 (§6)."""
    return torch.tensor(value, dtype=torch.float64).sqrt().to(dtype).item()


def cast_model(model: M, dtype: torch.dtype) -> M:
    """Cast ``model`` in place to ``dtype``, its position MLPs to at least float32 (§5), those of the 7B through ``dtype``.
    Returns the model."""
    wide = {id(p): m for m in model.modules() if getattr(m, "at_least_float32", False) for p in m.parameters()}
    for parameter in model.parameters():
        module = wide.get(id(parameter))
        if module is None or getattr(module, "rounded", False):
            parameter.data = parameter.data.to(dtype)
        if module is not None:
            parameter.data = parameter.data.to(promoted(dtype))
    return model
