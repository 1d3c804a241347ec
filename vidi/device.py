"""Where a command runs: the name of a device, checked before anything expensive."""

from __future__ import annotations

import torch

__all__ = ["check"]


def check(name: str) -> torch.device:
    """The device of that name. Raises ValueError where the name is none, or this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"{name!r} is no device; use cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: this machine shows {count} CUDA devices to torch {torch.__version__}")
    elif device.type != "cpu":
        raise ValueError(f"--device {name}: runs on cpu and cuda")
    return device
