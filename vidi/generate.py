"""Greedy decoding (spec §2, §7): one prefill, then a token a step from the caches; rows stop on their own.

Dims: B samples, T text tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vidi.inputs.batch import Batch
from vidi.model import Pipeline
from vidi.stream import Stream

__all__ = ["Generated", "forced_logits", "greedy"]


@dataclass(frozen=True)
class Generated:
    """tokens: new ids of each row, the stop token left out. stopped: the row ended by the stop token, not by the limit.

    cache: holds the streams' keys and values; another question about the same videos may ``reuse`` it.
    """

    tokens: list[list[int]]
    stopped: list[bool]
    cache: Any = field(default=None, repr=False, compare=False)


@torch.inference_mode()
def greedy(
    model: Pipeline,
    batch: Batch,
    *,
    max_new_tokens: int = 1024,
    streams: dict[str, Stream] | None = None,
    reuse: Any | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Generated:
    """The most likely token at each step, until every row has met the end-of-turn token or ``max_new_tokens``.

    ``streams``: of these videos, where they are there already; ``reuse``: a cache over them, where an earlier question
    left one (`Generated.cache`). ``progress`` is called with (tokens so far, limit). Raises ValueError for a limit below 1.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1")
    logits_BV, cache = model.prefill(batch, batch.input_ids_BT.shape[1] + max_new_tokens, streams, reuse=reuse)
    stop = model.config.end_of_turn_id
    tokens: list[list[int]] = [[] for _ in logits_BV]
    stopped = [False] * len(tokens)
    for step in range(max_new_tokens):
        ids_B = logits_BV.argmax(-1)
        for b, token in enumerate(ids_B.tolist()):
            stopped[b] = stopped[b] or token == stop
            if not stopped[b]:
                tokens[b].append(token)
        if progress is not None:
            progress(step + 1, max_new_tokens)
        if all(stopped) or step + 1 == max_new_tokens:
            break
        logits_BV = model.step(ids_B, cache)
    return Generated(tokens, stopped, cache)


@torch.inference_mode()
def forced_logits(
    model: Pipeline, batch: Batch, tokens_BS: Tensor, *, streams: dict[str, Stream] | None = None
) -> Tensor:
    """Logits (B, S, V) of cached decoding along given tokens (B, S): entry s is the logit after prompt + tokens[:s]."""
    steps = tokens_BS.shape[1]
    ids_BS = tokens_BS.to(model.device)
    logits_BV, cache = model.prefill(batch, batch.input_ids_BT.shape[1] + steps, streams)
    out = [logits_BV]
    for step in range(steps - 1):
        out.append(model.step(ids_BS[:, step], cache))
    return torch.stack(out, dim=1)
