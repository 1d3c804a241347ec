"""Head, loss (spec §8) and decoding."""

from __future__ import annotations

from stageparity.code import code, part
from stageparity.stage import Stage, Ties
from vidi.parity.stages.code import ALONE, DECODER, TEXT, decoder, layer, mask, norm
from vidi.parity.stages.visual import rounded

__all__ = ["DECODING", "STAGES"]

generate, loss = code("vidi.generate"), code("vidi.loss")
LOSSES = code("vidi.model.VidiModel.losses")
TIES = Ties("{n}.nocache.logits", "{n}.tokens", "{n}.lengths")
FREE = Ties("{n}.nocache.logits", "{n}.greedy_nocache.tokens", "{n}.lengths")

STAGES: tuple[Stage, ...] = (
    Stage(
        "final.norm", "final norm of the decoder", "§8", "B T D",
        inputs=("{last}",), run=lambda s: s.model.decoder.norm(s["{last}"]), wiring=(DECODER["norm"],),
        code=(norm, part("decoder.norm")), rounded=rounded.final_norm,
    ),
    Stage(
        "lm_head", "7B: what the head gives, before it is float32", "§8", "B T U", rows=None, when=("head",),
        inputs=("final.norm",), run=ALONE.lm_head, wiring=(TEXT["logits"],),
        code=(decoder.logits, part("decoder.head")), rounded=rounded.raw_logits,
    ),
    Stage(
        "logits", "9B: tied head, softcap; 7B: float32", "§8", "B T U", rows=None,
        inputs=("final.norm", "lm_head"), run=ALONE.logits, wiring=(TEXT["logits"],),
        code=(decoder.logits, decoder.finished, code("vidi.decoder.decoder.softcap")), rounded=rounded.logits,
    ),
    Stage(
        "loss.kept", "7B: row and position of each labelled place", "§8", exact=True, when=("loss", "head"),
        inputs=("text.labels",), run=lambda s: loss.labelled(s["text.labels"])[0],
        code=(loss.labelled["kept"], loss.shift),
    ),
    Stage(
        "loss.labels", "7B: what stands there", "§8", exact=True, when=("loss", "head"),
        inputs=("text.labels",), run=lambda s: loss.labelled(s["text.labels"])[1],
        code=(loss.labelled["labels"], loss.shift),
    ),
    Stage(
        "loss.logits", "7B: logits there, float32", "§8", "· U", rows=(0,), when=("loss", "head"),
        inputs=("final.norm", "loss.kept"), run=ALONE.loss_logits, wiring=(LOSSES["logits"],),
        code=(decoder.logits, decoder.finished, part("decoder.head")),
        rounded=rounded.loss_logits,
    ),
    Stage(
        "loss.per_token", "cross-entropy of each position; 7B: of each labelled one", "§8", rows=(0,), when=("loss",),
        inputs=("logits", "text.labels", "loss.logits", "loss.labels"), run=ALONE.per_token,
        code=(loss.per_token, loss.cross_entropy, loss.shift), rounded=rounded.per_token,
    ),
    Stage(
        "loss.{n}", "mean above the cut", "§8", rows=(0,), when=("loss",),
        inputs=("loss.per_token", "text.labels"), run=ALONE.mean_loss,
        code=(loss.mean_above, loss.mean_of, loss.shift),
    ),
    Stage("grad.{n}", "gradient of a loss for a parameter", "§8", rows=(0,), least=2, when=("loss",), own_chain=True),
)  # fmt: skip

DECODING: tuple[Stage, ...] = (
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
        "{n}.greedy_nocache.tokens", "7B: what greedy decoding says, by whole passes", "§2", exact=True, own_chain=True,
        inputs=("logits",), ties=FREE, code=(generate.greedy["tokens"],), when=("decoding",),
    ),
    Stage(
        "{n}.tokens", "what greedy decoding says", "§2", exact=True, own_chain=True, inputs=("logits",), ties=TIES,
        code=(generate.greedy["tokens"],), when=("decoding",),
    ),
    Stage(
        "{n}.lengths", "where each row stops", "§2", exact=True, own_chain=True, inputs=("logits",), ties=TIES,
        code=(generate.greedy["lengths"],), when=("decoding",),
    ),
)  # fmt: skip
