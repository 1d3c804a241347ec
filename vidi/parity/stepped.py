"""The text of a golden case decoded from caches: a prefill, then its last tokens one a step, every stage on golden tensors.

A whole pass computes the same, so its goldens judge this; what differs is how keys come from a cache, where a token stands, and
what the step itself does around the layers. Fed with goldens, each stage has the error of one stage, not of all before it.

Dims: B samples, T text tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vidi.attention.unpad import Rows
from vidi.cache import Cache, CrossKeys
from vidi.decoder.decoder import Decoder

__all__ = ["STEPS", "run"]

STEPS = 4  #: tokens of each row that come one by one


@torch.no_grad()
def run(
    decoder: Decoder,
    ids_BT: Tensor,
    keep_BT: Tensor,
    cross: list[Mapping[str, CrossKeys]],
    golden: Callable[[str], Tensor | None],
    backend: str,
) -> dict[str, Tensor]:
    """Stages by id, (B, T, …) each as in a whole pass: rows of the prefill, and of at most `STEPS` steps a sample.

    ids_BT: packed to the left; keep_BT: those that are no padding. cross: each layer's stream keys and values. golden: a stage's
    tensor to go on with, where there is one.
    """
    lengths_B = keep_BT.sum(1)
    steps = min(STEPS, int(lengths_B.min()))
    found: dict[str, Tensor] = {}
    first_BT = torch.arange(keep_BT.shape[1], device=keep_BT.device) < (lengths_B - steps)[:, None]

    def prefilled(stage: str, x: Tensor) -> Tensor:
        """What is still to come is padding here: exact zeros."""
        found[stage] = x
        whole = golden(stage)
        return x if whole is None or whole.shape != x.shape else whole * first_BT[..., None]

    cache = Cache.empty(decoder.config, lengths_B - steps, keep_BT.shape[1], decoder.embed.weight.dtype, ids_BT.device)
    streams = Cache([], lengths_B, cross)
    x_BTD = decoder(
        decoder.embed_tokens(ids_BT, first_BT),
        Rows(first_BT),
        {},
        backend=backend,
        cache=cache,
        reuse=streams,
        tap=prefilled,
    )
    prefilled("logits", decoder.logits(x_BTD, prefilled))

    rows = torch.arange(len(ids_BT), device=ids_BT.device)
    for step in range(steps):
        at_B = lengths_B - steps + step

        def stepped(stage: str, x_B1: Tensor, at_B: Tensor = at_B) -> Tensor:
            whole = golden(stage)
            if whole is None or stage not in found or found[stage].shape != whole.shape:
                return x_B1
            found[stage] = found[stage].index_put((rows, at_B), x_B1[:, 0])
            return whole[rows, at_B][:, None]

        decoder.step(ids_BT[rows, at_B], cache, backend=backend, tap=stepped)
    return found
