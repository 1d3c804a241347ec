"""A golden case through our model, every stage to a tap under its recorded id and in its recorded layout.

Model code hands tensors to its tap in the layout that it computes in; what the recordings hold in another one (heads before
tokens, heads repeated) is turned there and back on the way, and what they hold beside the model's own stages (unpadded
copies, losses, gradients, decoding) is added here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from stageparity.golden import Whole
from stageparity.run import Trace
from stageparity.store import Case
from stageparity.subject import Tap
from vidi import generate, loss
from vidi.attention import unpad
from vidi.attention.unpad import Rows
from vidi.bridge import position
from vidi.checkpoint import names
from vidi.config import DecoderConfig
from vidi.decoder.attention import repeat_heads
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed
from vidi.parity.goldens import inputs_of, synthetic_tower
from vidi.stream import Stream

__all__ = ["Recorded", "capture", "decoding", "run", "unpadded"]

MASKS = {"v": "vision.mask", "a": "audio.mask"}
#: in float16: gradients of the recordings reach 23 (beyond 63 they would overflow), those of scores go down to a millionth
LOSS_SCALE = 1024


def capture(case: Case, model: feed.Runner) -> dict[str, Tensor]:
    """All tensors of one chained run."""
    tap = Trace()
    run(case, model, tap)
    return tap.tensors()


def run(case: Case, model: feed.Runner, tap: Tap) -> None:
    """Run ``case`` through ``model`` from its raw inputs: every stage that its targets hold, and more.

    Where the case has labels, losses and the gradients that its targets name are there too; where it decodes, the
    logits along the golden tokens, cached and uncached, and the model's own greedy tokens.
    """
    if not {"logits", "loss.logits"}.isdisjoint(case.targets):
        forward(case, model, tap)
    for variant in case.info.get("generate", {}):
        if tap.wants(f"{variant}.nocache.logits") or tap.wants(f"{variant}.tokens"):
            decoding(case, variant, model, tap)


# ---- one whole pass ---------------------------------------------------------------------------------------------------------


class Recorded:
    """The model's tap: stages in their recorded layout, cross-attention taken apart in the first and last layer (§9)."""

    def __init__(self, config: DecoderConfig, tap: Tap, *, flat_logits: bool = False) -> None:
        """flat_logits: recordings of losses hold the logits as the loss sees them."""
        self.tap, self.heads, self.group = tap, config.num_heads, config.num_heads // config.num_kv_heads
        self.taken = {"0", str(config.num_layers - 1)}
        self.flat_logits = flat_logits
        self.gone_on: dict[str, Tensor] = {}  # masks and taken-apart attention, as the run went on with them

    def __call__(self, stage: str, x: Tensor) -> Tensor:
        kind, *rest = stage.split(".")
        if kind == "xattn":
            return self._xattn(stage, x, rest[2]) if rest[0] in self.taken else x
        if stage == "logits" and self.flat_logits:
            return self.tap(stage, x.flatten(0, 1)).view_as(x)
        back = self.tap(stage, x)
        if stage in (*MASKS.values(), "text.mask", "text.labels"):
            self.gone_on[stage] = back
        return back

    def _xattn(self, stage: str, x: Tensor, part: str) -> Tensor:
        if part == "out":
            return self.tap(stage, x)
        recorded = x if part == "q" else repeat_heads(x, self.heads)
        back = self.tap(stage, turned := recorded.transpose(1, 2))
        if back is turned:
            self.gone_on[stage] = recorded
            return x
        self.gone_on[stage] = back = back.transpose(1, 2)
        return back if part == "q" else back[:, :, :: self.group]

    def beside_attention(self) -> None:
        """Masks, and the unpadded form where some mask is not full."""
        for layer in sorted(self.taken):
            for modality, mask in MASKS.items():
                prefix = f"xattn.{layer}.{modality}"
                if f"{prefix}.q" not in self.gone_on:
                    continue
                text, keys = Rows(self.gone_on["text.mask"]), Rows(self.gone_on[mask])
                self.tap(f"{prefix}.q_mask", text.keep_BL)
                self.tap(f"{prefix}.kv_mask", keys.keep_BL)
                if not (text.full and keys.full):
                    q, k, v = (self.gone_on[f"{prefix}.{part}"] for part in "qkv")
                    for name, value in unpadded(q, k, v, text, keys).items():
                        self.tap(f"{prefix}.unpad.{name}", value)


def unpadded(q_BTNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, text: Rows, keys: Rows) -> dict[str, Tensor]:
    """What a varlen kernel gets, by the last part of its stage id."""
    flat = unpad._unpad_xattn_input(q_BTNH, k_BLNH, v_BLNH, text, keys)
    parts = {part: getattr(flat, part) for part in ("q", "k", "v", "indices_q", "cu_seqlens_q", "cu_seqlens_k")}
    return {**parts, "max_seqlen": torch.tensor(flat.max_seqlen)}


def forward(case: Case, model: feed.Runner, tap: Tap) -> None:
    """The stages of one whole pass, with losses and gradients where the case has labels."""
    inputs = inputs_of(case)
    batch = feed.batch_of(inputs)
    recorded = Recorded(model.config.decoder, tap, flat_logits="loss_thresholds" in case.info)
    grads = [stage for stage in case.targets if stage.startswith("grad.") and tap.wants(stage)]
    with _training(model, feed.noise_of(inputs)), torch.set_grad_enabled(bool(grads)):
        tap("pos.freq", position.frequencies(model.config.decoder.hidden_size))
        if "inputs.feat_index" in inputs:
            features = feed.to_torch(synthetic_tower(inputs), model.dtype, model.device)
            signal_B = torch.ones(1, dtype=torch.bool)
            visual = model.fold_features(iter(features.split(64)), [len(features)], signal_B, recorded)
            streams = {"v": visual, **model.streams(batch, recorded)}
            logits_BTV = model.decode_text(batch, streams, last_stream=True, tap=recorded)
        elif "loss.logits" in case.targets:
            assert isinstance(model, VidiModel)
            losses_N = model.losses(batch, last_stream=True, tap=recorded)
            _means(case, model, partial(loss.mean_of, losses_N), grads, tap)
            logits_BTV = None
        else:
            logits_BTV = model(batch, last_stream=True, tap=recorded)
        recorded.beside_attention()
        if batch.labels_BT is not None and logits_BTV is not None and isinstance(model, VidiModel):
            labels_BT = recorded.gone_on["text.labels"]
            losses_BT = tap("loss.per_token", loss.per_token(logits_BTV, labels_BT))
            _means(case, model, partial(loss.mean_above, losses_BT, labels_BT), grads, tap)


@contextmanager
def _training(model: feed.Runner, noise: Mapping[str, Tensor]) -> Iterator[None]:
    """Training mode with a case's own position noise; evaluation where the case has none."""
    if not noise or not isinstance(model, VidiModel):
        yield
        return
    drawn = model.position_noise
    model.train()
    model.position_noise = lambda axis, length: noise[axis]
    try:
        yield
    finally:
        model.eval()
        model.position_noise = drawn


def _means(case: Case, model: VidiModel, mean: Callable[[float | None], Tensor], grads: list[str], tap: Tap) -> None:
    """Losses under every threshold of the case, and gradients named ``grad.THRESHOLD.PARAMETER`` (§8)."""
    for name, threshold in case.info.get("loss_thresholds", {"none": None}).items():
        value = mean(threshold)
        tap(f"loss.{name}", value.reshape(1) if "loss_thresholds" in case.info else value)
        wanted = {stage: stage.removeprefix(f"grad.{name}.") for stage in grads if stage.startswith(f"grad.{name}.")}
        if wanted:
            parameters = [
                model.get_parameter(str(names.our_name(official, model.config))) for official in wanted.values()
            ]
            for stage, slope in zip(wanted, _slopes(value, parameters, model.dtype), strict=True):
                tap(stage, slope)


def _slopes(value: Tensor, parameters: list[nn.Parameter], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of ``value``. In float16 those of a scaled loss, as float16 is trained: inside kernels that round the
    scores' gradients they would underflow. The scale is a power of two and goes out again in float32."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1
    slopes = torch.autograd.grad(value * scale, parameters, retain_graph=True)
    return slopes if scale == 1 else tuple(slope.float() / scale for slope in slopes)


# ---- decoding ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def decoding(case: Case, variant: str, model: feed.Runner, tap: Tap) -> None:
    """One variant V of a decoding case: logits along its golden tokens, `V.nocache.logits` by whole passes and
    `V.cached.logits` step by step, and what the model decodes on its own, `V.tokens` and `V.lengths`."""
    inputs, settings = inputs_of(case), case.info["generate"][variant]
    streams = model.streams(feed.batch_of(inputs))
    runner = feed.with_window(model, settings["window"])
    own_prompt = f"{variant}.prompt_ids" in inputs
    batch = feed.batch_of(inputs, f"{variant}.prompt_ids" if own_prompt else "inputs.input_ids")
    golden = case.targets.get(f"{variant}.tokens")
    tokens = golden.array if isinstance(golden, Whole) else inputs[f"{variant}.tokens"]
    free = generate.greedy(runner, batch, max_new_tokens=tokens.shape[1], streams=streams)
    rows = [row + [model.config.end_of_turn_id] * ended for row, ended in zip(free.tokens, free.stopped, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    greedy = f"{variant}.greedy_nocache.tokens"  # the 7B's release tells its own cached run from uncached ones
    tap(greedy if greedy in case.targets else f"{variant}.tokens", padded)
    tap(f"{variant}.lengths", torch.tensor([len(row) for row in rows]))
    forced_BS = torch.from_numpy(tokens)
    tap(f"{variant}.nocache.logits", whole_pass_logits(runner, batch, forced_BS, streams))
    tap(f"{variant}.cached.logits", generate.forced_logits(runner, batch, forced_BS, streams=streams))


def whole_pass_logits(model: feed.Runner, batch: Batch, tokens_BS: Tensor, streams: dict[str, Stream]) -> Tensor:
    """(B, S, V) without any cache: entry s from one pass over the prompt and tokens[:s], all of them in one pass, because
    the text is causal. Every row continues from its own last kept token."""
    prompt_BT, keep_BT = batch.input_ids_BT, batch.keep_BT
    keep_BT = torch.ones_like(prompt_BT, dtype=torch.bool) if keep_BT is None else keep_BT
    forced_BS = tokens_BS[:, :-1]
    longer = dataclasses.replace(
        batch,
        input_ids_BT=torch.cat((prompt_BT, forced_BS), dim=1),
        keep_BT=torch.cat((keep_BT, torch.ones_like(forced_BS, dtype=torch.bool)), dim=1),
    )
    logits_BTV = model.decode_text(longer, streams)
    last_B = (keep_BT & (prompt_BT != model.config.image_placeholder)).sum(1) - 1
    steps_BS = last_B[:, None] + torch.arange(tokens_BS.shape[1])
    return logits_BTV[torch.arange(len(logits_BTV))[:, None], steps_BS]
