"""The one attention of a decoder layer, read in three ways: text to itself, text to a stream, a stream token to itself.

Dims: B samples, T text tokens, L stream tokens, D width, N query heads, G key/value heads, H head dim (spec §7).
"""

from __future__ import annotations

from torch import Tensor, nn

from vidi.attention import dispatch
from vidi.attention.call import AttentionCall
from vidi.attention.unpad import Rows
from vidi.config import DecoderConfig

__all__ = ["DecomposedAttention", "repeat_heads"]


def repeat_heads(x_BLGH: Tensor, heads: int) -> Tensor:
    """(B, L, G, H) -> (B, L, N, H), block-wise: head n is kv head n // (N/G)."""
    return x_BLGH.repeat_interleave(heads // x_BLGH.shape[2], dim=2)


class DecomposedAttention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        width, q_width, kv_width = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        self.q = nn.Linear(width, q_width, bias=False)
        self.k = nn.Linear(width, kv_width, bias=False)
        self.v = nn.Linear(width, kv_width, bias=False)
        self.o = nn.Linear(q_width, width, bias=False)

    def queries(self, n_BTD: Tensor) -> Tensor:
        """(B, T, N, H), not rotated."""
        return self.q(n_BTD).unflatten(-1, (-1, self.config.head_dim))

    def keys_values(self, n_BLD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, L, G, H), heads not repeated, keys not rotated."""
        head_dim = self.config.head_dim
        return self.k(n_BLD).unflatten(-1, (-1, head_dim)), self.v(n_BLD).unflatten(-1, (-1, head_dim))

    def output(self, heads_BTNH: Tensor) -> Tensor:
        return self.o(heads_BTNH.flatten(-2))

    def attend_self(
        self,
        q_BTNH: Tensor,
        k_BSGH: Tensor,
        v_BSGH: Tensor,
        *,
        q_pos_BT: Tensor,
        window: int | None,
        keep_q: Rows | None,
        keep_k: Rows | None,
        backend: str,
    ) -> Tensor:
        """Text to text, causal, queries and keys rotated: (B, T, N, H)."""
        scale, cap = self.config.scale, self.config.attn_softcap
        call = AttentionCall(q_BTNH, k_BSGH, v_BSGH, scale, cap, q_pos_BT, window, keep_q, keep_k)
        return dispatch.attend(call, backend)

    def attend_stream(
        self, q_BTNH: Tensor, k_BLGH: Tensor, v_BLGH: Tensor, *, keep_q: Rows | None, keep_k: Rows, backend: str
    ) -> Tensor:
        """Text to a stream: no rotation, no order, kept tokens only; a sample without any gets exactly 0. (B, T, N, H)."""
        scale, cap = self.config.scale, self.config.attn_softcap
        call = AttentionCall(q_BTNH, k_BLGH, v_BLGH, scale, cap, keep_q=keep_q, keep_k=keep_k)
        return dispatch.attend(call, backend)

    def attend_own_token(self, v_BLGH: Tensor) -> Tensor:
        """Each stream token attends to itself alone, so its attention is its value: (B, L, D) after projection."""
        return self.output(repeat_heads(v_BLGH, self.config.num_heads))
