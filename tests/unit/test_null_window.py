"""``"sliding_window": null``: no window for the 7B (its spec §7), on every path; refused for 1.5 9B, whose layers alternate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stageparity import store
from vidi import generate, sizes_7b
from vidi.checkpoint import synthetic
from vidi.config import ConfigError, VidiConfig
from vidi.fast import accelerate
from vidi.inputs.batch import Batch
from vidi.model import VidiModel
from vidi.parity import feed
from vidi.parity.goldens import goldens_dir

TEXT, NEW = 14, 4


def model(window: int | None) -> VidiModel:
    config = VidiConfig.from_official(sizes_7b.TINY | {"sliding_window": window})
    return synthetic.create(config, 0, dtype=torch.float64)


def batch() -> Batch:
    """A text of 14 tokens beside three frames."""
    random = torch.Generator().manual_seed(6)
    ids_1T = torch.randint(3, 500, (1, TEXT + 1), generator=random)
    ids_1T[0, 4] = -200
    frames = torch.randint(0, 256, (3, 3, 26, 26), dtype=torch.uint8, generator=random)
    return Batch(ids_1T, None, (frames,), None, None)


@pytest.mark.parametrize("path", [lambda model: model, accelerate], ids=["plain", "fast"])
def test_without_a_window_all_past_keys_are_seen(path) -> None:  # type: ignore[no-untyped-def]
    """As under one that is as long as text and answer; one key less is another result, cached and uncached."""
    tokens = torch.randint(3, 500, (1, NEW), generator=torch.Generator().manual_seed(7))
    whole, cached = {}, {}
    for window in (None, TEXT + NEW, TEXT - 2, 5):
        runner = path(model(window))
        with torch.no_grad():
            whole[window] = runner(batch())
            cached[window] = generate.forced_logits(runner, batch(), tokens)
    for found in (whole, cached):
        torch.testing.assert_close(found[None], found[TEXT + NEW], rtol=0, atol=1e-12)
        for window in (TEXT - 2, 5):
            assert (found[None] - found[window])[:, -1].abs().max() > 1e-6, window
    assert not torch.equal(whole[TEXT - 2], whole[5])


def test_it_is_written_and_read_as_null(tmp_path: Path) -> None:
    config = model(None).config
    assert [config.decoder.window(i) for i in range(3)] == [None] * 3
    written = config.to_official()
    assert written["sliding_window"] is None
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert VidiConfig.from_file(tmp_path) == config


def test_the_9b_refuses_it_by_name() -> None:
    with pytest.raises(ConfigError, match="sliding_window = None"):
        VidiConfig.from_official(VidiConfig.tiny().to_official() | {"sliding_window": None})


def test_a_decoding_run_without_a_window_is_the_7bs_alone() -> None:
    """What a manifest says of its runs, which stands beside the configuration."""
    seven, nine = (store.open_case(goldens_dir() / name, "decode") for name in ("small-7b", "small"))
    for case in (seven, nine):
        case.info["generate"]["decode"]["window"] = None
    assert feed.with_window(feed.load_model(seven, torch.float32), None).config.decoder.window(1) is None
    with pytest.raises(ValueError, match="each with a window above 0"):
        feed.load_model(nine, torch.float32)
