"""The training loss and its threshold (spec §8)."""

from __future__ import annotations

import math

import pytest
import torch

from tests import tiny
from vidi import loss

LABELS = torch.tensor([[5, 7, -100, 9, 3], [1, 2, 3, -100, -100]])


def test_labels_move_left_within_each_row():
    assert loss.shift(LABELS).tolist() == [[7, -100, 9, 3, -100], [2, 3, -100, -100, -100]]


def test_per_token_is_the_cross_entropy_of_the_next_token():
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = loss.per_token(logits, LABELS)
    assert found.shape == (10,)
    for row, (b, t, target) in {0: (0, 0, 7), 2: (0, 2, 9), 3: (0, 3, 3), 5: (1, 0, 2), 6: (1, 1, 3)}.items():
        p = logits[b, t].exp() / logits[b, t].exp().sum()
        assert found[row].item() == pytest.approx(-math.log(p[target]), rel=1e-12)
    assert [i for i, x in enumerate(found.tolist()) if x == 0] == [1, 4, 7, 8, 9]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_is_float32_in_a_half_precision_model(dtype):
    logits = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = loss.per_token(logits, LABELS)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss.per_token(logits.float(), LABELS))


LOSSES = torch.tensor([4.0, 0.0, 2.0, 3.0, 0.0, 1.0, 6.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("threshold", "mean"),
    [
        (None, 16 / 5),
        (100.0, 16 / 5),  # every loss is below: the cut is 0, ignored tokens fall out
        (6.5, 16 / 5),
        (6.0, math.nan),  # one loss is not below 6, and none is above
        (3.0, (4 + 6) / 2),  # strictly above
        (2.5, (4 + 3 + 6) / 3),
        (0.0, 16 / 5),
    ],
)
def test_threshold(threshold, mean):
    assert loss.mean_above(LOSSES, LABELS, threshold).item() == pytest.approx(mean, nan_ok=True)


def test_a_loss_of_exactly_zero_counts_without_a_threshold_alone():
    losses = torch.tensor([4.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert loss.mean_above(losses, LABELS).item() == pytest.approx(6 / 5)
    assert loss.mean_above(losses, LABELS, 10.0).item() == pytest.approx(6 / 2)


def test_the_models_loss_drops_the_placeholders_label():
    model = tiny.model()
    sample = tiny.sample(8)
    labels = [100 + i for i in range(9)]
    batch = tiny.make([type(sample)(**{**sample.__dict__, "labels": labels})])
    packed = [*labels[:2], *labels[3:]]
    logits = model(batch)
    wanted = loss.mean_above(loss.per_token(logits, torch.tensor([packed])), torch.tensor([packed]))
    assert torch.equal(model.loss(batch), wanted)
    # With a threshold of the call, or else of the configuration.
    middle = loss.per_token(logits, torch.tensor([packed]))[:-1].median().item()
    assert model.loss(batch, threshold=middle) > wanted


def test_a_batch_without_labels_has_no_loss():
    with pytest.raises(ValueError, match="labels_BT"):
        tiny.model().loss(tiny.make([tiny.sample()]))
