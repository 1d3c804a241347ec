"""Hostile config.json by seed, beside sound weights: refused in one line, or the model runs and is as large as the file says."""

from __future__ import annotations

import copy
import json
import os
import random
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.limited import one_line, run_cases, watched
from vidi import generate
from vidi.checkpoint import synthetic
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.inspect import inspect_folder
from vidi.checkpoint.load import load
from vidi.config import ConfigError, VidiConfig
from vidi.fast import needs
from vidi.inputs.batch import Sample, make_batch

_TINY = VidiConfig.tiny()
SMALL = replace(
    _TINY,
    vision=replace(_TINY.vision, hidden_size=8, num_layers=2, intermediate_size=8),
    audio=replace(_TINY.audio, hidden_size=8, num_layers=1, intermediate_size=8),
    decoder=replace(_TINY.decoder, hidden_size=8, num_layers=2, intermediate_size=8, vocab_size=128),
)
OFFICIAL = SMALL.to_official()
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2, 3, 7, 2**31 - 1, 2**31, 2**40, 2**63, 10**30, 10**400, 0.5, 1e-12, 1e-308, 1e9, 1e308),
    *(
        float("inf"),
        float("nan"),
        "",
        "8",
        "video",
        "\x1b[2J",
        "\ud800",
        "é" * 300,
        "a" * 1_000_000,
        [],
        {},
        [[]],
        {"a": 1},
    ),
)


@cache
def _sound() -> Path:
    """The folder with sound weights that every case borrows."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-config-")) / "sound"
    synthetic.synth(folder, SMALL)
    return folder


def case(seed: int, folder: Path) -> str:
    rng = random.Random(seed)
    raw = copy.deepcopy(OFFICIAL)
    for _ in range(rng.choice((1, 1, 2, 3))):
        part = rng.choice((raw, raw, raw.get("vision_config"), raw.get("audio_config")))
        if not isinstance(part, dict) or not part:
            continue
        key = rng.choice(sorted(part))
        kind = rng.randrange(6)
        if kind == 0:
            del part[key]
        elif kind == 1:
            part[rng.choice(("new", "\x1b", "a" * 100_000, *sorted(OFFICIAL)))] = copy.deepcopy(rng.choice(ODD))
        elif kind == 2 and type(part[key]) in (int, float):
            part[key] = part[key] * rng.choice((2, 3, 1000, 0.5, -1)) + rng.choice((0, 1))
        else:
            part[key] = copy.deepcopy(rng.choice(ODD))
    text = bytearray(json.dumps(raw), "utf-8")
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text[at : at + rng.randrange(4)] = rng.choice(
            (b"", b"[" * 100_000, b'"', rng.randbytes(3), b"1" * 5000, b"1e999")
        )
    inside = folder / "inside"
    for path in _sound().iterdir():
        os.link(path, inside / path.name)
    path = inside / "config.json"
    path.unlink()
    special = rng.randrange(40)
    if special == 0:
        os.mkfifo(path)
    elif special == 1:
        path.symlink_to(rng.choice(("/dev/zero", "../outside/config.json", "config.json")))
    else:
        path.write_bytes(text)
    if special == 2:
        os.truncate(path, rng.choice((0, 8 << 30)))
    (folder / "outside" / "config.json").write_text(json.dumps(OFFICIAL))
    with watched(folder / "outside"):
        return _outcome(inside)


def _outcome(inside: Path) -> str:
    try:
        config = VidiConfig.from_file(inside)
    except ConfigError as error:
        one_line(error, inside / "config.json")
        with pytest.raises(CheckpointError) as refused:
            inspect_folder(inside)
        one_line(refused.value)
        return "refused"
    try:
        report = inspect_folder(inside)
        report.render()
        report.to_json()
        model = load(inside, dtype=torch.float32)
    except CheckpointError as error:
        one_line(error)
        return "does not fit"
    assert all(first <= last for first, last in needs.room(config, 1 << 30))
    frames = torch.zeros((2, 3, config.vision.image_size, config.vision.image_size), dtype=torch.uint8)
    try:
        batch = make_batch([Sample(ids=[2, 5, config.image_placeholder, 6, 7], images=frames)], config)
        with torch.inference_mode():
            tokens = generate.greedy(model, batch, max_new_tokens=2).tokens
    except ValueError as error:
        one_line(error)
        return "not run"
    assert all(0 <= token < config.decoder.vocab_size for token in tokens[0])
    return "run"


@pytest.mark.slow
def test_hostile_configs(tmp_path: Path) -> None:
    outcomes = run_cases("tests.harness.test_fuzz_config", 1000, tmp_path)
    assert outcomes["refused"] > 500
    assert outcomes["does not fit"] + outcomes["run"] > 75
    assert min(outcomes["does not fit"], outcomes["run"]) > 50
