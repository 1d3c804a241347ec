"""Gradients of every group of parameters against central differences in float64, and detached parts, which must be seen.

Along one random direction in all parameters of a group at once: a parameter whose gradient is missing, or wrong by any
factor, moves the slope. (One number of every kind of parameter: test_model.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import tiny
from vidi.attention import dispatch, rope
from vidi.bridge import norm, pack, position
from vidi.bridge.position import PositionEmbedding
from vidi.bridge.projector import Projector
from vidi.decoder.attention import DecomposedAttention
from vidi.decoder.decoder import Decoder
from vidi.decoder.layer import DecoderLayer
from vidi.decoder.mlp import GatedMlp
from vidi.decoder.norm import GemmaNorm
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.stream import Stream
from vidi.towers import layer as tower_layer
from vidi.towers.siglip import VisionTower
from vidi.towers.whisper import AudioTower

# Group -> what its parameters' names begin with. Layer 2 of the vision tower, its last, feeds nothing.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "vision patches": ("vision_tower.patch_embed.", "vision_tower.position."),
    "vision layers": ("vision_tower.layers.0.", "vision_tower.layers.1."),
    "audio convolutions": ("audio_tower.conv", "audio_tower.position."),
    "audio layers": ("audio_tower.layers.", "audio_tower.norm."),
    "image projector": ("bridge.image_projector.", "bridge.image_norm."),
    "audio pool and projector": ("bridge.audio_pool.", "bridge.audio_projector.", "bridge.audio_norm."),
    "height and width": ("bridge.pos_h.", "bridge.pos_w."),
    "time": ("bridge.pos_t.",),
    "last bridge norm": ("bridge.llm_norm.",),
    "decoder attention": tuple(f"decoder.layers.{i}.attention." for i in range(4)),
    "decoder mlp": tuple(f"decoder.layers.{i}.mlp." for i in range(4)),
    "decoder norms": tuple(f"decoder.layers.{i}.{n}" for i in range(4) for n in ("input_", "post_", "pre_")),
    "final norm": ("decoder.norm.",),
    "embedding": ("decoder.embed.",),
}
STEP = 1e-5


@cache
def _model() -> VidiModel:
    """Eager throughout: in float64 every kernel is a formula."""
    model = tiny.model(seed=11)
    twin = VidiModel(model.config, tower_backend="eager").double()
    twin.load_state_dict(model.state_dict())
    return twin.requires_grad_(True)


@cache
def _batch() -> Batch:
    samples = (tiny.sample(10, 1, 110), tiny.sample(4, 1, 0, seed=2))
    return tiny.make([dataclasses.replace(s, labels=[-100, *s.ids[1:]]) for s in samples])


def group_of(model: VidiModel, group: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.startswith(GROUPS[group])}


def direction(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    """As large in each tensor as its own values: small parameters count as much as large ones."""
    draw = torch.Generator().manual_seed(7)
    return [
        torch.randn(p.shape, generator=draw, dtype=p.dtype) * p.detach().square().mean().sqrt()
        for p in parameters.values()
    ]


def slopes(*groups: str) -> dict[str, float]:
    """By backpropagation, along each group's direction. A part without a gradient counts as 0."""
    value = _model().loss(_batch())
    held = {group: group_of(_model(), group) for group in groups}
    flat = [p for parameters in held.values() for p in parameters.values()]
    found = iter(torch.autograd.grad(value, flat, allow_unused=True) if value.requires_grad else [None] * len(flat))
    return {
        group: sum((g * d).sum().item() for d, g in zip(direction(own), found, strict=False) if g is not None)
        for group, own in held.items()
    }


@cache
def clean() -> Mapping[str, float]:
    return slopes(*GROUPS)


@cache
def measured(group: str) -> float:
    """By central differences."""
    model, values = _model(), []
    parameters = group_of(model, group)
    steps = direction(parameters)
    with torch.no_grad():
        for move in (STEP, -2 * STEP, STEP):
            for p, d in zip(parameters.values(), steps, strict=True):
                p.add_(d, alpha=move)
            values.append(model.loss(_batch()).item())
    return (values[0] - values[1]) / (2 * STEP)


def right(group: str, found: float) -> bool:
    """1e-6: the third derivative leaves some 1e-8 at this step, and double precision as much."""
    wanted = measured(group)
    assert abs(wanted) > 1e-3, "a direction that hardly moves the loss proves nothing"
    return math.isclose(found, wanted, rel_tol=1e-6)


def test_the_groups_are_all_parameters() -> None:
    names = [name for name, _ in _model().named_parameters()]
    held = [name for group in GROUPS for name in group_of(_model(), group)]
    assert len(held) == len(set(held))
    left = set(names) - set(held)
    assert all(name.startswith(("vision_tower.unused.", "vision_tower.layers.2.")) for name in left)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_equal_central_differences(group: str) -> None:
    assert right(group, clean()[group]), f"{clean()[group]:.12g}, measured {measured(group):.12g}"


def test_every_parameter_has_a_gradient() -> None:
    names, parameters = zip(*((n, p) for g in GROUPS for n, p in group_of(_model(), g).items()), strict=True)
    slopes = torch.autograd.grad(_model().loss(_batch()), parameters)
    # A key's bias moves all scores of a query alike, which softmax forgets.
    dead = [n for n, g in zip(names, slopes, strict=True) if not g.any() and not n.endswith("attention.k.bias")]
    assert dead == []


# ---- parts that are detached, or whose gradient is another one ------------------------------------------------------------


def _detached(owner: Any, name: str) -> Callable[[pytest.MonkeyPatch], None]:
    """What the function returns carries no gradient."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def cut(*args: Any, **options: Any) -> Any:
            out = original(*args, **options)
            if isinstance(out, Stream):
                return dataclasses.replace(out, x_BLD=out.x_BLD.detach())
            return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()

        patch.setattr(owner, name, cut)

    return plant


def _cross_detached(patch: pytest.MonkeyPatch) -> None:
    attend = DecomposedAttention.attend_stream
    patch.setattr(
        DecomposedAttention,
        "attend_stream",
        lambda self, q, k, v, **options: attend(self, q, k.detach(), v.detach(), **options),
    )


def _scores_detached(patch: pytest.MonkeyPatch) -> None:
    attend = dispatch.attend
    patch.setattr(
        dispatch,
        "attend",
        lambda call, *backend: attend(dataclasses.replace(call, q_BTNH=call.q_BTNH.detach()), *backend),
    )


def _rms_without_its_own_slope(patch: pytest.MonkeyPatch) -> None:
    def rms(x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + norm.EPS)

    patch.setattr(norm, "rms", rms)


def _table_under_no_grad(patch: pytest.MonkeyPatch) -> None:
    embed = position.embed
    patch.setattr(position, "embed", torch.no_grad()(embed))


DETACHED: Mapping[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    # what is cut off: (a group that must see it, how)
    "vision tower": ("vision layers", _detached(VisionTower, "forward")),
    "vision tower, from its patches": ("vision patches", _detached(VisionTower, "forward")),
    "audio tower": ("audio convolutions", _detached(AudioTower, "forward")),
    "tower attention": ("audio layers", _detached(tower_layer.Attention, "forward")),
    "tower mlp": ("vision layers", _detached(tower_layer.Mlp, "forward")),
    "projectors": ("image projector", _detached(Projector, "forward")),
    "position embeddings": ("time", _detached(PositionEmbedding, "forward")),
    "position embeddings without grad": ("height and width", _table_under_no_grad),
    "rms of embeddings": ("time", _detached(position.norm, "rms")),
    "the norm's own slope": ("image projector", _rms_without_its_own_slope),
    "streams": ("last bridge norm", _detached(pack, "to_stream")),
    "streams between layers": ("decoder norms", _detached(DecoderLayer, "update_stream")),
    "keys and values of streams": ("audio pool and projector", _cross_detached),
    "queries": ("decoder attention", _scores_detached),
    "rotated text": ("decoder attention", _detached(rope, "apply")),
    "self-attention": ("decoder attention", _detached(DecoderLayer, "text_to_text")),
    "decoder mlp": ("decoder mlp", _detached(GatedMlp, "forward")),
    "decoder norms": ("decoder norms", _detached(GemmaNorm, "forward")),
    "embedded text": ("embedding", _detached(Decoder, "embed_tokens")),
    "head": ("final norm", _detached(Decoder, "logits")),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", DETACHED)
def test_a_detached_part_is_seen(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group, plant = DETACHED[part]
    measured(group)  # before the fault
    plant(monkeypatch)
    assert not right(group, slopes(group)[group])
