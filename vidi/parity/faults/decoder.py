"""Faults of the decoder's layers, norms, MLP and streams (spec §7)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant

LAYER = "vidi.decoder.layer.DecoderLayer."
MLP = "vidi.decoder.mlp.GatedMlp.forward"
NORM = "vidi.decoder.norm.gemma_norm"


@plant(NORM)
def norm_eps(original: Any) -> Any:
    """Epsilon 1e-5, the bridge's, in GemmaNorm (1e-6)."""
    return lambda x, weight, eps: original(x, weight, 1e-5)


@plant(NORM)
def norm_weight_plain(original: Any) -> Any:
    """The weight is taken as it is stored, without + 1."""
    return lambda x, weight, eps: original(x, weight - 1, eps)


@plant(NORM)
def norm_weight_plus_two(original: Any) -> Any:
    """1 is added when loading and again when norming."""
    return lambda x, weight, eps: original(x, weight + 1, eps)


@plant(NORM)
def norm_centred(original: Any) -> Any:
    """The mean is subtracted, as in LayerNorm."""
    return lambda x, weight, eps: original(x - x.mean(-1, keepdim=True), weight, eps)


@plant(NORM)
def norm_weight_reversed(original: Any) -> Any:
    """Weights in reverse order."""
    return lambda x, weight, eps: original(x, weight.flip(0), eps)


@plant("model.decoder.layers.*.input_norm")
def input_norm_missing(original: Any) -> Any:
    """Layers read their input without norm."""
    return lambda x: x


@plant("model.decoder.layers.*.post_attn_norm")
def post_attn_norm_missing(original: Any) -> Any:
    """No norm behind attention, as in Gemma 1."""
    return lambda x: x


@plant("model.decoder.layers.*.pre_ffn_norm")
def pre_ffn_norm_missing(original: Any) -> Any:
    """No norm in front of the MLP."""
    return lambda x: x


@plant("model.decoder.layers.*.post_ffn_norm")
def post_ffn_norm_missing(original: Any) -> Any:
    """No norm behind the MLP."""
    return lambda x: x


@plant("model.decoder.layers.*.pre_ffn_norm", "model.decoder.layers.*.post_ffn_norm")
def ffn_norms_exchanged(original: Any, model: Any) -> Any:
    """The two norms around the MLP exchanged."""
    own = original.__self__
    layer = next(x for x in model.decoder.layers if own in (x.pre_ffn_norm, x.post_ffn_norm))
    other = layer.post_ffn_norm if own is layer.pre_ffn_norm else layer.pre_ffn_norm
    return lambda x: type(other).forward(other, x)


@plant("model.decoder.layers.1.attention.q.weight")
def queries_of_wrong_layer(original: Any, model: Any) -> Any:
    """Layer 1 holds the query weights of layer 2."""
    return model.decoder.layers[2].attention.q.weight.data.clone()


@plant(LAYER + "merge[text]")
def branches_normed_apart(original: Any) -> Any:
    """Each attention is normed alone, then added."""

    def merge(self: Any, x: Any, branches: Any) -> Any:
        return self.feed_forward(x + sum(map(self.post_attn_norm, branches)))

    return merge


@plant(LAYER + "merge[text]")
def visual_branch_lost(original: Any) -> Any:
    """The visual attention is computed and not added."""
    return lambda self, x, branches: original(self, x, [branches[0], *branches[2:]])


@plant(LAYER + "merge[text]")
def audio_branch_twice(original: Any) -> Any:
    """The audio attention is added twice."""
    return lambda self, x, branches: original(self, x, [*branches, *branches[2:]])


@plant(LAYER + "merge[text]")
def branches_averaged(original: Any) -> Any:
    """The attentions are averaged: their norm undoes it but for its epsilon."""
    return lambda self, x, branches: original(self, x, [b / len(branches) for b in branches])


@plant(LAYER + "merge")
def residual_normed(original: Any) -> Any:
    """The residual is the normed input."""
    return lambda self, x, branches: original(self, self.input_norm(x), branches)


@plant(LAYER + "feed_forward")
def feed_forward_without_residual(original: Any) -> Any:
    """No residual around the MLP."""
    return lambda self, x: original(self, x) - x


@plant(LAYER + "feed_forward")
def feed_forward_twice(original: Any) -> Any:
    """The MLP runs twice."""
    return lambda self, x: original(self, original(self, x))


@plant(MLP)
def mlp_gelu_erf(original: Any) -> Any:
    """Exact GELU in the decoder, which uses the tanh form."""
    return lambda self, x: self.down(nnf.gelu(self.gate(x)) * self.up(x))


@plant(MLP)
def mlp_silu(original: Any) -> Any:
    """SiLU in place of GELU."""
    return lambda self, x: self.down(nnf.silu(self.gate(x)) * self.up(x))


@plant(MLP)
def mlp_gate_and_up_exchanged(original: Any) -> Any:
    """Gate and up exchanged."""
    return lambda self, x: self.down(nnf.gelu(self.up(x), approximate="tanh") * self.gate(x))


@plant(LAYER + "update_stream")
def streams_not_updated(original: Any) -> Any:
    """The streams stay as they were."""
    return lambda self, s, v: s


@plant(LAYER + "update_stream")
def streams_without_attention(original: Any) -> Any:
    """A stream token's own value is not added: the MLP alone."""
    return lambda self, s, v: self.feed_forward(s)


@plant(LAYER + "update_stream")
def streams_without_mlp(original: Any) -> Any:
    """The streams' MLP is left out."""
    return lambda self, s, v: s + self.post_attn_norm(self.attention.attend_own_token(v))


@plant(LAYER + "update_stream")
def streams_average_tokens(original: Any) -> Any:
    """Stream tokens attend to all tokens evenly in place of themselves."""
    return lambda self, s, v: original(self, s, v.mean(1, keepdim=True).expand_as(v))


@plant(LAYER + "stream_keys_values")
def stream_keys_not_normed(original: Any) -> Any:
    """Stream keys and values read the stream without input norm."""
    return lambda self, s: self.attention.keys_values(s)


@plant(LAYER + "stream_keys_values")
def stream_keys_after_layer(original: Any) -> Any:
    """Text reads the stream as it is after the layer."""
    return lambda self, s: original(self, self.update_stream(s, original(self, s)[1]))


@plant(LAYER + "stream_keys_values")
def stream_keys_normed_twice(original: Any) -> Any:
    """The stream is normed once more on the way to its keys."""
    return lambda self, s: original(self, self.input_norm(s))


@plant(LAYER + "text_to_stream[output]")
def stream_output_halved(original: Any) -> Any:
    """Cross-attention passes a gate of 1/2, as in Flamingo-like models."""
    return lambda self, *given: original(self, *given) / 2


@plant(LAYER + "text_to_text")
def self_attention_halved(original: Any) -> Any:
    """Self-attention passes a gate of 1/2."""
    return lambda self, *given: original(self, *given) / 2


@plant("model.decoder.norm")
def final_norm_missing(original: Any) -> Any:
    """No norm in front of the head."""
    return lambda x: x


@plant("model.decoder.norm.eps")
def final_norm_eps(original: float) -> float:
    """Epsilon 1e-5 in the final norm (1e-6)."""
    return 1e-5


@plant("model.decoder.norm.weight")
def final_norm_weight_missing(original: Any) -> Any:
    """The final norm at its initial weight."""
    return torch.zeros_like(original)
