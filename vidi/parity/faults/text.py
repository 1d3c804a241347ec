"""Faults of the text's way in, and of the factor that all streams share (spec §6)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stageparity.faults.plant import plant
from vidi.tap import no_tap


@plant("vidi.decoder.decoder.Decoder.embed_tokens")
def padding_embedded(original: Any) -> Any:
    """Padded rows hold the embedding of id 0, not zeros."""
    return lambda self, ids, keep=None: original(self, ids)


@plant("vidi.decoder.decoder.Decoder.embed_tokens")
def embedding_scaled_early(original: Any) -> Any:
    """The factor sqrt(D) is in the embedding already, as in other Gemma code, and comes again."""
    return lambda self, ids, keep=None: original(self, ids, keep) * self.config.hidden_size**0.5


@plant("vidi.decoder.decoder.Decoder.embed_tokens")
def ids_off_by_one(original: Any) -> Any:
    """Each id reads its neighbour's embedding."""
    return lambda self, ids, keep=None: original(self, (ids + 1) % self.config.vocab_size, keep)


@plant("vidi.inputs.batch.pack_text")
def placeholder_kept(original: Any) -> Any:
    """The placeholder holds a place (as id 0), the last token falls out."""

    def pack_text(ids: Any, keep: Any = None, labels: Any = None, placeholder: int = -200, pad_id: int = 0) -> Any:
        packed, kept, own = original(ids, keep, labels, placeholder, pad_id)
        shown = original(ids.masked_fill(ids == placeholder, 0), keep, labels, placeholder, pad_id)[0]
        return shown[:, : packed.shape[1]], kept, own

    return pack_text


@plant("vidi.inputs.batch.pack_text", case="holes")
def holes_not_closed(original: Any) -> Any:
    """Only the placeholder is dropped: left padding and holes stay where they are."""

    def pack_text(ids: Any, keep: Any = None, labels: Any = None, placeholder: int = -200, pad_id: int = 0) -> Any:
        packed, _, own = original(ids, keep, labels, placeholder, pad_id)
        length = packed.shape[1]
        rows = [row[row != placeholder][:length] for row in ids]
        masks = [mask[row != placeholder][:length] for row, mask in zip(ids, keep, strict=True)]
        return torch.stack(rows).masked_fill(~torch.stack(masks), pad_id), torch.stack(masks), own

    return pack_text


@plant("vidi.inputs.batch.pack_text")
def packed_backwards(original: Any) -> Any:
    """Kept tokens in reverse order."""

    def pack_text(*given: Any, **named: Any) -> Any:
        ids, kept, labels = original(*given, **named)
        turned = [torch.cat((row[mask].flip(0), row[~mask])) for row, mask in zip(ids, kept, strict=True)]
        return torch.stack(turned), kept, labels

    return pack_text


@plant("vidi.inputs.batch.pack_text")
def packed_to_the_right(original: Any) -> Any:
    """Text padded at the left."""

    def pack_text(*given: Any, **named: Any) -> Any:
        ids, kept, labels = original(*given, **named)
        shifts = [int((~mask).sum()) for mask in kept]
        turned = [torch.stack([row.roll(n, 0) for row, n in zip(x, shifts, strict=True)]) for x in (ids, kept)]
        return turned[0], turned[1], labels

    return pack_text


@plant("vidi.model.Pipeline.embed_text")
def text_of_other_sample(original: Any) -> Any:
    """Samples have each other's text mask beside their own ids: the short one's padding counts as text."""
    from vidi.attention.unpad import Rows

    def embed_text(self: Any, batch: Any, tap: Any = no_tap) -> Any:
        embeds, rows, labels = original(self, batch)
        embeds = embeds.flip(0) if len(embeds) > 1 else embeds
        return tap("text.embeds", embeds), Rows(tap("text.mask", rows.keep_BL)), labels

    return embed_text


@plant("vidi.inputs.batch.pack_text[labels]", case="train")
def labels_keep_placeholder(original: Any) -> Any:
    """The placeholder's label stays among the labels."""

    def pack_text(ids: Any, keep: Any = None, labels: Any = None, placeholder: int = -200, pad_id: int = 0) -> Any:
        packed, kept, _ = original(ids, keep, labels, placeholder, pad_id)
        return packed, kept, labels if labels is None else labels[:, : packed.shape[1]]

    return pack_text


@plant("vidi.decoder.decoder.Decoder.scaled")
def factor_omitted(original: Any) -> Any:
    """No factor sqrt(D) at all."""
    return lambda self, x: x


@plant("vidi.decoder.decoder.Decoder.scaled")
def factor_is_width(original: Any) -> Any:
    """The factor D in place of its root."""
    return lambda self, x: x * self.config.hidden_size


@plant("vidi.decoder.decoder.Decoder.carry[v]")
def visual_factor_omitted(original: Any) -> Any:
    """The visual stream alone misses the factor sqrt(D)."""
    return _stream_times("v", -0.5, original)


@plant("vidi.decoder.decoder.Decoder.carry[a]")
def audio_factor_twice(original: Any) -> Any:
    """The audio stream alone carries the factor sqrt(D) twice."""
    return _stream_times("a", 0.5, original)


def _stream_times(modality: str, power: float, original: Any) -> Any:
    def carry(self: Any, streams: Any, *rest: Any) -> Any:
        factor = self.config.hidden_size**power
        scaled = {m: dataclasses.replace(s, x_BLD=s.x_BLD * factor) if m == modality else s for m, s in streams.items()}
        return original(self, scaled, *rest)

    return carry


@plant("vidi.model.Pipeline.embed_text[mask]")
def mask_counts_padding(original: Any) -> Any:
    """One row of padding counts as text: the mask that goes on is one token too long."""
    from vidi.attention.unpad import Rows

    def embed_text(self: Any, batch: Any, tap: Any = no_tap) -> Any:
        embeds, rows, labels = original(self, batch, lambda i, x: x if i == "text.mask" else tap(i, x))
        longer = rows.keep_BL | rows.keep_BL.roll(1, 1)
        return embeds, Rows(tap("text.mask", longer)), labels

    return embed_text
