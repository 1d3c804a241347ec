"""Capture of our model: one run of a case, every stage under its recorded id and in its recorded layout.

Model code hands tensors to a `Tap` in the layout that it computes in; what the recordings hold in another one (heads
before tokens, heads repeated, unpadded copies) is rearranged here, after the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vidi import generate, loss
from vidi.attention import unpad
from vidi.attention.unpad import Rows
from vidi.bridge import position
from vidi.checkpoint import names
from vidi.decoder.attention import repeat_heads
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed, store
from vidi.parity.golden import Whole
from vidi.parity.store import Case
from vidi.stream import Stream

__all__ = ["Trace", "capture", "cross_attention", "decoding"]

MODALITIES = {"v": "vision.mask", "a": "audio.mask"}
#: in float16: gradients of the recordings reach 23 (beyond 63 they would overflow), those of scores go down to a millionth
LOSS_SCALE = 1024
NEEDED = {*MODALITIES.values(), "text.mask", "text.labels"}  # read by what is derived after the run


class Trace:
    """A tap that keeps tensors by stage id; parts of one id are joined along axis 0. ``wanted`` None = everything."""

    def __init__(self, wanted: Callable[[str], bool] | None = None) -> None:
        self._wanted = wanted or (lambda stage: True)
        self._parts: dict[str, list[Tensor]] = {}

    def __call__(self, stage_id: str, value: Tensor) -> Tensor:
        if self._wanted(stage_id):
            self._parts.setdefault(stage_id, []).append(value)
        return value

    def tensors(self) -> dict[str, Tensor]:
        return {stage: parts[0] if len(parts) == 1 else torch.cat(parts) for stage, parts in self._parts.items()}


def capture(case: Case, model: feed.Runner, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Run ``case`` through ``model`` from its raw inputs: every stage that its targets hold (chained), and more.

    Where the case has labels, losses and the gradients that its targets name are there too; where it decodes, the
    logits along the golden tokens, cached and uncached, and the model's own greedy tokens.
    """
    found: dict[str, Tensor] = {}
    if "logits" in case.targets:
        found |= forward(case, model, wanted)
    if "generate" in case.info:
        found |= decoding(case, model)
    return found


def forward(case: Case, model: feed.Runner, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The stages of one whole pass, with losses and gradients where the case has labels."""
    inputs, batch = case.inputs, feed.batch_of(case.inputs)
    grads = [stage for stage in case.targets if stage.startswith("grad.")]
    tap = Trace(wanted and (lambda stage: wanted(stage) or stage in NEEDED))
    with training(model, feed.noise_of(inputs)), torch.set_grad_enabled(bool(grads)):
        if "inputs.feat_index" in inputs:
            features = feed.to_torch(store.synthetic_tower(inputs), model.dtype, model.device)
            signal_B = torch.ones(1, dtype=torch.bool)
            visual = model.fold_features(iter(features.split(64)), [len(features)], signal_B, tap)
            streams = {"v": visual, **model.streams(batch, tap)}
            logits_BTV = model.decode_text(batch, streams, last_stream=True, tap=tap)
        else:
            logits_BTV = model(batch, last_stream=True, tap=tap)
        found = {"pos.freq": position.frequencies(model.config.decoder.hidden_size), **tap.tensors()}
        found |= dict(cross_attention(found, model.config.decoder.num_heads))
        if batch.labels_BT is not None and isinstance(model, VidiModel):
            found |= _losses(case, model, logits_BTV, found, grads)
    return {stage: value.detach() for stage, value in found.items()}


@contextmanager
def training(model: feed.Runner, noise: Mapping[str, Tensor]) -> Iterator[None]:
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


def cross_attention(found: Mapping[str, Tensor], heads: int) -> Iterator[tuple[str, Tensor]]:
    """The taken-apart cross-attentions of the first and last layer as recorded (§9): heads before tokens and repeated,
    masks beside them, and the unpadded form where some mask is not full."""
    layers = sorted({int(name.split(".")[1]) for name in found if name.startswith("xattn.")})
    for i in sorted({*layers[:1], *layers[-1:]}):
        for modality, mask in MODALITIES.items():
            prefix = f"xattn.{i}.{modality}"
            if f"{prefix}.q" not in found:
                continue
            q_BTNH = found[f"{prefix}.q"]
            k_BLNH, v_BLNH = (repeat_heads(found[f"{prefix}.{part}"], heads) for part in ("k", "v"))
            text, keys = Rows(found["text.mask"]), Rows(found[mask])
            yield f"{prefix}.q_mask", text.keep_BL
            yield f"{prefix}.kv_mask", keys.keep_BL
            if not (text.full and keys.full):
                yield from unpadded(prefix, q_BTNH, k_BLNH, v_BLNH, text, keys)
            for part, value in (("q", q_BTNH), ("k", k_BLNH), ("v", v_BLNH)):
                yield f"{prefix}.{part}", value.transpose(1, 2)


def unpadded(
    prefix: str, q_BTNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, text: Rows, keys: Rows
) -> Iterator[tuple[str, Tensor]]:
    flat = unpad._unpad_xattn_input(q_BTNH, k_BLNH, v_BLNH, text, keys)
    for part in ("q", "k", "v", "indices_q", "cu_seqlens_q", "cu_seqlens_k"):
        yield f"{prefix}.unpad.{part}", getattr(flat, part)
    yield f"{prefix}.unpad.max_seqlen", torch.tensor(flat.max_seqlen)


def _losses(
    case: Case, model: VidiModel, logits_BTV: Tensor, found: Mapping[str, Tensor], grads: list[str]
) -> dict[str, Tensor]:
    """Losses under every threshold of the case, and gradients named ``grad.THRESHOLD.PARAMETER`` (§8)."""
    labels_BT = found["text.labels"]
    per_token = loss.per_token(logits_BTV, labels_BT)
    out = {"loss.per_token": per_token}
    thresholds = case.info.get("loss_thresholds", {"none": None})
    if "loss_thresholds" in case.info:  # the recording of this case holds the logits as the loss sees them
        out["logits"] = logits_BTV.flatten(0, 1)
    for name, threshold in thresholds.items():
        value = loss.mean_above(per_token, labels_BT, threshold)
        out[f"loss.{name}"] = value.reshape(1) if "loss_thresholds" in case.info else value
        wanted = {stage: stage.removeprefix(f"grad.{name}.") for stage in grads if stage.startswith(f"grad.{name}.")}
        if wanted:
            parameters = [model.get_parameter(str(names.our_name(official))) for official in wanted.values()]
            out |= dict(zip(wanted, _slopes(value, parameters, model.dtype), strict=True))
    return out


def _slopes(value: Tensor, parameters: list[nn.Parameter], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Gradients of ``value``. In float16 those of a scaled loss, as float16 is trained: inside kernels that round the
    scores' gradients they would underflow. The scale is a power of two and goes out again in float32."""
    scale = LOSS_SCALE if dtype == torch.float16 else 1
    slopes = torch.autograd.grad(value * scale, parameters, retain_graph=True)
    return slopes if scale == 1 else tuple(slope.float() / scale for slope in slopes)


def decoding(case: Case, model: feed.Runner) -> dict[str, Tensor]:
    """Each variant V of a decoding case: logits along its golden tokens, `V.nocache.logits` by whole passes and
    `V.cached.logits` step by step, and what the model decodes on its own, `V.tokens` and `V.lengths`."""
    found = {}
    with torch.inference_mode():
        streams = model.streams(feed.batch_of(case.inputs))
    for variant, settings in case.info["generate"].items():
        runner = feed.with_window(model, settings["window"])
        own_prompt = f"{variant}.prompt_ids" in case.inputs
        batch = feed.batch_of(case.inputs, f"{variant}.prompt_ids" if own_prompt else "inputs.input_ids")
        golden = case.targets.get(f"{variant}.tokens")
        tokens = golden.array if isinstance(golden, Whole) else case.inputs[f"{variant}.tokens"]
        free = generate.greedy(runner, batch, max_new_tokens=tokens.shape[1], streams=streams)
        rows = [
            row + [model.config.end_of_turn_id] * ended for row, ended in zip(free.tokens, free.stopped, strict=True)
        ]
        found[f"{variant}.tokens"] = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row) for row in rows], batch_first=True
        )
        found[f"{variant}.lengths"] = torch.tensor([len(row) for row in rows])
        forced_BS = torch.from_numpy(tokens)
        found[f"{variant}.nocache.logits"] = whole_pass_logits(runner, batch, forced_BS, streams)
        found[f"{variant}.cached.logits"] = generate.forced_logits(runner, batch, forced_BS, streams=streams)
    return found


@torch.inference_mode()
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
