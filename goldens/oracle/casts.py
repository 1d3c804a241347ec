"""Which number format each step of the oracle uses: exact, cast as in the release, or rounded as in half precision.

Three regimes, chosen by `Arithmetic(casts, round_to, order_seed)`:

    casts="none"                     float64 everywhere: the mathematics, nothing else
    casts="cast"                     float64, but float32 exactly where the spec forces it (`wide` below)
    casts="cast", round_to=...       every stored tensor rounded to "bf16", "fp16" or "fp32", sums in float32:
                                     a naive low-precision model; its error against float64 is the baseline of a budget

`order_seed` makes several such runs differ as honest kernels differ: it permutes and splits every contraction, its
lowest bit adds biases after the product's rounding (unfused) and its next one divides by the softmax's sum after the
values are averaged (as flash kernels do). Order alone changes few bits of a half-precision run.
"""

import numpy as np

__all__ = ["ROUNDINGS", "Arithmetic", "round_bf16", "round_fp16"]

ROUNDINGS = ("bf16", "fp16", "fp32")


def _to_float32_odd(x: np.ndarray) -> np.ndarray:
    """float64 -> float32, rounded to odd: what is cut off leaves its trace in the last bit, so that a second rounding
    to fewer bits gives the same as one rounding from float64 (ties are seen as ties, and near-ties as none)."""
    nearest = x.astype(np.float32)
    toward_zero = np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)
    bits = toward_zero.view(np.uint32)
    return (bits | ((toward_zero != x) & np.isfinite(x))).astype(np.uint32).view(np.float32)


def round_bf16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as float32 values. x: float32 or float64, any shape.

    A bfloat16 is the upper half of a float32: add just under half of the dropped part (exactly half where the kept last
    bit is odd), then cut. Overflow carries into the exponent and gives inf; NaN stays NaN.
    """
    x = np.asarray(x)
    with np.errstate(over="ignore", invalid="ignore"):
        single = _to_float32_odd(x) if x.dtype == np.float64 else np.ascontiguousarray(x, dtype=np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(single), np.float32(np.nan), rounded.view(np.float32))


def round_fp16(x: np.ndarray) -> np.ndarray:
    """Nearest IEEE half, ties to even, subnormals kept, beyond 65519 inf; as float32 values. x: float32 or float64."""
    with np.errstate(over="ignore"):
        return np.asarray(x).astype(np.float16).astype(np.float32)


def _sum_in_lanes(x: np.ndarray) -> np.ndarray:
    """float32 sum over the last axis in the order of the recordings' machine: 4 accumulators of 8 lanes run along the
    axis, then fold. Any order is as right; this one gives the recorded norms bit for bit from the recorded inputs,
    which leaves a comparison with them its full power."""
    length = x.shape[-1]
    blocks = x[..., : length - length % 32].reshape(*x.shape[:-1], length // 32, 4, 8)
    total = np.zeros(x.shape[:-1], x.dtype)
    if length >= 32:
        lanes = _fold(np.moveaxis(_fold(np.moveaxis(blocks, -3, 0)), -2, 0))
        total = _fold(np.moveaxis(lanes, -1, 0))
    for i in range(length - length % 32, length):
        total = total + x[..., i]
    return total[..., None]


def _fold(terms: np.ndarray) -> np.ndarray:
    """terms[0] + terms[1] + …, strictly from the left."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


class Arithmetic:
    """The formats of one run. `work` is the dtype that holds activations, `wide` the one of the steps that the spec
    forces to float32 (GemmaNorm, rms(), positions, rope angles, loss)."""

    def __init__(self, casts: str = "none", round_to: str | None = None, order_seed: int | None = None) -> None:
        if casts not in ("none", "cast"):
            raise ValueError(f"casts is {casts!r}; it must be 'none' or 'cast'")
        if round_to is not None and round_to not in ROUNDINGS:
            raise ValueError(f"round_to is {round_to!r}; it must be None or one of {ROUNDINGS}")
        if round_to is not None and casts == "none":
            raise ValueError("round_to needs casts='cast': a rounded run without float32 steps is no model's")
        self.round_to = round_to
        self.order_seed = order_seed
        self.adds_bias_late = order_seed is not None and order_seed % 2 == 1
        # without rounding the division's place is free, and after the average it is over fewer numbers
        self.normalises_late = round_to is None or (order_seed is not None and order_seed // 2 % 2 == 1)
        self.work: type[np.floating] = np.float64 if round_to is None else np.float32
        self.wide: type[np.floating] = np.float64 if casts == "none" else np.float32

    def store(self, x: np.ndarray) -> np.ndarray:
        """What is left of x once the model has written it to memory in its own dtype."""
        if self.round_to == "bf16":
            return round_bf16(x)
        if self.round_to == "fp16":
            return round_fp16(x)
        return np.asarray(x, dtype=self.work)

    def widen(self, x: np.ndarray) -> np.ndarray:
        """x in the dtype of the float32-forced steps."""
        return np.asarray(x, dtype=self.wide)

    def contract(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a (..., M, K) @ b (..., K, N), unrounded, in the order that `order_seed` chooses."""
        if self.order_seed is None:
            return a @ b
        order, cut = self._order(a.shape[-1])
        first, rest = order[:cut], order[cut:]
        return a[..., first] @ b[..., first, :] + a[..., rest] @ b[..., rest, :]

    def mean(self, x: np.ndarray) -> np.ndarray:
        """Mean over the last axis, kept as length 1, in x's dtype."""
        if self.order_seed is not None:
            return np.mean(x[..., self._order(x.shape[-1])[0]], axis=-1, keepdims=True, dtype=x.dtype)
        if x.dtype == np.float64:
            return np.mean(x, axis=-1, keepdims=True)
        return _sum_in_lanes(x) / x.dtype.type(x.shape[-1])

    def _order(self, length: int) -> tuple[np.ndarray, int]:
        source = np.random.Generator(np.random.PCG64([self.order_seed or 0, length]))
        return source.permutation(length), int(source.integers(length // 4, length - length // 4 + 1))

    def linear(self, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        """x (..., in) by weight (out, in), stored; the bias joins before the one rounding unless `adds_bias_late`."""
        y = self.contract(x, np.swapaxes(weight, -1, -2))
        y = self.store(y) if self.adds_bias_late else y
        return self.store(y if bias is None else y + bias)
