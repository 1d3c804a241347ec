"""Faults of number formats: right mathematics, wrong casts, each in the dtype that shows it (spec §5-§7)."""

from __future__ import annotations

from typing import Any

import torch

from stageparity.faults.plant import plant

SINGLE, HALF = "float32", "bfloat16"


@plant("vidi.bridge.position.sinusoid[t]", dtype=SINGLE)
def sinusoid_in_float64(original: Any) -> Any:
    """Position angles in double precision: at p = 9999 the specified float32 product is 5e-4 rad away."""
    return lambda p, freq: original(p.double(), freq.double()).to(p.dtype) if p.max() > 1 else original(p, freq)


def _for_audio(original: Any, positions: Any) -> Any:
    """Embeddings whose positions are others for audio alone: positions themselves do not know what they are for."""

    def embed(module: Any, axis: str, *given: Any) -> Any:
        from vidi.bridge import position

        right = position.positions
        position.positions = positions if axis.startswith("t_a") else right
        try:
            return original(module, axis, *given)
        finally:
            position.positions = right

    return embed


@plant("vidi.bridge.position.embed[t_a]", case="official/single", dtype=SINGLE)
def positions_step_first(original: Any) -> Any:
    """Positions as i·((P-1)/(L-1)): another rounding of each (five frames are spared, fifteen audio tokens are not)."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        index = torch.arange(length, dtype=dtype)
        return index * ((torch.tensor(extent, dtype=dtype) - 1) / max(length - 1, 1))

    return _for_audio(original, positions)


@plant("vidi.bridge.position.embed[t_a]", case="official/silent", dtype=SINGLE)
def positions_by_linspace(original: Any) -> Any:
    """Positions by torch.linspace (two and four frames are spared, ten audio tokens are not)."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        return torch.linspace(0, extent - 1, length, dtype=dtype)

    return _for_audio(original, positions)


@plant("vidi.bridge.position.PositionEmbedding.forward[t]", dtype=HALF)
def position_mlp_in_half(original: Any) -> Any:
    """Sinusoid and position MLP of the time in the model's bf16."""
    import torch.nn.functional as nnf

    from vidi.bridge import position

    def forward(self: Any, length: int, noise: Any = None) -> Any:
        if self.extent == 2:
            return original(self, length, noise)
        half = torch.bfloat16
        table = position.sinusoid(position.positions(length, self.extent, half, noise), self.freq_K.to(half))
        inner = nnf.gelu(nnf.linear(table, self.fc1.weight.to(half), self.fc1.bias.to(half)))
        return nnf.linear(inner, self.fc2.weight.to(half), self.fc2.bias.to(half))

    return forward


@plant("vidi.bridge.position.positions[t]", dtype=HALF)
def positions_in_half(original: Any) -> Any:
    """Time positions rounded to bf16: 9999 becomes 9984."""

    def positions(length: int, extent: int, dtype: Any, noise: Any = None) -> Any:
        p = original(length, extent, dtype, noise)
        return p if extent == 2 else p.to(torch.bfloat16).to(dtype)

    return positions


@plant("vidi.attention.rope.angles[sin]", dtype=HALF)
def rope_angles_in_half(original: Any) -> Any:
    """Rotary sines of bf16 angles: frequencies are rounded before they meet a position."""

    def angles(pos: Any, head_dim: int, theta: float, dtype: Any) -> Any:
        from vidi.attention import rope

        angle = pos[..., None].to(dtype) * rope.inverse_frequencies(head_dim, theta, dtype).to(dtype)
        return original(pos, head_dim, theta, dtype)[0], torch.cat((angle, angle), dim=-1).sin()

    return angles


@plant("vidi.attention.eager.attend", dtype=HALF)
def scores_in_half(original: Any) -> Any:
    """Decoder scores, softcap and softmax in bf16."""

    def attend(call: Any) -> Any:
        from vidi import precision

        promoted = precision.promoted
        precision.promoted = lambda dtype: dtype
        try:
            return original(call)
        finally:
            precision.promoted = promoted

    return attend


@plant("vidi.decoder.norm.gemma_norm", dtype=HALF)
def gemma_norm_in_half(original: Any) -> Any:
    """GemmaNorm wholly in bf16."""
    return lambda x, weight, eps: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1.0 + weight)


@plant("vidi.decoder.norm.gemma_norm", dtype=HALF)
def gemma_norm_cast_early(original: Any) -> Any:
    """Cast back before the weight, as in Llama: the product in bf16."""

    def gemma_norm(x: Any, weight: Any, eps: float) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * (1.0 + weight)

    return gemma_norm


@plant("vidi.decoder.norm.gemma_norm", dtype=HALF)
def gemma_norm_weight_in_half(original: Any) -> Any:
    """1 + weight in bf16, the rest in float32."""

    def gemma_norm(x: Any, weight: Any, eps: float) -> Any:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * (1.0 + weight).float()).to(x.dtype)

    return gemma_norm


def _unrounded(norm: Any, x: Any) -> Any:
    """What a norm of the decoder gives, before it is cast back."""
    return norm(x.float()).float()


@plant("vidi.decoder.layer.DecoderLayer.feed_forward", dtype=HALF)
def ffn_norm_added_unrounded(original: Any) -> Any:
    """The norm after the feed-forward in float32 until the residual is added, as a fused kernel would."""

    def feed_forward(self: Any, x: Any) -> Any:
        return (x.float() + _unrounded(self.post_ffn_norm, self.mlp(self.pre_ffn_norm(x)))).to(x.dtype)

    return feed_forward


@plant("vidi.decoder.layer.DecoderLayer.merge[text]", dtype=HALF)
def attention_norm_added_unrounded(original: Any) -> Any:
    """The norm after the attentions in float32 until the residual is added, of the text alone."""

    def merge(self: Any, x: Any, branches: Any) -> Any:
        if len(branches) == 1:
            return original(self, x, branches)
        mixed = branches[0]
        for branch in branches[1:]:
            mixed = mixed + branch
        return self.feed_forward((x.float() + _unrounded(self.post_attn_norm, mixed)).to(x.dtype))

    return merge


@plant("vidi.bridge.norm.rms", dtype=HALF)
def bridge_rms_in_half(original: Any) -> Any:
    """The bridge's rms() wholly in bf16."""
    return lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


@plant("vidi.bridge.norm.RMSNorm.forward", dtype=HALF)
def bridge_norm_cast_late(original: Any) -> Any:
    """The bridge norm's product in float32, cast afterwards, as Gemma's."""

    def forward(self: Any, x: Any) -> Any:
        wide = x.float()
        return (self.weight.float() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)

    return forward


@plant("vidi.precision.sqrt_in", dtype=HALF)
def factor_not_rounded(original: Any) -> Any:
    """sqrt(D) as it is: 4.899 where bf16 has 4.90625."""
    return lambda value, dtype: value**0.5


@plant("vidi.precision.sqrt_in", dtype="float16")
def factor_rounded_to_bf16(original: Any) -> Any:
    """sqrt(D) rounded to bf16 in an fp16 model."""
    return lambda value, dtype: original(value, torch.bfloat16)


@plant("vidi.loss.per_token", dtype=HALF, case="train")
def loss_in_half(original: Any) -> Any:
    """Cross-entropy in bf16."""
    import torch.nn.functional as nnf

    from vidi import loss

    return lambda logits, labels: nnf.cross_entropy(
        logits.flatten(0, 1), loss.shift(labels).flatten(), ignore_index=-100, reduction="none"
    ).float()


@plant("vidi.decoder.decoder.softcap", dtype=HALF)
def softcap_in_float32(original: Any) -> Any:
    """The final softcap in float32, cast afterwards."""
    return lambda x, cap: original(x.float(), cap).to(x.dtype)


@plant("vidi.attention.rope.apply", dtype=HALF)
def rotation_in_float32(original: Any) -> Any:
    """Heads turned in float32, cast afterwards."""
    return lambda x, cos, sin: original(x.float(), cos.float(), sin.float()).to(x.dtype)


@plant("vidi.attention.eager.attend[cross]", dtype=HALF)
def weights_cast_before_values(original: Any) -> Any:
    """Softmax weights of cross-attention rounded to bf16 before they meet the values."""

    def attend(call: Any) -> Any:
        if call.q_pos_BT is not None:
            return original(call)
        einsum = torch.einsum

        def rounded(form: str, a: Any, b: Any) -> Any:
            return einsum(form, a.to(call.v_BSGH.dtype).to(a.dtype) if form.startswith("bgrts") else a, b)

        torch.einsum = rounded
        try:
            return original(call)
        finally:
            torch.einsum = einsum

    return attend


@plant("vidi.towers.siglip.VisionTower.forward", dtype=HALF)
def patches_added_unrounded(original: Any) -> Any:
    """The patch embedding in float32 until the positions are added."""

    def forward(self: Any, images: Any, backend: str = "eager") -> Any:
        import torch.nn.functional as nnf

        conv = self.patch_embed
        wide = nnf.conv2d(images.float(), conv.weight.float(), conv.bias.float(), conv.stride)
        x = (wide.flatten(2).transpose(1, 2) + self.position.weight.float()).to(images.dtype)
        for layer in self.layers[:-1]:
            x = layer(x, backend)
        return x

    return forward


@plant("vidi.towers.whisper.AudioTower.forward", dtype=HALF)
def sound_added_unrounded(original: Any) -> Any:
    """The second convolution's activation in float32 until the positions are added."""

    def forward(self: Any, mel: Any, backend: str = "eager") -> Any:
        import torch.nn.functional as nnf

        x = self.conv2(nnf.gelu(self.conv1(mel)))
        x = (nnf.gelu(x.float()).transpose(1, 2) + self.position.weight.float()).to(mel.dtype)
        for layer in self.layers:
            x = layer(x, backend)
        return self.norm(x)

    return forward


@plant("vidi.towers.layer.TowerLayer.forward", dtype=HALF)
def tower_attention_added_unrounded(original: Any) -> Any:
    """What a tower's attention gives in float32 until the residual is added."""

    def forward(self: Any, x: Any, backend: str) -> Any:
        import torch.nn.functional as nnf

        out, heads = self.attention.out, []
        hook = out.register_forward_pre_hook(lambda module, given: heads.append(given[0]))
        self.attention(self.norm1(x), backend)
        hook.remove()
        x = (x.float() + nnf.linear(heads[0].float(), out.weight.float(), out.bias.float())).to(x.dtype)
        return x + self.mlp(self.norm2(x))

    return forward


@plant("model.audio_tower", "model.vision_tower", needs="cuda", dtype=SINGLE)
def tf32_on(original: Any) -> Any:
    """TF32 in matrix products and convolutions of the towers."""

    def forward(*given: Any) -> Any:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        try:
            return original(*given)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    return forward
