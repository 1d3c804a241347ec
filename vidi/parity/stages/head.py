"""Head, loss (spec §8) and decoding."""

from __future__ import annotations

from stageparity.code import code, part
from stageparity.stage import Stage, Ties
from vidi.parity.stages.code import ALONE, DECODER, TEXT, decoder, layer, mask, norm
from vidi.parity.stages.visual import rounded

__all__ = ["STAGES"]

generate, loss = code("vidi.generate"), code("vidi.loss")
TIES = Ties("{n}.nocache.logits", "{n}.tokens", "{n}.lengths")

STAGES: tuple[Stage, ...] = (
    Stage(
        "final.norm", "final GemmaNorm", "§8", "B T D",
        inputs=("{last}",), run=lambda s: s.model.decoder.norm(s["{last}"]), wiring=(DECODER["norm"],),
        code=(norm, part("decoder.norm")), rounded=rounded.final_norm,
    ),
    Stage(
        "logits", "tied head, softcap", "§8", "B T U", rows=None,
        inputs=("final.norm",), run=lambda s: s.model.decoder.logits(s["final.norm"]), wiring=(TEXT["logits"],),
        code=(decoder.logits, code("vidi.decoder.decoder.softcap")), rounded=rounded.logits,
    ),
    Stage(
        "loss.per_token", "cross-entropy of each position", "§8", rows=(0,), when=("loss",),
        inputs=("logits", "text.labels"), run=ALONE.per_token,
        code=(loss.per_token, loss.shift), rounded=rounded.per_token,
    ),
    Stage(
        "loss.{n}", "mean above the cut", "§8", rows=(0,), when=("loss",),
        inputs=("loss.per_token", "text.labels"), run=ALONE.mean_loss,
        code=(loss.mean_above, loss.shift),
    ),
    Stage("grad.{n}", "gradient of a loss for a parameter", "§8", rows=(0,), least=2, when=("loss",), own_chain=True),
    Stage(
        "{n}.nocache.logits", "logits along the golden's tokens, by whole passes", "§7", own_chain=True, when=("decoding",),
        inputs=("logits",),
    ),
    Stage(
        "{n}.cached.logits", "logits of decoding step by step, equal to those of whole passes", "§7", own_chain=True,
        inputs=("logits",), golden="{n}.nocache.logits", when=("decoding",),
        code=(
            code("vidi.cache"), generate.forced_logits, code("vidi.model.Pipeline.prefill"), decoder.step,
            decoder.forward["cache"], mask.sees["cached"], layer.text_to_text["cached"],
        ),
    ),
    Stage("{n}.prompt_ids", "what decoding starts from", "§2", exact=True, own_chain=True, when=("decoding",)),
    Stage(
        "{n}.tokens", "what greedy decoding says", "§2", exact=True, own_chain=True, inputs=("logits",), ties=TIES,
        code=(generate.greedy["tokens"],), when=("decoding",),
    ),
    Stage(
        "{n}.lengths", "where each row stops", "§2", exact=True, own_chain=True, inputs=("logits",), ties=TIES,
        code=(generate.greedy["lengths"],), when=("decoding",),
    ),
)  # fmt: skip
