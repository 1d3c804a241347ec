"""The fast path on a GPU: every kernel against its float64 twin, the model at full width, the graph, 256 cached tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.judge import judge
from vidi import generate, precision
from vidi.checkpoint import synthetic
from vidi.config import DecoderConfig, VidiConfig
from vidi.fast import accelerate, ops, plan, twins
from vidi.fast.operands import Affine, GemmaWeight, Head, Keys, LayerNorm, Queries, Residual, Rotation, Scores
from vidi.inputs import pixels
from vidi.inputs.batch import Batch

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROWS = "layer.0.output"  # a stage id that says: (B, T, D), rows are tokens


class Case:
    """Random inputs of one dtype on the device, and the three runs that a judgement needs."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        self.device, self.dtype = device, dtype
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, *shape: int, scale: float = 1.0, base: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=self.random) * scale + base).to(self.device, self.dtype)

    def residual(self, x: Tensor, branches: Tensor | None) -> Residual:
        width = x.shape[-1]
        post = None if branches is None else GemmaWeight(self.draw(width, scale=0.1, base=-0.5), 1e-6)
        return Residual(x, branches, post, GemmaWeight(self.draw(width, scale=0.1), 1e-6))

    def judge(self, name: str, outputs: Callable[..., list[Tensor]], *args: object) -> None:
        """Run ``name`` of the device's operations and of the twins (this dtype, and float64 on the CPU).

        ``outputs``: what it writes of its arguments. It starts poisoned (NaN) unless it is an input too (finite).
        """

        def copied(x: Any, dtype: torch.dtype, device: torch.device) -> Any:
            if isinstance(x, Tensor):
                return x.to(device=device, dtype=_own(x, dtype), copy=True)
            if not dataclasses.is_dataclass(x):
                return x
            parts = {f.name: copied(getattr(x, f.name), dtype, device) for f in dataclasses.fields(x)}
            return dataclasses.replace(x, **parts)  # type: ignore[type-var]

        runs = []
        for module, dtype, device in (
            (ops.pick(self.device), self.dtype, self.device),
            (twins, torch.float64, torch.device("cpu")),
            (twins, self.dtype, self.device),
        ):
            given = [copied(x, dtype, device) for x in args]
            getattr(module, name)(*given)
            runs.append(outputs(*given))
        for found, truth, naive in zip(*runs, strict=True):
            shape = (1, -1, truth.shape[-1])
            result = judge(found.reshape(shape), truth.reshape(shape), [naive.reshape(shape)], self.dtype, ROWS)
            assert result.ok, f"{name}: {result.text()}"


def _own(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Integers keep theirs, and what is float32 in a half-precision case is so on purpose."""
    fixed = not x.is_floating_point() or (x.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16))
    return x.dtype if fixed else dtype


def poison(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(257, 3584), (3, 40)])
def test_row_kernels(device, dtype, rows, width):
    case = Case(device, dtype)
    x = case.draw(rows, width, scale=3)
    for branches in (None, case.draw(1, rows, width), case.draw(3, rows, width)):
        residual = case.residual(x, branches)
        case.judge("add_norm", lambda residual, out: [residual.x, out], residual, poison(x))
    last = dataclasses.replace(residual, following=None)
    case.judge("add_norm", lambda residual, out: [residual.x], last, x)
    gate_up = case.draw(rows, 2 * 4 * width, scale=2)
    case.judge(
        "gated_mul", lambda *given: [given[2]], gate_up, "gelu_tanh", poison(gate_up[:, : 4 * width].contiguous())
    )
    norm = LayerNorm(case.draw(width, base=1), case.draw(width), 1e-6)
    pending = case.draw(width).float()
    case.judge("layer_norm", lambda *given: [given[3]], x, pending, norm, poison(x))
    case.judge("layer_norm", lambda *given: [given[3]], x, pending, None, poison(x))
    case.judge("rms_norm", lambda *given: [given[2]], x, case.draw(width, base=1), poison(x))
    for exact in (True, False):
        linear = Affine(case.draw(2 * width, width, scale=width**-0.5), case.draw(2 * width))
        out = poison(case.draw(rows, 2 * width))
        case.judge("gelu_product", lambda *given: [given[3]], x, linear, exact, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_are_exact(device, dtype):
    random = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (5, 3, 384, 384), dtype=torch.uint8, generator=random).to(device)
    table = pixels.table().to(device, dtype)
    found, wanted = (torch.full((5 * 729, 592), torch.nan, dtype=dtype, device=device) for _ in range(2))
    ops.pick(device).cut_patches(frames, table, 14, 27, found)
    twins.cut_patches(frames, table, 14, 27, wanted)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("branches", [None, 1, 3])
@pytest.mark.parametrize("size", ["full", "tiny"])
def test_step_kernels(device, dtype, branches, size):
    case, config = Case(device, dtype), getattr(VidiConfig, size)().decoder
    width, heads, groups, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    x = case.draw(width, scale=3)
    before = (case.residual(x, None if branches is None else case.draw(branches, width)), poison(x))
    spread = width**-0.5
    qkv = case.draw((heads + 2 * groups) * head_dim, width, scale=spread)
    angle = case.draw(9, head_dim // 2).repeat(1, 2)
    q, cache = poison(case.draw(1, heads * head_dim)), case.draw(9, groups, head_dim)
    queries = Queries(q, q, torch.tensor([5], device=device))
    keys = Keys(cache, cache, case.draw(1, 2 * groups * head_dim), plan.make(9, (0, 0), (0, 0), device))
    case.judge(
        "qkv_step",
        lambda residual, x, qkv, rotation, q, keys: [x, q.q_TX, q.rotated_TX, keys.k_SGH, keys.v_SGH],
        *(*before, qkv, Rotation(angle.cos(), angle.sin()), queries, keys),
    )
    inner = config.intermediate_size
    out = poison(case.draw(inner))
    case.judge(
        "gate_up_step",
        lambda residual, x, weight, activation, out: [x, out],
        *(*before, case.draw(2 * inner, width, scale=spread), "gelu_tanh", out),
    )
    out = poison(case.draw(1000))
    case.judge(
        "head_step",
        lambda residual, x, head, out: [x, out],
        *(*before, Head(case.draw(1000, width, scale=spread), 30.0, dtype), out),
    )
    for rows, columns in ((3, heads * head_dim), (1, inner)):
        given, weight = case.draw(rows, columns), case.draw(width, columns, scale=columns**-0.5)
        case.judge("product_step", lambda *given: [given[2]], given, weight, poison(case.draw(rows, width)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "pos", "window", "visual", "audio"),
    [
        (1, 900, 4096, (0, 11760), (11760, 12360)),
        (1, 900, 64, (0, 60000), (60000, 60001)),
        (1, 0, None, (0, 0), (0, 0)),
        (30, 0, 8, (0, 3000), (3000, 3100)),
        (30, 7, None, (5, 1000), (0, 0)),
        (200, 100, 50, (0, 300), (300, 333)),
    ],
)
def test_attention_kernel(device, dtype, rows, pos, window, visual, audio):
    config, case = VidiConfig.full().decoder, Case(device, dtype)
    heads, groups, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    keys = max(pos + rows, 1024)
    q, rotated = (case.draw(rows, heads * head_dim, scale=3) for _ in range(2))
    k, v = (case.draw(keys, groups, head_dim) for _ in range(2))
    cross = case.draw(max(visual[1], audio[1], 1), 2 * groups * head_dim)
    out = poison(case.draw(3, rows, heads * head_dim))
    pos_T = torch.arange(pos, pos + rows, device=device)
    held = Keys(k, v, cross, plan.make(keys, visual, audio, device))
    # The cap bites: scores have a spread of about 3 · 16 / 16 under a cap of 5.
    scores = Scores(config.scale, 5.0, window)
    case.judge("attend", lambda *given: [given[3]], Queries(q, rotated, pos_T), held, scores, out)


def wide(layers: int) -> VidiConfig:
    """Full decoder width over a few layers; a window that bites; the tiny towers."""
    full, tiny = VidiConfig.full(), VidiConfig.tiny()
    decoder: DecoderConfig = dataclasses.replace(full.decoder, num_layers=layers, vocab_size=4096, sliding_window=64)
    return dataclasses.replace(tiny, decoder=decoder)


def video(config: VidiConfig, frames: int, samples: int = 1, text: int = 24) -> Batch:
    random = torch.Generator().manual_seed(0)
    side, a = config.vision.image_size, config.audio
    ids = torch.randint(3, config.decoder.vocab_size, (samples, text), generator=random)
    ids[:, 3] = config.image_placeholder
    counts = [frames - b for b in range(samples)]
    return Batch(
        ids,
        None,
        tuple(torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=random) for n in counts),
        tuple(torch.randn(2, a.num_mel_bins, a.mel_frames, generator=random) for _ in counts),
        tuple(2 * a.mel_frames - 7 * b for b in range(samples)),
    )


def stages(runner: object, batch: Batch) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}

    def tap(stage: str, x: Tensor) -> Tensor:
        found.setdefault(stage, []).append(x.cpu())
        return x

    runner(batch, last_stream=True, tap=tap)  # type: ignore[operator]
    return {stage: torch.cat(parts) for stage, parts in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [1, 2])
@torch.no_grad()
def test_every_stage_at_full_width(device, dtype, samples):
    # Weights are those of the dtype: errors are of arithmetic alone.
    config = wide(3)
    model = synthetic.create(config, 0, device=device, dtype=dtype)
    batch = video(config, 40, samples)
    naive = stages(model, batch)
    found = stages(accelerate(model, stream_chunk=1024, frame_batch=16), batch)
    truth = stages(precision.cast_model(model, torch.float64), batch)
    assert set(found) == set(truth)
    failed = []
    for stage, value in truth.items():
        if not value.is_floating_point():
            assert torch.equal(found[stage], value), stage
            continue
        result = judge(found[stage], value, [naive[stage]], dtype, stage, zero_rows=False)
        if not result.ok:
            failed.append(result.text())
    assert not failed, "\n".join(failed)


@torch.no_grad()
def test_256_cached_tokens_are_the_uncached_pass_within_bf16_noise(device):
    config = wide(4)
    model = synthetic.create(config, 0, device=device, dtype=torch.bfloat16)
    batch = video(config, 40)
    fast = accelerate(model)
    tokens = torch.randint(3, 4096, (1, 256), generator=torch.Generator().manual_seed(1))
    cached = generate.forced_logits(fast, batch, tokens.to(device))[0]
    whole = dataclasses.replace(batch, input_ids_BT=torch.cat([batch.input_ids_BT, tokens], dim=1))
    last = slice(-257, -1)
    uncached = fast(whole)[0, last]
    naive = model(whole)[0, last]
    truth = precision.cast_model(model, torch.float64)(whole)[0, last]
    assert cached.shape == uncached.shape == (256, 4096)
    for run in (cached, uncached):
        result = judge(run[None], truth[None], [naive[None]], torch.bfloat16, "logits")
        assert result.ok, result.text()


@torch.no_grad()
def test_the_graph_changes_nothing(device):
    config = wide(4)
    model = synthetic.create(config, 0, device=device, dtype=torch.bfloat16)
    batch = video(config, 40)
    with_graph, without = accelerate(model), accelerate(model, graph=False)
    tokens = torch.randint(3, 4096, (1, 256), generator=torch.Generator().manual_seed(1)).to(device)
    logits, wanted = (generate.forced_logits(runner, batch, tokens) for runner in (with_graph, without))
    assert torch.equal(logits, wanted)  # bit for bit, so every token that could be chosen is the same
    assert (logits[0, 1:] != logits[0, :-1]).any(-1).all(), "a replay that repeats one step would pass"
    chosen = generate.greedy(with_graph, batch, max_new_tokens=256)
    assert chosen == generate.greedy(without, batch, max_new_tokens=256)
