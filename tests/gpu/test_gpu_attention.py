"""Attention kernels on a GPU against float64, forward and backward, their errors measured in those of a naive run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.judge import judge
from tests.unit.attention import cases, naive
from tests.unit.attention.cases import Case
from vidi.attention import dispatch, limits
from vidi.attention.call import AttentionCall

pytestmark = [
    pytest.mark.gpu,
    # torch advises TF32 for float32 kernels; parity refuses it.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch's own import of triton parts
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (64, 72, 128, 256)

_SMALL = Case(30, 700, samples=4, head_dim=256, scale=1 / 16, softcap=3.0)
_TEXT = Case(200, 200, samples=3, head_dim=256, scale=1 / 16, softcap=3.0, causal=True)
CASES = {
    "cross": _SMALL,
    "cross-unshared": dataclasses.replace(_SMALL, groups=4),
    "cross-plain": dataclasses.replace(_SMALL, softcap=None),
    "cross-padded": dataclasses.replace(_SMALL, lengths_q=(30, 1, 17, 0), lengths_k=(700, 1, 0, 333)),
    "cross-holes": dataclasses.replace(_SMALL, lengths_q=(30, 1, 17, 30), lengths_k=(700, 1, 0, 333), holes=True),
    "cross-all-silent": dataclasses.replace(_SMALL, lengths_k=(0, 0, 0, 0)),
    "cross-one-query": dataclasses.replace(_SMALL, queries=1, lengths_k=(700, 1, 0, 333)),
    "self": _TEXT,
    "self-window": dataclasses.replace(_TEXT, window=64),
    "self-window-0": dataclasses.replace(_TEXT, window=0),
    "self-window-198": dataclasses.replace(_TEXT, window=198),
    "self-padded-window": dataclasses.replace(_TEXT, own=True, lengths_q=(200, 1, 130), window=64),
    "self-cached-window": dataclasses.replace(_TEXT, queries=7, start=(0, 90, 193), window=64),
    "decode": dataclasses.replace(_TEXT, queries=1, start=(0, 64, 199)),
    "decode-window": dataclasses.replace(_TEXT, queries=1, start=(0, 64, 199), window=64),
}
# What depends on the head dim or the dtype is tried in all of them, the rest in the model's own.
MATRIX = [
    *((name, "bf16", 256) for name in CASES),
    *((name, "bf16", d) for name in ("cross-padded", "self-window") for d in HEAD_DIMS if d != 256),
    *((name, "fp16", d) for name in ("cross-padded", "self-window") for d in (72, 256)),
    *((name, "fp32", d) for name in ("cross-padded", "self-window") for d in (64, 72, 128, 256)),
    ("cross-plain", "fp16", 72),
    ("cross-plain", "fp32", 72),
]


def keep_of(case: Case, options: dict[str, Any], device: torch.device) -> Tensor | None:
    """(B, T, S): which keys each query sees, from the case alone."""
    keep = torch.ones(case.samples, case.queries, case.keys, dtype=torch.bool, device=device)
    if "keep_q" in options and case.queries > 1:
        keep &= options["keep_q"].keep_BL[:, :, None]
    if "keep_k" in options:
        keep &= options["keep_k"].keep_BL[:, None]
    if case.causal:
        start = case.start or (case.keys - case.queries,) * case.samples
        at = torch.tensor(start, device=device)[:, None, None] + torch.arange(case.queries, device=device)[:, None]
        key = torch.arange(case.keys, device=device)
        keep &= key <= at
        if case.window is not None:
            keep &= key >= at - case.window
    return None if bool(keep.all()) else keep


def outcomes(attend: Callable[..., Tensor], tensors: tuple[Tensor, ...], weight: Tensor) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = attend(*inputs)
    return [out, *torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True, materialize_grads=True)]


@functools.lru_cache(maxsize=6)  # the faults planted into two cases share it
def reference(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Any, dict[str, Any], Tensor, Any, Any]:
    """What a kernel is given, the weight of its output in a gradient, what float64 makes of it, and several naive runs."""
    tensors, options = cases.make(case, dtype=dtype, device=device, seed=case.queries + case.keys)
    keep_BTS = keep_of(case, options, device)
    plain = {"scale": case.scale, "softcap": case.softcap}
    weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch.attend(AttentionCall(q, k, v, **options))  # eager, held to NumPy in tests/unit/attention

    def simple(seed: int) -> Callable[..., Tensor]:
        order = torch.randperm(case.keys, generator=torch.Generator().manual_seed(seed)).to(device)
        keep = None if keep_BTS is None else keep_BTS[:, :, order]
        return lambda q, k, v: naive.rounded(q, k[:, order], v[:, order], **plain, keep_BTS=keep)

    truth = outcomes(exact, tuple(x.double() for x in tensors), weight.double())
    runs = [outcomes(simple(seed), tensors, weight) for seed in range(4)]
    if dtype == torch.float32:  # in half precision the rounding of what is stored hides the difference
        runs.append(naive.fused(*tensors, weight, **plain, keep_BTS=keep_BTS))
    return tensors, options, weight, truth, list(zip(*runs, strict=True))


def hold(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    record: Callable[[str, object], None] = lambda name, value: None,
    faulty: Callable[..., Tensor] | None = None,
) -> None:
    """Forward without a gradient, then forward and backward, against float64. ``faulty`` replaces the kernel."""
    tensors, options, weight, truth, base = reference(case, dtype, device)

    def kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dispatch.attend(AttentionCall(q, k, v, **options), backend)

    with torch.no_grad():
        found = {"out": (faulty or kernel)(*tensors)}
    # flash has no gradient through cached keys, flex none on a CPU. A query that sees one key alone has gradients of 0 by
    # cancellation: nothing to measure.
    backward = not (backend == "flash" and case.start) and not (backend == "flex" and device.type == "cpu")
    if backward and case.window != 0:
        names = ("out under grad", "dq", "dk", "dv")
        found |= dict(zip(names, outcomes(faulty or kernel, tensors, weight), strict=True))
    indices = {"out": 0, "out under grad": 0, "dq": 1, "dk": 2, "dv": 3}
    failures = []
    for name, value in found.items():
        wanted, plainly = truth[indices[name]], base[indices[name]]
        rows = options.get("keep_q" if name.startswith(("out", "dq")) else "keep_k")
        if rows is not None:
            assert not value[~rows.keep_BL].any(), f"{name} of rows that are not kept must be exactly 0"
        if not wanted.any():
            assert not value.any(), f"{name} must be exactly 0"
            continue
        result = judge(value, wanted, plainly, dtype, zero_rows=name.startswith("out"))
        record(f"{name}, error over budget", f"{result.ratio:.3g}")
        if not result.ok:
            failures.append(f"{name}: {result.text()}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("name", "dtype", "head_dim"), MATRIX)
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash", "flex"])
def test_kernel(
    backend: str, name: str, dtype: str, head_dim: int, device: torch.device, able: Callable, note: Callable
) -> None:
    case = dataclasses.replace(CASES[name], head_dim=head_dim, scale=head_dim**-0.5)
    if backend == "sdpa":  # it knows no cap: the same case without one
        case = dataclasses.replace(case, softcap=None)
    asked = {"dtype": DTYPES[dtype], "head_dim": head_dim, "softcap": case.softcap}
    able(backend, **asked)
    if limits.why_not(backend, device=device, **asked):
        q = torch.zeros(1, 2, 2, head_dim, dtype=DTYPES[dtype], device=device)
        with pytest.raises(ValueError, match=f"backend '{backend}' cannot .* can$"):
            dispatch.attend(AttentionCall(q, q, q, scale=1.0, softcap=case.softcap), backend)
        return
    hold(case, backend, DTYPES[dtype], device, note)


@pytest.mark.parametrize(("queries", "keys"), [(30, 60_000), (1, 60_000), (1, 126_000)])
@pytest.mark.parametrize("backend", ["eager", "flash", "flex"])
def test_long_keys_of_the_full_model(
    backend: str, queries: int, keys: int, device: torch.device, able: Callable, note: Callable
) -> None:
    """16 heads over 8, head dim 256, cap 50 with scores that reach it: a video of 300 frames, and an hour."""
    able(backend, dtype=torch.bfloat16, head_dim=256, softcap=50.0)
    if device.type == "cpu":
        keys = 2_000
    generator = torch.Generator(device).manual_seed(keys)
    tensors = [
        (torch.randn(1, length, heads, 256, generator=generator, device=device) * 1.5).to(torch.bfloat16)
        for length, heads in ((queries, 16), (keys, 8), (keys, 8))
    ]
    options = {"scale": 1.0, "softcap": 50.0}
    with torch.no_grad():
        out = dispatch.attend(AttentionCall(*tensors, **options), backend)
        truth = dispatch.attend(AttentionCall(*(x.double() for x in tensors), **options))
        plain = naive.rounded(*tensors, **options)
    result = judge(out, truth, [plain], torch.bfloat16)
    note("error over budget", f"{result.ratio:.3g}")
    assert result.ok, result.text()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["cross-padded", "cross-holes", "self-padded-window"])
@pytest.mark.parametrize("backend", ["eager", "sdpa", "flash", "flex"])
def test_what_is_not_kept_never_matters(
    backend: str, name: str, grad: bool, device: torch.device, able: Callable
) -> None:
    case = dataclasses.replace(CASES[name], softcap=None if backend == "sdpa" else CASES[name].softcap, head_dim=64)
    able(backend, dtype=torch.bfloat16, head_dim=64, softcap=case.softcap)
    tensors, options = cases.make(case, dtype=torch.bfloat16, device=device)
    dirty = [x.clone() for x in tensors]
    for x, keep in zip(dirty, ("keep_q", "keep_k", "keep_k"), strict=True):
        x[~options[keep].keep_BL] = torch.nan
    with torch.set_grad_enabled(grad):
        clean, marked = (
            dispatch.attend(
                AttentionCall(*(x.requires_grad_(grad and device.type == "cuda") for x in xs), **options), backend
            )
            for xs in (tensors, dirty)
        )
    assert torch.equal(clean, marked)
    assert not marked[~options["keep_q"].keep_BL].any()


@pytest.mark.parametrize("name", ["cross", "cross-padded", "self-window"])
def test_flash_gradients_repeat_bit_for_bit(name: str, device: torch.device, able: Callable) -> None:
    able("flash", dtype=torch.bfloat16, head_dim=256)
    tensors, options = cases.make(CASES[name], dtype=torch.bfloat16, device=device)
    weight = torch.randn_like(tensors[0])
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            outcomes(lambda q, k, v: dispatch.attend(AttentionCall(q, k, v, **options), "flash"), tensors, weight)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [8, 63, 64])
@pytest.mark.parametrize("backend", ["eager", "flash", "flex"])
def test_a_window_is_w_plus_1_keys(backend: str, window: int, device: torch.device, able: Callable) -> None:
    """Equal scores, and values that are 1 at one key alone: the output is 1 / (w + 1) where that key is seen."""
    able(backend, dtype=torch.float16, head_dim=64)
    length = 130
    q = torch.zeros(1, length, 2, 64, dtype=torch.float16, device=device)
    v = torch.zeros_like(q)
    v[:, 5] = 1
    out = dispatch.attend(
        AttentionCall(q, q, v, scale=1.0, q_pos_BT=torch.arange(length, device=device)[None], window=window), backend
    )[0, :, 0, 0]
    assert out.nonzero().flatten().tolist() == list(range(5, min(5 + window + 1, length)))
    late = range(window, 5 + window + 1)
    assert all(abs(out[t].item() * (window + 1) - 1) < 2**-9 for t in late if t >= 5)


def test_a_decoding_step_is_captured_in_a_graph(device: torch.device, able: Callable) -> None:
    """Lengths move in device memory between replays; nothing waits for the host."""
    able("flash", dtype=torch.bfloat16, head_dim=256)
    own, own_options = cases.make(CASES["decode-window"], dtype=torch.bfloat16, device=device)
    cross, cross_options = cases.make(CASES["cross-one-query"], dtype=torch.bfloat16, device=device)
    pos_BT = own_options.pop("q_pos_BT")
    with torch.no_grad():

        def step() -> tuple[Tensor, Tensor]:
            return (
                dispatch.attend(AttentionCall(*own, **own_options, q_pos_BT=pos_BT), "flash"),
                dispatch.attend(AttentionCall(*cross, **cross_options), "flash"),
            )

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for start in ((0, 64, 199), (7, 100, 3)):
            pos_BT.copy_(torch.tensor(start, device=device)[:, None])
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_flash_refuses_what_its_kernels_lack(device: torch.device, able: Callable) -> None:
    able("flash", dtype=torch.bfloat16, head_dim=64)
    for dtype, head_dim, text in (
        (torch.float32, 64, "compute in float32"),
        (torch.float64, 64, "compute in float64"),
        (torch.bfloat16, 160, "take heads of 160"),
        (torch.bfloat16, 264, "take heads of 264"),
    ):
        q = torch.zeros(1, 2, 2, head_dim, dtype=dtype, device=device)
        with pytest.raises(ValueError, match=f"'flash' cannot {text}.*'eager'"):
            dispatch.attend(AttentionCall(q, q, q, scale=1.0), "flash")


@pytest.mark.parametrize("backend", ["flash", "flex"])
@pytest.mark.parametrize("head_dim", [4, 16, 40])
def test_small_heads(backend: str, head_dim: int, device: torch.device, able: Callable) -> None:
    """The embedded checkpoints have heads of 4, 8 and 16: padded by flash-attn, and by us for flex."""
    able(backend, dtype=torch.bfloat16, head_dim=head_dim, softcap=3.0)
    hold(dataclasses.replace(CASES["cross-padded"], head_dim=head_dim, scale=0.5), backend, torch.bfloat16, device)
