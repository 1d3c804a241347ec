"""Faults of the head, the loss and greedy decoding (spec §2, §8)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant

GREEDY, PREFILL = "vidi.generate.greedy", "vidi.model.Pipeline.prefill"


@plant("vidi.decoder.decoder.softcap")
def no_final_softcap(original: Any) -> Any:
    """No softcap on logits."""
    return lambda x, cap: x


@plant("vidi.decoder.decoder.softcap")
def attention_softcap_on_logits(original: Any) -> Any:
    """Attention's softcap (50) on logits (30)."""
    return lambda x, cap: original(x, 50.0)


@plant("vidi.decoder.decoder.Decoder.logits")
def head_scaled(original: Any) -> Any:
    """The tied head carries the embedding's factor sqrt(D)."""
    return lambda self, x, *tap: original(self, x * self.config.hidden_size**0.5, *tap)


@plant("vidi.decoder.decoder.Decoder.logits")
def head_off_by_one(original: Any) -> Any:
    """The head's rows are off by one id."""
    return lambda self, x, *tap: original(self, x, *tap).roll(1, -1)


@plant("vidi.loss.shift", case="train")
def labels_not_shifted(original: Any) -> Any:
    """A position is judged by its own token."""
    return lambda labels: labels


@plant("vidi.loss.shift", case="train")
def labels_shifted_twice(original: Any) -> Any:
    """A position is judged by the token after the next."""
    return lambda labels: original(original(labels))


@plant("vidi.loss.shift", case="train")
def labels_rolled(original: Any) -> Any:
    """The last position is judged by the first token."""
    return lambda labels: labels.roll(-1, 1).masked_fill(labels.roll(-1, 1) == -100, 5)


@plant("vidi.loss.per_token", case="train")
def loss_smoothed(original: Any) -> Any:
    """Labels smoothed by 1 %."""
    from vidi import loss

    return lambda logits, labels: nnf.cross_entropy(
        logits.flatten(0, 1),
        loss.shift(labels).flatten(),
        ignore_index=-100,
        reduction="none",
        label_smoothing=0.01,
    )


@plant("vidi.loss.mean_above", case="train")
def loss_over_all_positions(original: Any) -> Any:
    """The mean counts ignored positions."""
    return lambda losses, labels, threshold=None: losses.mean()


@plant("vidi.loss.mean_above", case="train")
def loss_over_unshifted_labels(original: Any) -> Any:
    """The mean is divided by one label too many, the one that the shift drops."""
    return lambda losses, labels, threshold=None: losses.sum() / ((labels != -100).sum() + 1)


@plant(PREFILL, case="decode")
def pad_row_read(original: Any) -> Any:
    """Decoding starts from the last column, which is padding in shorter rows, as in the release."""

    def prefill(self: Any, batch: Any, capacity: int, streams: Any = None) -> Any:
        cache = original(self, batch, capacity, streams)[1]
        return self(batch)[:, -1], cache

    return prefill


@plant(PREFILL, case="decode")
def first_row_read(original: Any) -> Any:
    """All rows start from the first row's logits."""

    def prefill(self: Any, batch: Any, capacity: int, streams: Any = None) -> Any:
        logits, cache = original(self, batch, capacity, streams)
        return logits[:1].expand_as(logits).contiguous(), cache

    return prefill


@plant(PREFILL, case="decode")
def last_but_one_read(original: Any) -> Any:
    """Decoding starts from the token before the last."""

    def prefill(self: Any, batch: Any, capacity: int, streams: Any = None) -> Any:
        logits, cache = original(self, batch, capacity, streams)
        return self(batch)[torch.arange(len(logits)), cache.lengths_B - 2], cache

    return prefill


@plant(PREFILL, case="decode")
def placeholder_counted(original: Any) -> Any:
    """Lengths count the placeholder: decoding leaves a gap of one."""

    def prefill(self: Any, batch: Any, capacity: int, streams: Any = None) -> Any:
        logits, cache = original(self, batch, capacity + 1, streams)
        cache.lengths_B = cache.lengths_B + 1
        return logits, cache

    return prefill


@plant(GREEDY, case="decode")
def stop_token_of_config(original: Any) -> Any:
    """Decoding stops at the token after the right one, so never."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        config = model.config
        model.config = dataclasses.replace(config, end_of_turn_id=1)
        try:
            return original(model, batch, **rest)
        finally:
            model.config = config

    return greedy


@plant(GREEDY, case="decode")
def stop_token_kept(original: Any) -> Any:
    """The stop token stays among the tokens, so that it counts twice."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        found = original(model, batch, **rest)
        stop = model.config.end_of_turn_id
        tokens = [row + [stop] * ended for row, ended in zip(found.tokens, found.stopped, strict=True)]
        return dataclasses.replace(found, tokens=tokens)

    return greedy


@plant(GREEDY, case="decode")
def first_stop_ends_all(original: Any) -> Any:
    """The first row that stops ends every row."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        found = original(model, batch, **rest)
        ends = [len(row) for row, ended in zip(found.tokens, found.stopped, strict=True) if ended]
        cut, stop = min(ends, default=None), model.config.end_of_turn_id
        tokens = [row[:cut] + [stop] * len(row[cut:]) for row in found.tokens]  # as long as before
        return dataclasses.replace(found, tokens=tokens)

    return greedy


@plant(GREEDY, case="decode")
def rows_answer_for_each_other(original: Any) -> Any:
    """Answers are given out to the wrong rows."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        found = original(model, batch, **rest)
        return dataclasses.replace(found, tokens=found.tokens[::-1], stopped=found.stopped[::-1])

    return greedy


@plant(GREEDY, case="decode")
def second_best(original: Any) -> Any:
    """The second most likely token first."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        prefill = model.prefill

        def second(*given: Any) -> Any:
            logits, cache = prefill(*given)
            return logits.scatter(1, logits.argmax(-1, keepdim=True), -torch.inf), cache

        model.prefill = second
        try:
            return original(model, batch, **rest)
        finally:
            del model.prefill

    return greedy


@plant(GREEDY, case="decode")
def one_token_short(original: Any) -> Any:
    """The limit is one token too low."""
    return lambda model, batch, *, max_new_tokens, **rest: _padded(
        original(model, batch, max_new_tokens=max_new_tokens - 1, **rest)
    )


def _padded(found: Any) -> Any:
    """The lost token stands as the one before it, so that the answer keeps its shape."""
    tokens = [row if ended else [*row, row[-1]] for row, ended in zip(found.tokens, found.stopped, strict=True)]
    return dataclasses.replace(found, tokens=tokens)


@plant(GREEDY, case="decode")
def token_fed_late(original: Any) -> Any:
    """Steps are fed the token before the last."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        step, fed = model.step, []

        def late(ids: Any, cache: Any) -> Any:
            fed.append(ids)
            return step(fed[max(len(fed) - 2, 0)], cache)

        model.step = late
        try:
            return original(model, batch, **rest)
        finally:
            del model.step

    return greedy


@plant(f"{GREEDY}[lengths]", case="decode")
def padding_counts_as_answer(original: Any) -> Any:
    """A row that has stopped goes on with padding until all have."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        found = original(model, batch, **rest)
        stop, longest = model.config.end_of_turn_id, max(map(len, found.tokens))
        rows = [row + [stop] * ended for row, ended in zip(found.tokens, found.stopped, strict=True)]
        tokens = [row + [model.config.pad_id] * (longest - len(row)) for row in rows]
        return dataclasses.replace(found, tokens=tokens, stopped=[False] * len(rows))

    return greedy
