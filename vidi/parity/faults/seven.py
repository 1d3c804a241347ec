"""Faults of the 7B's own code, and each way of mixing it with 1.5 9B (its spec: what differs, section by section)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as nnf

from stageparity.faults.plant import plant
from vidi.bridge.conv_pool import square

BASE, TRAIN, DECODE = "small-7b/base", "small-7b/train", "small-7b/decode"
POOL = "vidi.bridge.conv_pool.ConvPool."
CONV, SAMPLED, SAMPLE, GRID = "model.bridge.image_grid.conv", POOL + "sampled", POOL + "sample", POOL + "forward"
LAYER, NORM = "vidi.decoder.layer.DecoderLayer.", "vidi.decoder.norm.plain_norm"
LOGITS, GREEDY = "vidi.decoder.decoder.Decoder.logits", "vidi.generate.greedy"
ACTIVATION, EAGER = "model.decoder.layers.*.mlp.activation", "vidi.attention.eager.attend"


# ---- convolution and pool, where the 9B folds -------------------------------------------------------------------------------


@plant(CONV, case=BASE)
def fold_for_conv(original: Any) -> Any:
    """Windows are averaged: what is seen without the learned convolution."""
    return lambda x: nnf.avg_pool2d(x, original.__self__.kernel_size, stride=1)


@plant(CONV, case=BASE)
def conv_with_gelu(original: Any) -> Any:
    """A GELU behind the convolution."""
    return lambda x: nnf.gelu(original(x))


@plant(CONV, case=BASE)
def conv_padded(original: Any) -> Any:
    """Zeros all around, cut to size: every window stands one patch up and left."""
    return lambda x: original(nnf.pad(x, (1, 1, 1, 1)))[..., :-2, :-2]


@plant(CONV + ".weight", case=BASE)
def conv_flipped(original: Any) -> Any:
    """A true convolution: the kernel turned by half."""
    return original.flip(2, 3)


@plant(CONV + ".weight", case=BASE)
def conv_transposed(original: Any) -> Any:
    """Rows and columns of the kernel exchanged."""
    return original.transpose(2, 3).contiguous()


@plant(CONV + ".weight", case=BASE)
def conv_channels_exchanged(original: Any) -> Any:
    """Channels in and out exchanged."""
    return original.transpose(0, 1).contiguous()


@plant(CONV + ".weight", case=BASE)
def conv_by_channel(original: Any) -> Any:
    """A convolution of each channel alone."""
    return original * torch.eye(len(original), dtype=original.dtype)[..., None, None]


@plant("vidi.bridge.conv_pool.square", case=BASE)
def patches_columns_first(original: Any) -> Any:
    """Patches laid out column by column."""
    return lambda tower: original(tower).transpose(-1, -2)


def _pooled(name: str, what: str, how: Any) -> Any:
    """Another way from all of the convolution, (F, C, R, R), to N samples a side."""

    def make(original: Any) -> Any:
        if original.__name__ == "sampled":
            return lambda self, conv: conv
        return lambda self, conv: how(conv, self.pool)

    make.__module__, make.__name__, make.__doc__ = __name__, name, what
    return plant(SAMPLED, SAMPLE, case=BASE)(make)


pool_corners_not_aligned = _pooled(
    "pool_corners_not_aligned",
    "align_corners=False.",
    lambda x, n: nnf.interpolate(x, size=(n, n), mode="bilinear", align_corners=False),
)
pool_nearest = _pooled("pool_nearest", "Nearest neighbour.", lambda x, n: nnf.interpolate(x, size=(n, n)))
pool_bicubic = _pooled(
    "pool_bicubic", "Bicubic.", lambda x, n: nnf.interpolate(x, size=(n, n), mode="bicubic", align_corners=True)
)
pool_average = _pooled("pool_average", "Adaptive average pooling.", nnf.adaptive_avg_pool2d)
pool_maximum = _pooled("pool_maximum", "Adaptive maximum pooling.", nnf.adaptive_max_pool2d)
pool_antialiased = _pooled(
    "pool_antialiased",
    "Antialiased.",
    lambda x, n: nnf.interpolate(x, size=(n, n), mode="bilinear", align_corners=True, antialias=True),
)


@plant(SAMPLE, case=BASE)
def pool_height_and_width_exchanged(original: Any) -> Any:
    """h and w of the pool swapped."""
    return lambda self, conv: original(self, conv).transpose(-1, -2)


@plant(SAMPLE, case=BASE)
def pool_columns_reversed(original: Any) -> Any:
    """Columns from right to left."""
    return lambda self, conv: original(self, conv).flip(-1)


@plant("model.bridge.image_grid.weights_NS", case=BASE)
def pool_neighbours_even(original: Any) -> Any:
    """Two neighbours weigh alike, wherever the sample stands."""
    return (original > 0) / (original > 0).sum(1, keepdim=True) + original * 1e-3


@plant("model.bridge.image_grid.rows", case=BASE)
def pool_rows_shifted(original: Any) -> Any:
    """Rows between the corners are taken one too early."""
    return [row - (0 < row < original[-1]) for row in original]


@plant(f"{GRID}[pool]", case=BASE)
def pool_of_patches(original: Any) -> Any:
    """The pool reads the patches, not what the convolution made of them."""

    def forward(self: Any, tower: Any, group: Any, tap: Any) -> Any:
        rows = max(self.rows) + 1
        whole = lambda stage, x: tap(stage, x) if stage == "vision.conv" else x  # noqa: E731
        original(self, tower, group, whole)
        pooled = self.sample(self.sampled(square(tower)[..., :rows, :rows]))
        return tap("vision.pool", pooled).permute(0, 2, 3, 1)

    return forward


@plant("vidi.bridge.visual._frame_tokens[projector]", case=BASE)
def pool_behind_projector(original: Any) -> Any:
    """Every window is projected, and the result pooled."""

    def tokens(bridge: Any, tower: Any, group: Any, embeddings: Any, tap: Any) -> Any:
        grid, project = bridge.image_grid, bridge.image_projector.forward

        def late(pooled: Any) -> Any:
            all_windows = project(grid.conv(square(tower)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return grid.sample(grid.sampled(all_windows)).permute(0, 2, 3, 1)

        bridge.image_projector.forward = late
        try:
            return original(bridge, tower, group, embeddings, tap)
        finally:
            del bridge.image_projector.forward

    return tokens


@plant(f"{GRID}[projector]", case=BASE)
def projector_reads_columns_first(original: Any) -> Any:
    """The projector is given the grid column by column."""
    return lambda *given: original(*given).transpose(1, 2)


@plant("model.bridge.llm_norm", case=BASE)
def llm_norm_missing(original: Any) -> Any:
    """The last norm of the bridge left out."""
    return lambda x: x


# ---- text and norms ---------------------------------------------------------------------------------------------------------


@plant("vidi.decoder.decoder.Decoder.scaled", case=BASE)
def factor_of_the_9b(original: Any) -> Any:
    """Text and streams times sqrt(D)."""
    return lambda self, x: x * x.shape[-1] ** 0.5


@plant("vidi.decoder.decoder.Decoder.carry[v]", case=BASE)
def factor_on_frames(original: Any) -> Any:
    """The visual stream alone times sqrt(D)."""

    def carry(self: Any, streams: Any, *given: Any) -> Any:
        found = streams.get("v")
        larger = {"v": dataclasses.replace(found, x_BLD=found.x_BLD * found.x_BLD.shape[-1] ** 0.5)} if found else {}
        return original(self, streams | larger, *given)

    return carry


@plant(NORM, case=BASE)
def norm_weight_plus_one(original: Any) -> Any:
    """1 + weight, as Gemma stores it."""
    return lambda x, weight, eps: original(x, weight + 1, eps)


@plant(NORM, case=BASE)
def norm_eps_of_the_9b(original: Any) -> Any:
    """Epsilon 1e-6."""
    return lambda x, weight, eps: original(x, weight, 1e-6)


@plant(NORM, case=BASE)
def norm_eps_of_the_bridge(original: Any) -> Any:
    """Epsilon 1e-5, whatever rms_norm_eps says."""
    return lambda x, weight, eps: original(x, weight, 1e-5)


@plant(NORM, case=BASE)
def norm_centred(original: Any) -> Any:
    """The mean is subtracted, as in LayerNorm."""
    return lambda x, weight, eps: original(x - x.mean(-1, keepdim=True), weight, eps)


@plant(NORM, case=BASE)
def norm_weight_missing(original: Any) -> Any:
    """Norms without weight."""
    return lambda x, weight, eps: original(x, torch.ones_like(weight), eps)


@plant(NORM, case=BASE)
def norm_weight_reversed(original: Any) -> Any:
    """Weights in reverse order."""
    return lambda x, weight, eps: original(x, weight.flip(0), eps)


@plant(NORM, case=BASE, dtype="float16")
def norm_cast_late(original: Any) -> Any:
    """The product with the weight in float32, as in Gemma: one rounding in place of two."""

    def plain_norm(x: Any, weight: Any, eps: float) -> Any:
        wide = x.float()
        return (weight.float() * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))).to(x.dtype)

    return plain_norm


@plant(NORM, case=BASE, dtype="float16")
def norm_in_half(original: Any) -> Any:
    """The norm in float16."""
    return lambda x, weight, eps: weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps))


# ---- layers -----------------------------------------------------------------------------------------------------------------


@plant(LAYER + "merge[text]", case=BASE)
def attention_normed_as_in_the_9b(original: Any) -> Any:
    """The sum of the attentions is normed before it is added."""

    def merge(self: Any, x: Any, branches: Any) -> Any:
        if len(branches) == 1:  # a stream's, which are judged apart
            return original(self, x, branches)
        mixed = sum(branches)
        return self.feed_forward(x + mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + self.input_norm.eps))

    return merge


@plant("model.decoder.layers.*.post_ffn_norm", case=BASE)
def feed_forward_normed_as_in_the_9b(original: Any) -> Any:
    """What the feed-forward gives back is normed before it is added."""
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


@plant(LAYER + "merge[text]", case=BASE)
def attentions_averaged(original: Any) -> Any:
    """The attentions are averaged, as if one attention had seen all keys."""
    return lambda self, x, branches: original(self, x, [b / len(branches) for b in branches])


@plant(ACTIVATION, case=BASE)
def gelu_of_the_9b(original: Any) -> Any:
    """GELU (tanh) in place of SiLU."""
    return lambda x: nnf.gelu(x, approximate="tanh")


@plant(ACTIVATION, case=BASE)
def gelu_erf(original: Any) -> Any:
    """GELU (erf) in place of SiLU."""
    return nnf.gelu


@plant(ACTIVATION, case=BASE)
def sigmoid_alone(original: Any) -> Any:
    """A sigmoid gate: SiLU without its factor."""
    return torch.sigmoid


@plant("model.decoder.layers.1.window", case=BASE)
def window_on_even_layers(original: Any) -> Any:
    """No window on the odd layer, as in the 9B."""
    return None


@plant("model.decoder.layers.*.window", case=BASE)
def window_twice_as_wide(original: Any, model: Any) -> Any:
    """A window twice as wide on every layer."""
    return 2 * original


def _attending(name: str, what: str, use: str, change: Any) -> Any:
    def make(original: Any) -> Any:
        def attend(call: Any) -> Any:
            own = "self" if call.q_pos_BT is not None else "cross"
            return original(dataclasses.replace(call, **change(call)) if use == own else call)

        return attend

    make.__module__, make.__name__, make.__doc__ = __name__, name, what
    return plant(f"{EAGER}[{use}]", case=BASE)(make)


softcap_of_the_9b = _attending("softcap_of_the_9b", "Scores are capped at 50.", "self", lambda call: {"softcap": 50.0})
softcap_of_the_9b_cross = _attending(
    "softcap_of_the_9b_cross",
    "Scores of the cross-attentions are capped at 50.",
    "cross",
    lambda call: {"softcap": 50.0},
)
scale_of_one_more = _attending(
    "scale_of_one_more",
    "Scaled by (H+1)^-0.5.",
    "self",
    lambda call: {"scale": (call.q_BTNH.shape[-1] + 1) ** -0.5},
)
scale_of_one_more_cross = _attending(
    "scale_of_one_more_cross",
    "Cross-attentions scaled by (H+1)^-0.5.",
    "cross",
    lambda call: {"scale": (call.q_BTNH.shape[-1] + 1) ** -0.5},
)
scale_of_the_width = _attending(
    "scale_of_the_width",
    "Scaled by (D/N)^-0.5, though heads are wider than that.",
    "self",
    lambda call: {"scale": (24 / call.q_BTNH.shape[2]) ** -0.5},
)
scale_of_the_9b = _attending(
    "scale_of_the_9b", "Scaled by 256^-0.5, query_pre_attn_scalar.", "cross", lambda call: {"scale": 256**-0.5}
)


# ---- head, loss, decoding -----------------------------------------------------------------------------------------------------


@plant(LOGITS, case=BASE)
def head_tied(original: Any) -> Any:
    """The embedding as head, as in the 9B."""

    def logits(self: Any, x: Any, tap: Any = lambda stage, x: x) -> Any:
        return tap("lm_head", nnf.linear(x, self.embed.weight))

    return logits


@plant("model.decoder.head.weight", case=BASE)
def head_rows_off_by_one(original: Any) -> Any:
    """The head's rows are off by one id."""
    return original.roll(1, 0)


@plant("vidi.decoder.decoder.Decoder.finished", case=BASE)
def final_softcap_of_the_9b(original: Any) -> Any:
    """Logits are capped at 30."""
    return lambda self, *given: 30 * torch.tanh(original(self, *given) / 30)


@plant("model.decoder.norm", case=BASE)
def final_norm_missing(original: Any) -> Any:
    """No norm in front of the head."""
    return lambda x: x


@plant("vidi.loss.labelled[labels]", case=TRAIN)
def labels_of_the_next_place(original: Any) -> Any:
    """Each labelled place has the label of the next one."""
    return lambda labels: (original(labels)[0], original(labels)[1].roll(-1, 0))


@plant("vidi.loss.labelled", case=TRAIN)
def loss_first_place_twice(original: Any) -> Any:
    """The first labelled place stands in the place of the last."""

    def labelled(labels: Any) -> Any:
        places, targets = original(labels)
        return torch.cat((places[:-1], places[:1])), targets

    return labelled


@plant("vidi.loss.labelled", case=TRAIN)
def loss_places_reversed(original: Any) -> Any:
    """Labelled places in reverse order, their labels not."""
    return lambda labels: (original(labels)[0].flip(0), original(labels)[1])


@plant("vidi.loss.cross_entropy", case=TRAIN)
def loss_smoothed(original: Any) -> Any:
    """Labels smoothed by 1 %."""
    return lambda logits, targets: nnf.cross_entropy(logits, targets, reduction="none", label_smoothing=0.01)


@plant("vidi.loss.mean_of", case=TRAIN)
def loss_over_all_positions(original: Any) -> Any:
    """The sum is divided by one more than there are labels."""
    return lambda losses, threshold=None: losses.sum() / (len(losses) + 1)


@plant("vidi.model.VidiModel.losses[logits]", case=TRAIN)
def loss_reads_the_place_before(original: Any) -> Any:
    """The head reads the place before each labelled one."""

    def losses(self: Any, batch: Any, **options: Any) -> Any:
        logits, tap = self.decoder.logits, options["tap"]
        kept: list[Any] = []

        def here(stage: str, x: Any) -> Any:
            back = tap(stage, x)
            if stage == "final.norm":
                kept.append(back)
            if stage == "loss.kept":
                kept.append(back)
            return back

        self.decoder.logits = lambda x: logits(kept[0][kept[1][:, 0], kept[1][:, 1] - 1])
        try:
            return original(self, batch, **(options | {"tap": here}))
        finally:
            del self.decoder.logits

    return losses


@plant(GREEDY, case=DECODE)
def stop_token_of_the_9b(original: Any) -> Any:
    """Decoding stops at 107, the 9B's end of turn, so never."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        config = model.config
        model.config = dataclasses.replace(config, end_of_turn_id=107)
        try:
            return original(model, batch, **rest)
        finally:
            model.config = config

    return greedy


@plant(f"{GREEDY}[tokens]", case="official-7b/generate", dtype="float32")
def second_token_repeated(original: Any) -> Any:
    """What the release's free decoding says, with one token for another."""

    def greedy(model: Any, batch: Any, **rest: Any) -> Any:
        found = original(model, batch, **rest)
        return dataclasses.replace(found, tokens=[[row[0], row[0], *row[2:]] for row in found.tokens])

    return greedy
