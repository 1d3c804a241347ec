"""What a run ran on, and the precision switches that parity sets and asserts.

cuDNN convolutions use TF32 by default on a GPU, matrix products may reduce in half precision: a run that is held against
goldens computes in IEEE precision, and says so. For models in torch: this module loads it.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["assert_ieee", "fingerprint", "ieee"]

_MATMUL = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


@contextmanager
def ieee() -> Iterator[None]:
    """IEEE precision for matrix products and convolutions inside the block; the switches are put back after it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = {name: getattr(matmul, name) for name in _MATMUL}, cudnn.allow_tf32
    try:
        for name in _MATMUL:
            setattr(matmul, name, False)
        cudnn.allow_tf32 = False
        assert_ieee()
        yield
    finally:
        for name, value in before[0].items():
            setattr(matmul, name, value)
        cudnn.allow_tf32 = before[1]


def assert_ieee() -> None:
    """Raises RuntimeError naming every switch that is not at IEEE precision."""
    on = [f"torch.backends.cuda.matmul.{n}" for n in _MATMUL if getattr(torch.backends.cuda.matmul, n)]
    if torch.backends.cudnn.allow_tf32:
        on.append("torch.backends.cudnn.allow_tf32")
    if on:
        raise RuntimeError(f"reduced precision is on: {', '.join(on)}; parity needs IEEE precision")


def fingerprint(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions of loaded libraries, the machine, threads, and the precision switches, as plain values."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    loaded = ("torch", "numpy", "h5py", "safetensors", "flash_attn", "triton", "transformers")
    libraries = {n: getattr(sys.modules[n], "__version__", "?") for n in loaded if n in sys.modules}
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "libraries": libraries,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "isa_limits": {
            n: os.environ[n] for n in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if n in os.environ
        },
        "matmul": {name: bool(getattr(torch.backends.cuda.matmul, name)) for name in _MATMUL},
        "cudnn_allow_tf32": bool(torch.backends.cudnn.allow_tf32),
    }
