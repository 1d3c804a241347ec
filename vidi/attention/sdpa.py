"""torch's scaled_dot_product_attention: fast for the towers; it knows no softcap, so it refuses the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi.attention import limits, mask
from vidi.attention.call import AttentionCall

__all__ = ["attend"]


def attend(call: AttentionCall) -> Tensor:
    """(B, T, N, H). A softcap is refused (`limits`)."""
    q, k, v = call.tensors
    limits.check("sdpa", dtype=q.dtype, device=q.device, head_dim=q.shape[-1], softcap=call.softcap)
    keep = None
    if call.keep_k is not None and not call.keep_k.full:
        keep = call.keep_k.keep_BL[:, None, None]
        # Masks are added to scores inside: NaN in a key that is not kept would stay NaN, and 0 · NaN in its value.
        hidden = ~call.keep_k.keep_BL[:, :, None, None]
        k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)
    if call.q_pos_BT is not None:
        sees = mask.sees(call.q_pos_BT, torch.arange(k.shape[1], device=k.device), call.window)[:, None]
        keep = sees if keep is None else keep & sees
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gqa = q.shape[1] != k.shape[1]
    out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=call.scale, enable_gqa=gqa)
    if keep is not None:  # a row without any key is 0 here, whatever the kernel makes of it
        out = out.masked_fill(~keep.any(-1, keepdim=True), 0)
    return mask.zero_rows(out.transpose(1, 2), call.keep_q)
