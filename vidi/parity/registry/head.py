"""Head, loss (spec §8) and decoding."""

from __future__ import annotations

from torch import Tensor

from vidi import loss
from vidi.parity.bench import NotHeld, Site, Stage
from vidi.parity.registry import code

__all__ = ["STAGES"]


def _elsewhere(s: Site) -> Tensor:
    raise NotHeld("decoding is a chain of its own: no stage of it is fed alone")


def _per_token(s: Site) -> Tensor:
    labels_BT = s["text.labels"]
    return loss.per_token(s["logits"].reshape(*labels_BT.shape, -1), labels_BT)


def _mean_loss(s: Site) -> Tensor:
    named = s.bench.case.info.get("loss_thresholds", {"none": None})
    value = loss.mean_above(s["loss.per_token"], s["text.labels"], named[s.places["n"]])
    return value.reshape(s.bench.golden(s.id("loss.{n}")).shape)


STAGES: tuple[Stage, ...] = (
    Stage(
        "final.norm",
        ("{last}",),
        lambda s: s.model.decoder.norm(s["{last}"]),
        (code.DECODER + "norm.", "model.decoder.norm"),
        "§8",
        "final GemmaNorm",
    ),
    Stage(
        "logits",
        ("final.norm",),
        lambda s: s.model.decoder.logits(s["final.norm"]),
        (code.DECODER + "decoder.Decoder.logits", code.DECODER + "decoder.softcap"),
        "§8",
        "tied head, softcap",
    ),
    Stage(
        "loss.per_token",
        ("logits", "text.labels"),
        _per_token,
        ("vidi.loss.per_token", "vidi.loss.shift"),
        "§8",
        "cross-entropy of each position",
    ),
    Stage(
        "loss.{n}",
        ("loss.per_token", "text.labels"),
        _mean_loss,
        ("vidi.loss.mean_above", "vidi.loss.shift"),
        "§8",
        "mean above the cut",
    ),
    Stage(
        "{n}.cached.logits",
        ("logits",),
        _elsewhere,
        (
            "vidi.cache.",
            "vidi.generate.forced_logits",
            "vidi.model.VidiModel.prefill",
            code.DECODER + "decoder.Decoder.step",
            code.DECODER + "decoder.Decoder.forward[cache]",
            "vidi.attention.mask.sees[cached]",
            code.LAYER + "text_to_text[cached]",
        ),
        "§7",
        "logits of decoding step by step, equal to those of whole passes",
    ),
    Stage("{n}.tokens", ("logits",), _elsewhere, ("vidi.generate.greedy[tokens]",), "§2", "what greedy decoding says"),
    Stage("{n}.lengths", ("logits",), _elsewhere, ("vidi.generate.greedy[lengths]",), "§2", "where each row stops"),
)
