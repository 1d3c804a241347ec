"""torch's flex_attention: softcap, masks and grouped heads in one compiled kernel, also in float32 on a GPU (spec §7).

On a CPU it runs uncompiled, with a (T, S) matrix, forward only: for tests. On a GPU its first use switches torch's
`donated_buffer` off for the whole process, which other compiled models may pay for in memory.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from vidi.attention import mask
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows

__all__ = ["COMPILATIONS", "SMALLEST_HEAD", "attend"]

COMPILATIONS = 1024  # in one process, before torch refuses another; each golden case alone may need a dozen
SMALLEST_HEAD = 16  # of the compiled kernel; columns of zeros change no score
FEW_QUERIES = 128  # below, torch takes its decoding kernel, which splits the keys
BLOCK = 128  # of a block mask, in queries and keys: torch's default

Mod = Callable[..., Tensor]


def attend(call: AttentionCall) -> Tensor:
    """(B, T, N, H); see `limits` for dtypes and devices. Raises ValueError for a gradient on a CPU."""
    q, k, v = call.tensors
    on_cpu = q.device.type == "cpu"
    if on_cpu and call.needs_grad:
        raise ValueError("backend 'flex' cannot return gradients on a CPU; 'eager' can, and 'sdpa' without a softcap")
    keep_k = None if call.keep_k is None or call.keep_k.full else call.keep_k
    if keep_k is not None:
        # A masked key has weight 0, and 0 · NaN is NaN: what stands in padding must not matter.
        hidden = ~keep_k.keep_BL[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    head_dim = q.shape[-1]
    if not on_cpu and head_dim < SMALLEST_HEAD:
        q, k, v = (nnf.pad(x, (0, SMALLEST_HEAD - head_dim)) for x in (q, k, v))
    run: Any = _uncompiled if on_cpu else _compiled()
    # Numbers become symbols after their second value. Lengths may; a cap must not: a kernel cannot read one from the host.
    limits: dict[str, Any] = {"recompile_limit": COMPILATIONS, "accumulated_recompile_limit": COMPILATIONS}
    with torch._dynamo.config.patch(**limits, specialize_float=True):
        out = run(
            *(x.transpose(1, 2) for x in (q, k, v)),
            score_mod=_capped(call.softcap),
            block_mask=_listed(q.shape[1], k.shape[1], q.device, _sees(keep_k, call.q_pos_BT, call.window)),
            scale=call.scale,
            enable_gqa=q.shape[2] != k.shape[2],
            kernel_options=None if on_cpu else _launch_shape(q.dtype, q.shape[1]),
        )
    return mask.zero_rows(out[..., :head_dim].transpose(1, 2), call.keep_q)


def _sees(keep_k: Rows | None, q_pos_BT: Tensor | None, window: int | None) -> Mod | None:
    """`mask.sees` and the key mask, for one (sample, head, query, key): what flex_attention compiles. None: every key."""
    if keep_k is None and q_pos_BT is None:
        return None
    # On the device, because a kernel cannot read a number that torch has made a symbol.
    reach = None if window is None or q_pos_BT is None else torch.full((), window, device=q_pos_BT.device)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        keep = s >= 0 if keep_k is None else keep_k.keep_BL[b, s]
        if q_pos_BT is not None:
            behind = q_pos_BT[b, t] - s
            keep = keep & (behind >= 0)
            if reach is not None:
                keep = keep & (behind <= reach)
        return keep

    return sees


def _listed(queries: int, keys: int, device: torch.device, sees: Mod | None) -> flex.BlockMask:
    """A block mask that lists every block of keys and leaves the hiding to ``sees``: made in a fraction of the time that
    looking for empty blocks takes, which text is too short to repay. Without one all keys would be a single block, which
    the decoding kernel cannot split: one program would read them all, and add them up in one sum."""
    rows, blocks = (-(-length // BLOCK) for length in (queries, keys))
    return flex.BlockMask.from_kv_blocks(
        torch.full((1, 1, rows), blocks, dtype=torch.int32, device=device),
        torch.arange(blocks, dtype=torch.int32, device=device).expand(1, 1, rows, blocks).contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(queries, keys),
    )


def _launch_shape(dtype: torch.dtype, queries: int) -> dict[str, int] | None:
    """In place of torch's choice, which fails at head dim 256 (an H100, torch 2.11); None: torch's choice."""
    if dtype == torch.float32:
        # An IEEE product is unrolled into single multiplications: wider tiles compile for minutes.
        tiles = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
        return dict.fromkeys(tiles, 16) | {"num_warps": 4, "num_stages": 1}
    if queries < FEW_QUERIES:
        # torch's two warps cannot hold the sums: without splits 30 queries over 60,000 keys took 143 ms, in this shape 3.3.
        return {"fwd_BLOCK_N": 32, "fwd_num_warps": 4, "fwd_num_stages": 3}
    return None


@functools.cache
def _capped(cap: float | None) -> Mod | None:
    """cap · tanh(score / cap); one function per cap, since another function is another compilation."""
    if cap is None:
        return None

    def capped(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


@functools.cache
def _compiled() -> Any:
    # Read again at each backward: with it on, a second one through the same graph is refused.
    torch._functorch.config.donated_buffer = False
    # fullgraph: a graph break would run uncompiled, with a (T, S) matrix, in silence.
    return torch.compile(flex.flex_attention, fullgraph=True)


def _uncompiled(*tensors: Tensor, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # here on purpose
        run: Any = flex.flex_attention
        return run(*tensors, **options)
