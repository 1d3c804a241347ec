"""Tensors of any library as NumPy arrays, and back. Nothing is imported that the caller has not imported already."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["like", "to_numpy"]


def to_numpy(x: Any) -> tuple[np.ndarray, str]:
    """(array, name of the dtype that it had): bfloat16, which NumPy lacks, comes as float32. The array may share memory.

    x: a NumPy array, a torch tensor on any device, or whatever `numpy.asarray` takes.
    """
    if hasattr(x, "detach") and hasattr(x, "cpu"):
        x = x.detach().cpu()
        name = str(x.dtype).removeprefix("torch.")
        return (x.float() if name == "bfloat16" else x).numpy(), name
    array = np.asarray(x)
    return array, array.dtype.name


def like(array: np.ndarray, x: Any) -> Any:
    """A golden in the kind of ``x``: its library, dtype and device."""
    if hasattr(x, "detach") and hasattr(x, "new_tensor"):
        # Through a copy of the array: `new_tensor` would go through a list where the dtype is not the tensor's own.
        import torch

        return torch.from_numpy(np.array(array)).to(dtype=x.dtype, device=x.device)
    return np.asarray(array).astype(np.asarray(x).dtype)
