"""torch's scaled_dot_product_attention: fast for the towers; it knows no softcap, so it refuses the decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor

from vidi.attention import limits, mask
from vidi.attention.unpad import Rows

__all__ = ["attend"]


def attend(
    q_BTNH: Tensor,
    k_BSGH: Tensor,
    v_BSGH: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    keep_q: Rows | None = None,
    keep_k: Rows | None = None,
    q_pos_BT: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """See `dispatch.attend`. A softcap is refused (`limits`)."""
    limits.check("sdpa", dtype=q_BTNH.dtype, device=q_BTNH.device, head_dim=q_BTNH.shape[-1], softcap=softcap)
    keep = None
    if keep_k is not None and not keep_k.full:
        keep = keep_k.keep_BL[:, None, None]
        # Masks are added to scores inside: NaN in a key that is not kept would stay NaN, and 0 · NaN in its value.
        hidden = ~keep_k.keep_BL[:, :, None, None]
        k_BSGH, v_BSGH = k_BSGH.masked_fill(hidden, 0), v_BSGH.masked_fill(hidden, 0)
    if q_pos_BT is not None:
        sees = mask.sees(q_pos_BT, torch.arange(k_BSGH.shape[1], device=k_BSGH.device), window)[:, None]
        keep = sees if keep is None else keep & sees
    q, k, v = (x.transpose(1, 2) for x in (q_BTNH, k_BSGH, v_BSGH))
    out = nnf.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    if keep is not None:  # a row without any key is 0 here, whatever the kernel makes of it
        out = out.masked_fill(~keep.any(-1, keepdim=True), 0)
    return mask.zero_rows(out.transpose(1, 2), keep_q)
