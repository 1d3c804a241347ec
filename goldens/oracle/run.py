"""The whole pass, its loss, and decoding by repeating it (spec §3 to §8)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import models
from .bridge import audio_tokens, visual_tokens
from .case import Keep, Trace, Weights
from .casts import Arithmetic
from .decoder import StreamLayer, carry_stream, run_text
from .text import embed, pack

__all__ = ["Greedy", "forward", "greedy", "teacher_forced"]

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Greedy:
    """tokens_BS: chosen ids, right-padded with 0; lengths_B: how many of a row's are real, the stop token counted;
    logits_BSK: what each was chosen from, 0 where the row had stopped; gap_BS: top-1 minus top-2, inf there."""

    tokens_BS: np.ndarray
    lengths_B: np.ndarray
    logits_BSK: np.ndarray
    gap_BS: np.ndarray


class _Run:
    """One case in one arithmetic: the streams are carried once, the text passes as often as asked."""

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: Tensors,
        inputs: Tensors,
        casts: str,
        round_to: str | None,
        pos_freq: np.ndarray,
        order_seed: int | None,
        trace: Trace,
    ) -> None:
        self.ar = Arithmetic(casts, round_to, order_seed)
        self.sizes = models.read(config)
        self.weights = Weights(self.ar, weights, self.sizes.rounded_positions)
        pos_freq = np.asarray(pos_freq)
        if pos_freq.shape != (self.sizes.width // 2,):
            raise ValueError(f"pos_freq has shape {pos_freq.shape}; hidden_size {self.sizes.width} needs half of it")
        trace.put("pos.freq", pos_freq)
        self.streams: dict[str, list[StreamLayer]] = {}
        batch = len(inputs["inputs.input_ids"])
        for modality, name, encode in (("v", "image", visual_tokens), ("a", "audio", audio_tokens)):
            tokens = encode(self.ar, self.sizes, self.weights, inputs, batch, pos_freq, trace)
            if tokens is not None:
                self.streams[modality] = carry_stream(self.ar, self.sizes, self.weights, name, *tokens, trace)

    def text(self, ids_BT: np.ndarray, keep_BT: np.ndarray, trace: Trace) -> np.ndarray:
        """Packed ids -> what the head reads, (B, T, D)."""
        x_BTD = embed(self.ar, self.weights, ids_BT, keep_BT, trace)
        return run_text(self.ar, self.sizes, self.weights, x_BTD, keep_BT, self.streams, trace)

    def logits(self, n_BTD: np.ndarray, trace: Trace) -> np.ndarray:
        """(B, T, K)"""
        return self.sizes.parts.logits(self.ar, self.sizes, self.weights, n_BTD, trace)


def forward(
    config: Mapping[str, Any],
    weights: Tensors,
    inputs: Tensors,
    *,
    casts: str = "none",
    round_to: str | None = None,
    pos_freq: np.ndarray,
    order_seed: int | None = None,
    keep: Keep = None,
    anchor: Tensors | None = None,
    thresholds: Mapping[str, float | None] | None = None,
) -> dict[str, np.ndarray]:
    """Every stage tensor of one case under its recorded id.

    config: the official config.json as a dict, with "vision_config" and "audio_config" (Hugging Face names), optionally
      "visual_token_budget" (60000) and "budget_scope" ("batch" or "video").
    weights: official names.
    inputs: `inputs.input_ids` (B, S) with -200 as placeholder; optional `inputs.attention_mask` (absent: all kept),
      `inputs.images.b` (F_b, 3, S, S) or `inputs.images_u8.b`, `inputs.audios.b` (P_b, M, mel) and
      `inputs.audio_sizes` (B) in mel frames, `inputs.labels` (B, S), `inputs.pos_noise.{h,w,t_v.b,t_a.b}`;
      `inputs.feat_{table,index,scale}` stand in for the tower's output of one video.
    casts, round_to, order_seed: see `Arithmetic`. pos_freq: the table w (D/2) of §5, as torch on the CPU makes it;
      data, in every regime. keep: which stages to hold (glob, globs or predicate); a long case needs it to stay small.
    anchor: stage tensors by id that the run goes on with in place of its own (rounded to its dtype), so that each
      stage's error is its own. thresholds: name -> τ of the losses (`head.mean_above`), None for the plain mean; by
      default that alone, named "none".

    Stages hold float64 (float32 with round_to); masks bool; ids int64. A modality that no sample has leaves no stage.
    With labels: `text.labels`, `loss.per_token` and the losses too (the 7B: in place of logits). Raises ValueError for
    a missing weight, a table or mask of the wrong shape, an unknown regime.
    """
    trace = Trace(keep, anchor, Arithmetic(casts, round_to).store)
    run = _Run(config, weights, inputs, casts, round_to, pos_freq, order_seed, trace)
    labels_BS = inputs.get("inputs.labels")
    ids_BT, keep_BT, labels_BT = pack(
        inputs["inputs.input_ids"], inputs.get("inputs.attention_mask"), labels_BS, placeholder=run.sizes.placeholder
    )
    n_BTD = run.text(ids_BT, keep_BT, trace)
    if labels_BT is None:
        run.logits(n_BTD, trace)
    else:
        trace.put("text.labels", labels_BT)
        named = {"none": None} if thresholds is None else thresholds
        run.sizes.parts.losses(run.ar, run.sizes, run.weights, n_BTD, labels_BT, named, trace)
    return trace.result()


def greedy(
    config: Mapping[str, Any],
    weights: Tensors,
    inputs: Tensors,
    steps: int,
    *,
    casts: str = "none",
    round_to: str | None = None,
    pos_freq: np.ndarray,
    order_seed: int | None = None,
) -> Greedy:
    """At most `steps` new tokens a row, highest logit first id on ties, a row stops at the model's stop id (kept).
    Uncached: each step passes the whole text anew; every row continues from its own last kept token. The rest as in
    `forward`."""
    run = _Run(config, weights, inputs, casts, round_to, pos_freq, order_seed, Trace([]))
    prompt, mask = inputs["inputs.input_ids"], inputs.get("inputs.attention_mask")
    batch, vocabulary = len(prompt), len(weights["model.embed_tokens.weight"])
    tokens_BS = np.zeros((batch, steps), np.int64)
    lengths_B = np.full(batch, steps, np.int64)
    logits_BSK = np.zeros((batch, steps, vocabulary), run.ar.work)
    gap_BS = np.full((batch, steps), np.inf)
    running_B = np.ones(batch, bool)
    for step in range(steps):
        ids_BT, keep_BT, _ = pack(prompt, mask, extra_BN=tokens_BS[:, :step], placeholder=run.sizes.placeholder)
        logits_BTK = run.logits(run.text(ids_BT, keep_BT, Trace([])), Trace([]))
        last_BK = logits_BTK[np.arange(batch), keep_BT.sum(axis=1) - 1]
        for b in np.flatnonzero(running_B):
            logits_BSK[b, step] = last_BK[b]
            second, first = np.sort(last_BK[b])[-2:]
            tokens_BS[b, step], gap_BS[b, step] = np.argmax(last_BK[b]), first - second
            if tokens_BS[b, step] == run.sizes.stop_id:
                running_B[b], lengths_B[b] = False, step + 1
        if not running_B.any():
            break
    return Greedy(tokens_BS, lengths_B, logits_BSK, gap_BS)


def teacher_forced(
    config: Mapping[str, Any],
    weights: Tensors,
    inputs: Tensors,
    tokens_BS: np.ndarray,
    *,
    casts: str = "none",
    round_to: str | None = None,
    pos_freq: np.ndarray,
    order_seed: int | None = None,
) -> np.ndarray:
    """(B, S, K): entry s is the logit after the prompt and tokens[:s], as `V.nocache.logits` of the recordings. One
    pass over prompt and tokens[:-1] holds them all, because the text is causal."""
    run = _Run(config, weights, inputs, casts, round_to, pos_freq, order_seed, Trace([]))
    prompt, mask = inputs["inputs.input_ids"], inputs.get("inputs.attention_mask")
    ids_BT, keep_BT, _ = pack(prompt, mask, extra_BN=np.asarray(tokens_BS)[:, :-1], placeholder=run.sizes.placeholder)
    all_BTK = run.logits(run.text(ids_BT, keep_BT, Trace([])), Trace([]))
    steps = np.asarray(tokens_BS).shape[1]
    first_B = keep_BT.sum(axis=1) - steps  # the prompt's last token: T_b = prompt + steps - 1
    return all_BTK[np.arange(len(prompt))[:, None], first_B[:, None] + np.arange(steps)]
