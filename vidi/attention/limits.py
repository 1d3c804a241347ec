"""What each attention backend can do, as a table, so that every refusal names the backends that can."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["LIMITS", "Limits", "able", "check", "why_not"]

HALVES = frozenset({torch.bfloat16, torch.float16})
SINGLE_AND_HALVES = HALVES | {torch.float32}
ALL = SINGLE_AND_HALVES | {torch.float64}


@dataclass(frozen=True)
class Limits:
    """softcap: it can cap scores. dtypes: by device type; a device that is absent is not served; None = any of either.
    head_dims: None = any; ``head_dims_text`` says them in words."""

    softcap: bool = True
    dtypes: Mapping[str, frozenset[torch.dtype]] | None = None
    head_dims: frozenset[int] | None = None
    head_dims_text: str = "any"


LIMITS: Mapping[str, Limits] = {
    "eager": Limits(),
    "sdpa": Limits(softcap=False),
    # flash-attn 2 pads a head to the next kernel it was built with: 32, 64, 96, 128 and 256, here not 192.
    "flash": Limits(
        dtypes={"cuda": HALVES},
        head_dims=frozenset({*range(1, 129), *range(193, 257)}),
        head_dims_text="up to 128, and from 193 to 256",
    ),
    "flex": Limits(dtypes={"cuda": SINGLE_AND_HALVES, "cpu": ALL}),
}


def why_not(
    backend: str, *, dtype: torch.dtype, device: torch.device, head_dim: int, softcap: float | None = None
) -> str | None:
    """What ``backend`` lacks, as the end of a sentence "it cannot …"; None where it can."""
    limits = LIMITS[backend]
    if softcap is not None and not limits.softcap:
        return f"cap attention scores (softcap {softcap:g})"
    if limits.dtypes is not None:
        if device.type not in limits.dtypes:
            return f"run on {device.type} tensors (only on {' and '.join(limits.dtypes)})"
        served = limits.dtypes[device.type]
        if dtype not in served:
            return f"compute in {_name(dtype)} on {device.type} (only in {', '.join(sorted(map(_name, served)))})"
    if limits.head_dims is not None and head_dim not in limits.head_dims:
        return f"take heads of {head_dim} ({limits.head_dims_text})"
    return None


def able(*, dtype: torch.dtype, device: torch.device, head_dim: int, softcap: float | None = None) -> tuple[str, ...]:
    """The backends that can, in the table's order."""
    return tuple(
        name for name in LIMITS if why_not(name, dtype=dtype, device=device, head_dim=head_dim, softcap=softcap) is None
    )


def check(
    backend: str, *, dtype: torch.dtype, device: torch.device, head_dim: int, softcap: float | None = None
) -> None:
    """Raises ValueError where ``backend`` cannot, naming those that can."""
    lack = why_not(backend, dtype=dtype, device=device, head_dim=head_dim, softcap=softcap)
    if lack is not None:
        others = able(dtype=dtype, device=device, head_dim=head_dim, softcap=softcap)
        raise ValueError(f"backend {backend!r} cannot {lack}; {' and '.join(map(repr, others))} can")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
