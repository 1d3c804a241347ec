"""Between padded batches and the one long axis that varlen kernels read (spec §9).

Dims: B samples, L padded length, S = ΣL kept rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as nnf
from torch import Tensor

__all__ = ["Rows", "Unpadded", "_unpad_xattn_input", "check_query_mask", "pad", "unpad"]


@dataclass(frozen=True)
class Rows:
    """Which rows of a padded (B, L, …) tensor are kept; built once per forward, read by every layer.

    Lengths and indices need the host to know how many rows are kept: one synchronisation at first use, none after.
    """

    keep_BL: Tensor

    @classmethod
    def all_kept(cls, samples: int, length: int, device: torch.device | str = "cpu") -> Rows:
        rows = cls(torch.ones(samples, length, dtype=torch.bool, device=device))
        rows.__dict__.update(full=True, prefix=True)  # known without asking the device
        return rows

    @cached_property
    def full(self) -> bool:
        """Every row is kept: nothing to unpad."""
        return bool(self.keep_BL.all())

    @cached_property
    def prefix(self) -> bool:
        """The kept rows of each sample are its first ones: padding at the right, no holes."""
        return bool((self.keep_BL[:, 1:] <= self.keep_BL[:, :-1]).all())

    @cached_property
    def lengths_B(self) -> Tensor:
        """Kept rows per sample, (B,) int32."""
        return self.keep_BL.sum(-1, dtype=torch.int32)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Cumulative kept rows, (B + 1,) int32, starting at 0."""
        return nnf.pad(self.lengths_B.cumsum(0, dtype=torch.int32), (1, 0))

    @cached_property
    def indices(self) -> Tensor:
        """Flat positions of the kept rows in B·L, (S,) int64, ascending."""
        return self.keep_BL.flatten().nonzero().flatten()

    @cached_property
    def max_seqlen(self) -> int:
        """The longest sample's kept rows."""
        return int(self.lengths_B.max()) if self.keep_BL.numel() else 0


@dataclass(frozen=True)
class Unpadded:
    """What a varlen kernel takes: rows on one axis, cumulative lengths, longest lengths as (query, key)."""

    q: Tensor
    k: Tensor
    v: Tensor
    indices_q: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen: tuple[int, int]


def unpad(x_BL: Tensor, rows: Rows) -> Tensor:
    """(B, L, …) -> (S, …): the kept rows, sample after sample."""
    return x_BL.flatten(0, 1).index_select(0, rows.indices)


def pad(x_S: Tensor, indices: Tensor, samples: int, length: int) -> Tensor:
    """(S, …) -> (B, L, …): the inverse of `unpad`, rows that are not kept exactly 0."""
    out = x_S.new_zeros(samples * length, *x_S.shape[1:])
    return out.index_copy(0, indices, x_S).unflatten(0, (samples, length))


def check_query_mask(keep: Tensor, query_length: int, cached_keys: int = 0, window: int | None = None) -> None:
    """The invariant of §9: the text mask's length is the query length. Each known way to break it has its own message.

    ``cached_keys``: keys already in the text cache. ``window``: the layer's sliding window, where it has one.
    Raises ValueError.
    """
    if keep.dim() == 4:
        raise ValueError(
            f"the text mask has 4 dimensions {tuple(keep.shape)}: this is a causal attention mask, whose axis 1 is a head "
            f"axis. Hand over the 2-D keep mask (batch, {query_length}) that the causal mask was built from."
        )
    if keep.dim() != 2:
        raise ValueError(
            f"the text mask has shape {tuple(keep.shape)}; a 2-D keep mask (batch, {query_length}) is needed"
        )
    length = keep.shape[1]
    if length == query_length:
        return
    if length == query_length + 1 and not cached_keys:
        raise ValueError(
            f"the text mask counts {length} tokens for {query_length} queries: it still counts the image placeholder, which "
            "is never embedded. Use the text mask (attention mask AND id != -200), packed as the embeddings are."
        )
    if cached_keys and length == query_length + cached_keys:
        raise ValueError(
            f"the text mask counts {length} tokens for {query_length} queries: it covers the {cached_keys} cached keys too. "
            "Cross-attention masks queries alone: pass the last "
            f"{query_length} columns (no mask is needed for one query)."
        )
    if window is not None and length == min(window, query_length):
        raise ValueError(
            f"the text mask counts {length} tokens for {query_length} queries: a sliding layer cut it to its window of "
            f"{window}. The window limits keys of self-attention; cross-attention needs the mask of all queries."
        )
    raise ValueError(f"the text mask counts {length} tokens, the queries are {query_length}; they must be equal (§9)")


def _unpad_xattn_input(
    q_BTNH: Tensor,
    k_BLGH: Tensor,
    v_BLGH: Tensor,
    q_rows: Rows | None,
    k_rows: Rows,
    *,
    cached_keys: int = 0,
    window: int | None = None,
) -> Unpadded:
    """Gather queries, keys and values of kept positions for a varlen kernel (§9).

    ``q_rows``: the text mask; not consulted for a single query row (decoding), where every sample has query length 1.
    None = every query is kept. Raises ValueError where the text mask does not match the queries.
    """
    samples, query_length = q_BTNH.shape[:2]
    if q_rows is None or query_length == 1:
        q_rows = Rows.all_kept(samples, query_length, q_BTNH.device)
        q = q_BTNH.flatten(0, 1)
    else:
        check_query_mask(q_rows.keep_BL, query_length, cached_keys, window)
        q = unpad(q_BTNH, q_rows)
    if k_rows.keep_BL.shape != k_BLGH.shape[:2]:
        raise ValueError(f"the key mask is {tuple(k_rows.keep_BL.shape)}, the keys are {tuple(k_BLGH.shape[:2])}")
    return Unpadded(
        q=q,
        k=unpad(k_BLGH, k_rows),
        v=unpad(v_BLGH, k_rows),
        indices_q=q_rows.indices,
        cu_seqlens_q=q_rows.cu_seqlens,
        cu_seqlens_k=k_rows.cu_seqlens,
        max_seqlen=(q_rows.max_seqlen, k_rows.max_seqlen),
    )
