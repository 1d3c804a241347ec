"""Time of each kernel and variant, as TFLOP/s or TB/s, as a share of the ceiling, and as a ratio to the plain one.

    pytest -m bench --benchmark-json results.json
    python tools/compare_benchmarks.py before.json results.json

pytest-benchmark times whole calls, launches included, with a clock that waits for the device; the ratios use the time on the
device (triton.testing). A decoding step's kernel makes ``calls`` calls and is timed as a graph of them: its figures are one
call's, pytest-benchmark's own table is of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.benchmarks import kernels
from tests.benchmarks.site import Kernel, Site
from tests.not_run import not_run
from vidi.fast import measure
from vidi.fast.floors import Ceilings

ROUNDS = 20


def clock() -> float:
    """Seconds, once the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = [
    pytest.mark.bench,
    pytest.mark.benchmark(timer=clock),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own import of triton parts
]


def kernel_ms(kernel: Kernel, run: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of one call on the device."""
    if kernel.calls > 1 or device.type == "cpu":
        return measure.device_ms(device, run) / kernel.calls
    from triton.testing import do_bench  # what waits for the host cannot be captured

    return do_bench(run, return_mode="median")


def figures(kernel: Kernel, ms: float, plain_ms: float, ceilings: Ceilings) -> dict[str, Any]:
    """What a result says, beside its times: to_floor and to_plain are ratios of times, smaller is better."""
    by_bound = {
        "arithmetic": 1e3 * kernel.flops / ceilings.product_flops,
        "bytes": 1e3 * kernel.nbytes / ceilings.copy_bytes,
    }
    bound = max(by_bound, key=lambda name: by_bound[name])
    return {
        "device_ms": ms,
        "plain_ms": plain_ms,
        "floor_ms": by_bound[bound],
        "bound": bound,
        "tflops": kernel.flops / ms / 1e9,
        "tbytes_per_s": kernel.nbytes / ms / 1e9,
        "share_of_ceiling": by_bound[bound] / ms,
        "to_floor": ms / by_bound[bound],
        "to_plain": ms / plain_ms,
        "ceiling_tflops": ceilings.product_flops / 1e12,
        "ceiling_tbytes_per_s": ceilings.copy_bytes / 1e12,
    }


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name, (_, variants) in kernels.KERNELS.items() for variant in variants]
)
def test_kernel(name: str, variant: str, device: torch.device, ceilings: Ceilings, benchmark: Any) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    kernel = kernels.KERNELS[name][0](Site(device, small=device.type == "cpu"))
    if variant not in kernel.variants:
        not_run(f"{variant} cannot run {name} on {measure.device_name(device)}")
    with torch.inference_mode():
        run = kernel.variants[variant]
        plain_ms, ms = (kernel_ms(kernel, x, device) for x in (kernel.variants["plain"], run))
        benchmark.pedantic(run, rounds=ROUNDS if device.type == "cuda" else 2, warmup_rounds=1)
    benchmark.group = name
    benchmark.extra_info.update(
        kernel=name,
        variant=variant,
        calls=kernel.calls,
        device=measure.device_name(device),
        **figures(kernel, ms, plain_ms, ceilings),
    )
