"""The transformer layer that both towers share: LayerNorm before attention and MLP, biases, no mask."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from vidi.attention import dispatch
from vidi.attention.call import AttentionCall

__all__ = ["Attention", "Mlp", "TowerLayer"]


class Attention(nn.Module):
    """Full self-attention over (B, L, C)."""

    def __init__(self, width: int, num_heads: int, *, key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (width // num_heads) ** -0.5
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=key_bias)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLC: Tensor, backend: str) -> Tensor:
        q, k, v = (proj(x_BLC).unflatten(-1, (self.num_heads, -1)) for proj in (self.q, self.k, self.v))
        return self.out(dispatch.attend(AttentionCall(q, k, v, self.scale), backend).flatten(-2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class TowerLayer(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x)), on (B, L, C)."""

    def __init__(
        self, width: int, heads: int, inner: int, eps: float, activation: Callable[[Tensor], Tensor], *, key_bias: bool
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attention = Attention(width, heads, key_bias=key_bias)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner, activation)

    def forward(self, x_BLC: Tensor, backend: str) -> Tensor:
        x_BLC = x_BLC + self.attention(self.norm1(x_BLC), backend)
        return x_BLC + self.mlp(self.norm2(x_BLC))
