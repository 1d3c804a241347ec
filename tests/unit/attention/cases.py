"""Inputs that make attention's features bite, and NumPy views of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.unit.attention import naive
from vidi.attention.unpad import Rows

__all__ = ["CASES", "Case", "keep_first", "make", "reference"]


@dataclass(frozen=True)
class Case:
    """Sizes and masks. lengths_k: kept keys per sample, at the front; holes: also every third of them is dropped.

    causal: queries stand at the last positions of the keys, unless ``start`` gives each sample's first position.
    """

    queries: int
    keys: int
    heads: int = 4
    groups: int = 2
    head_dim: int = 16
    samples: int = 3
    scale: float = 0.4
    softcap: float | None = 3.0  # scores reach ±10: it bites
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    holes: bool = False
    causal: bool = False
    start: tuple[int, ...] | None = None
    window: int | None = None
    own: bool = field(default=False)  # text to itself: queries and keys under one mask


CASES = {
    "cross": Case(5, 11),
    "cross-plain": Case(5, 11, softcap=None),
    "cross-unshared": Case(5, 11, groups=4),
    "cross-padded": Case(5, 11, lengths_q=(5, 3, 1), lengths_k=(11, 1, 6)),
    "cross-silent": Case(5, 11, lengths_q=(5, 3, 1), lengths_k=(7, 0, 1)),
    "cross-all-silent": Case(5, 11, lengths_k=(0, 0, 0)),
    "cross-no-query": Case(5, 11, lengths_q=(5, 0, 2), lengths_k=(7, 2, 1)),
    "cross-holes": Case(5, 11, lengths_q=(5, 3, 1), lengths_k=(11, 0, 6), holes=True),
    "cross-one-query": Case(1, 11, lengths_k=(11, 0, 6)),
    "cross-one-query-holes": Case(1, 11, lengths_k=(11, 1, 6), holes=True),
    "self": Case(9, 9, causal=True),
    "self-window": Case(9, 9, causal=True, window=3),
    "self-window-0": Case(9, 9, causal=True, window=0),
    "self-window-all-but-one": Case(9, 9, causal=True, window=7),
    "self-window-whole": Case(9, 9, causal=True, window=8),
    "self-padded": Case(9, 9, causal=True, own=True, lengths_q=(9, 1, 4)),
    "self-padded-window": Case(9, 9, causal=True, own=True, lengths_q=(9, 1, 6), window=2),
    "self-cached": Case(4, 12, causal=True, start=(0, 3, 8)),
    "self-cached-window": Case(4, 12, causal=True, start=(0, 3, 8), window=3),
    "decode": Case(1, 12, causal=True, start=(0, 5, 11)),
    "decode-window": Case(1, 12, causal=True, start=(0, 5, 11), window=3),
    "decode-plain": Case(1, 12, causal=True, start=(0, 5, 11), softcap=None),
}


def keep_first(lengths: tuple[int, ...], length: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]


def make(
    case: Case, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
    """(q, k, v) and the keyword arguments of `AttentionCall`."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int, heads: int) -> Tensor:
        shape = (case.samples, length, heads, case.head_dim)
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 1.5).to(device, dtype)

    tensors = draw(case.queries, case.heads), draw(case.keys, case.groups), draw(case.keys, case.groups)
    options: dict[str, Any] = {"scale": case.scale, "softcap": case.softcap, "window": case.window}
    if case.lengths_q is not None:
        options["keep_q"] = Rows(keep_first(case.lengths_q, case.queries, device))
    if case.own:
        options["keep_k"] = options["keep_q"]
    elif case.lengths_k is not None:
        keep_BS = keep_first(case.lengths_k, case.keys, device)
        if case.holes:
            keep_BS = keep_BS & (torch.arange(case.keys, device=device) % 3 != 1)
        options["keep_k"] = Rows(keep_BS)
    if case.causal:
        start = case.start or (case.keys - case.queries,) * case.samples
        options["q_pos_BT"] = torch.tensor(start, device=device)[:, None] + torch.arange(case.queries, device=device)
    return tensors, options


def reference(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> np.ndarray:
    """`naive.attention` of the same arguments, (B, T, N, H) float64."""
    keeps = {name: options[name].keep_BL.cpu().numpy() for name in ("keep_q", "keep_k") if name in options}
    q_pos = options["q_pos_BT"].cpu().numpy() if "q_pos_BT" in options else None
    return naive.attention(
        *(x.detach().double().cpu().numpy() for x in tensors),
        scale=options["scale"],
        softcap=options["softcap"],
        window=options["window"],
        q_pos=q_pos,
        **keeps,
    )
