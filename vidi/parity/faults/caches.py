"""Faults of the caches: seen when decoding step by step against whole passes (spec §7, §10)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stageparity.code import code
from stageparity.faults.plant import plant

EXTEND, STEP = code("vidi.cache.LayerTextCache.extend"), code("vidi.decoder.decoder.Decoder.step")


@plant(EXTEND, case="decode")
def written_one_early(original: Any) -> Any:
    """New keys overwrite the token before them."""
    return lambda self, k, v, pos: original(self, k, v, pos if k.shape[1] > 1 else (pos - 1).clamp(min=0))


@plant(EXTEND, case="decode")
def written_one_late(original: Any) -> Any:
    """New keys leave a gap of one."""
    return lambda self, k, v, pos: original(self, k, v, (pos + 1).clamp(max=self.k_BSGH.shape[1] - 1))


@plant(EXTEND, case="decode")
def stale(original: Any) -> Any:
    """Steps read the prompt's keys alone: their own are not written."""
    return lambda self, k, v, pos: original(self, k, v, pos) if k.shape[1] > 1 else (self.k_BSGH, self.v_BSGH)


@plant(EXTEND, case="decode")
def values_not_written(original: Any) -> Any:
    """Steps write keys, not values."""

    def extend(self: Any, k: Any, v: Any, pos: Any) -> Any:
        held = self.v_BSGH.clone()
        keys, values = original(self, k, v, pos)
        if k.shape[1] == 1:
            values.copy_(held)
        return keys, values

    return extend


@plant(EXTEND, case="decode")
def written_at_longest_row(original: Any) -> Any:
    """All rows write at the longest row's position."""
    return lambda self, k, v, pos: original(self, k, v, pos if k.shape[1] > 1 else pos.max().expand_as(pos))


@plant(EXTEND, case="decode")
def rows_exchanged(original: Any) -> Any:
    """Steps write a row's keys into the other row."""
    return lambda self, k, v, pos: (
        original(self, k, v, pos) if k.shape[1] > 1 else original(self, k.flip(0), v.flip(0), pos.flip(0))
    )


@plant("vidi.attention.mask.sees[cached]", case="decode")
def window_one_short_cached(original: Any) -> Any:
    """The cache of sliding layers shifts one step early, as in the release: w keys in steps, w + 1 in whole passes."""
    return lambda q, k, window=None: original(q, k, window if window is None or q.shape[1] > 1 else window - 1)


@plant("vidi.attention.mask.sees[cached]", case="decode")
def window_forgotten_in_steps(original: Any) -> Any:
    """Steps see all cached keys on sliding layers."""
    return lambda q, k, window=None: original(q, k, None if q.shape[1] == 1 else window)


@plant("vidi.attention.mask.sees[cached]", case="decode")
def aligned_at_the_end(original: Any) -> Any:
    """Queries aligned with the end of the cache: a step sees what lies beyond its row."""
    return lambda q, k, window=None: original(q if q.shape[1] > 1 else torch.full_like(q, int(k[-1])), k, window)


@plant(STEP["text"], case="decode")
def position_stands_still(original: Any) -> Any:
    """Positions are not counted up: every new token stands at the prompt's end."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        lengths = cache.lengths_B
        out = original(self, ids, cache, **rest)
        cache.lengths_B = lengths
        return out

    return step


@plant(STEP["text"], case="decode")
def position_of_longest_row(original: Any) -> Any:
    """All rows continue from the longest row's end, as right-padded batches do in the release."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        cache.lengths_B = cache.lengths_B.max().expand_as(cache.lengths_B)
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["text"], case="decode")
def wrong_layer(original: Any) -> Any:
    """Layers read each other's text cache."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        if not hasattr(cache, "turned"):
            cache.turned, cache.text = True, cache.text[1:] + cache.text[:1]
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["streams"], case="decode")
def streams_of_wrong_layer(original: Any) -> Any:
    """Steps read the streams of the layer before."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        if not hasattr(cache, "turned"):
            cache.turned, cache.cross = True, cache.cross[-1:] + cache.cross[:-1]
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["streams"], case="decode")
def streams_of_first_layer(original: Any) -> Any:
    """Steps read the first layer's streams everywhere."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        cache.cross = [cache.cross[0]] * len(cache.cross)
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["streams"], case="decode")
def streams_left_out(original: Any) -> Any:
    """Steps do not read the audio."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        cache.cross = [{m: keys for m, keys in cross.items() if m == "v"} for cross in cache.cross]
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["streams"], case="decode")
def stream_masks_lost(original: Any) -> Any:
    """Steps read padded stream tokens too."""
    from vidi.attention.unpad import Rows

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        cache.cross = [
            {m: dataclasses.replace(x, rows=Rows.all_kept(*x.rows.keep_BL.shape)) for m, x in cross.items()}
            for cross in cache.cross
        ]
        return original(self, ids, cache, **rest)

    return step


@plant(STEP["input"], case="decode")
def embedding_not_scaled_in_steps(original: Any) -> Any:
    """New tokens miss the factor sqrt(D)."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        self.scaled = lambda x: x
        try:
            return original(self, ids, cache, **rest)
        finally:
            del self.scaled

    return step


@plant(STEP["output"], case="decode")
def mlp_left_out_in_steps(original: Any) -> Any:
    """Steps go through attention alone."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        for layer in self.layers:
            layer.feed_forward = lambda x: x
        try:
            return original(self, ids, cache, **rest)
        finally:
            for layer in self.layers:
                del layer.feed_forward

    return step


@plant(STEP["norm"], case="decode")
def final_norm_left_out_in_steps(original: Any) -> Any:
    """The head reads what the last layer of a step gives."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        self.norm.forward = lambda x: x
        try:
            return original(self, ids, cache, **rest)
        finally:
            del self.norm.forward

    return step


@plant(STEP["head"], case="decode")
def head_off_by_one_in_steps(original: Any) -> Any:
    """A step's logits stand one id further."""

    def step(self: Any, ids: Any, cache: Any, **rest: Any) -> Any:
        finished = self.finished
        self.finished = lambda raw, *tap: finished(raw.roll(1, -1), *tap)
        try:
            return original(self, ids, cache, **rest)
        finally:
            del self.finished

    return step


@plant("vidi.decoder.layer.DecoderLayer.text_to_text[cached]", case="decode")
def keys_cached_unrotated(original: Any) -> Any:
    """Keys of steps are cached before they are rotated."""
    from vidi.attention import rope

    def text_to_text(self: Any, n: Any, text: Any, cache: Any = None) -> Any:
        if cache is None or n.shape[1] > 1:
            return original(self, n, text, cache)
        q = rope.apply(self.attention.queries(n), text.cos_BTH, text.sin_BTH)
        k, v = cache.extend(*self.attention.keys_values(n), text.pos_BT)
        heads = self.attention.attend_self(
            q, k, v, q_pos_BT=text.pos_BT, window=self.window, keep_q=None, keep_k=None, backend=text.backend
        )
        return self.attention.output(heads)

    return text_to_text


@plant("vidi.decoder.layer.DecoderLayer.text_to_text[cached]", case="decode")
def queries_of_steps_unrotated(original: Any) -> Any:
    """Queries of steps are not rotated."""
    from vidi.attention import rope

    def text_to_text(self: Any, n: Any, text: Any, cache: Any = None) -> Any:
        if cache is None or n.shape[1] > 1:
            return original(self, n, text, cache)
        k, v = self.attention.keys_values(n)
        k, v = cache.extend(rope.apply(k, text.cos_BTH, text.sin_BTH), v, text.pos_BT)
        heads = self.attention.attend_self(
            self.attention.queries(n),
            k,
            v,
            q_pos_BT=text.pos_BT,
            window=self.window,
            keep_q=None,
            keep_k=None,
            backend=text.backend,
        )
        return self.attention.output(heads)

    return text_to_text
