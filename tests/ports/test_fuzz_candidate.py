"""Tensors of others: dumps spoiled by seed, in a child under limits, through `parity --candidate` and `port explain`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from safetensors.numpy import save_file

from stageparity import store
from stageparity.golden import Whole
from stageparity.port import stagetrace
from tests.harness.test_fuzz_parity import ESCAPE, GOLDENS, VALUES, _lie, _other
from tests.limited import run_cases, watched
from vidi import cli

STAGES = "text.*,vision.norm,layer.0.*,logits"


@cache
def _golden() -> tuple[str, dict[str, np.ndarray]]:
    """The identity of small/oneframe, and a few of its tensors."""
    held = store.open_case(GOLDENS / "small", "oneframe")
    whole = {name: np.asarray(g.array) for name, g in held.variant("cast").items() if isinstance(g, Whole)}
    return held.identity, {
        n: x for n, x in whole.items() if n.startswith(("text.", "vision.norm", "layer.0.", "logits"))
    }


def _traced(at: Path, tensors: dict[str, np.ndarray]) -> None:
    """As the tracer leaves it."""
    said: dict[str, Any] = {"case": "small/oneframe", "golden": _golden()[0], "dtype": "float32"}
    said |= {"version": stagetrace.VERSION, "run": "0" * 16, "adapter": "0" * 64, "python": "3.11", "finished": True}
    prints = {name: [stagetrace.fingerprint(x)] for name, x in tensors.items()}
    said |= {"notes": {}, "dtypes": dict.fromkeys(tensors, "float32"), "fed": prints, "inside": {}, "unused": []}
    (at / "trace.json").write_text(json.dumps(said), "utf-8")
    for kind in ("chained", "forced"):
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, at / f"{kind}.safetensors")


def _declared(at: Path, tensors: dict[str, np.ndarray], form: str) -> None:
    """As somebody else's program writes it."""
    lines = [f'{key} = "{value}"' for key, value in
             (("case", "small/oneframe"), ("golden", _golden()[0]), ("dtype", "float32"))]  # fmt: skip
    (at / "candidate.toml").write_text("\n".join([*lines, "[layout]", 'logits = "a b c -> a b c"', ""]), "utf-8")
    if form == "h5":
        with h5py.File(at / "x.h5", "w", libver="v110") as file:
            for name, x in tensors.items():
                file[name] = x
    elif form == "npy":
        for name, x in tensors.items():
            np.save(at / f"{name}.npy", x)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, at / "x.safetensors")


# ---- what is done to it ---------------------------------------------------------------------------------------------------


def _honest(path: Path) -> bool:
    """No lie has taken its place yet."""
    return path.is_file() and not path.is_symlink() and 0 < path.stat().st_size < 1 << 24


def _said(rng: random.Random, at: Path, outside: Path) -> None:
    """What it says of itself."""
    if _honest(path := at / "trace.json"):
        body = json.loads(path.read_text("utf-8"))
        for _ in range(rng.choice((1, 1, 2))):
            _lie(rng, body)
        path.write_text(json.dumps(body), "utf-8")
        return
    path = at / "candidate.toml"
    if not _honest(path):
        return
    text = path.read_text("utf-8")
    value = rng.choice([json.dumps(v) for v in VALUES if isinstance(v, str | int) and not isinstance(v, bool)])
    text = re.sub(rng.choice([r"(?m)^case = .*", r"(?m)^dtype = .*", r"(?m)^golden = .*", r'"a b c.*"']), lambda m: (
        m[0].partition("=")[0] + f"= {value}" if "=" in m[0] else value), text)  # fmt: skip
    path.write_text(
        text + rng.choice(["", "x = 1\n", '"layer.*" = "a -> b"\n', '"\\u001b[2J" = "a"\n', "[layout]\n"]), "utf-8"
    )


def _bytes(rng: random.Random, at: Path, outside: Path) -> None:
    path = rng.choice(sorted(filter(_honest, at.rglob("*"))))
    data = bytearray(path.read_bytes())
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 2000))] ^= 1 << rng.randrange(8)
    path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.3 else data)


def _links(rng: random.Random, at: Path, outside: Path) -> None:
    path = rng.choice(sorted(p for p in at.rglob("*") if p.is_file()))
    kind = rng.choice(("out", "pipe", "device", "folder", "loop", "sparse", "none"))
    if kind == "out":
        path.rename(outside / path.name)
        path.symlink_to(outside / path.name)
        return
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(1 << 36)


SPOIL: dict[str, Callable[[random.Random, Path, Path], None]] = {"said": _said, "bytes": _bytes, "links": _links}


def case(seed: int, folder: Path) -> str:
    """One hostile dump, and what the command made of it."""
    rng, inside, outside = random.Random(seed), folder / "inside", folder / "outside"
    tensors = dict(_golden()[1])
    form = rng.choice(("traced", "traced", "h5", "npy", "safetensors"))
    if rng.random() < 0.4:
        name = rng.choice(sorted(tensors))
        tensors[name] = _other(rng, tensors[name])
    if rng.random() < 0.1 and form not in ("npy",):
        tensors[rng.choice([ESCAPE, "layer.99.output", "x" * 300])] = np.zeros(3, np.float32)
    if form == "traced":
        _traced(inside, tensors)
    else:
        _declared(inside, tensors, form)
    for kind in rng.sample(list(SPOIL), rng.choice((0, 1, 1, 1, 2))):
        with contextlib.suppress(OSError, ValueError, LookupError):  # two lies of which one took the other's place
            SPOIL[kind](rng, inside, outside)
    words = ["parity", "--candidate", str(inside), "--stage", STAGES]
    if rng.random() < 0.2:
        words = ["port", "explain", str(inside)]
    with (
        watched(outside),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = cli.main(words)
    text, told = out.getvalue(), err.getvalue()
    assert status in (0, 1, 2, 3), (words[:2], status, told)
    assert "Traceback" not in text + told
    assert not re.search("unexpected|memory|allocate", told), told
    assert all(line.isprintable() for line in (text + told).split("\n")), ascii(text + told)
    assert status != 2 or told.count("\n") == 1 or (told == "" and "TRACED IN ANOTHER WAY" in text), (text, told)
    return f"{form}: {status}"


@pytest.mark.parametrize("number", [5, pytest.param(1000, marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_hostile_dumps(number: int, tmp_path: Path) -> None:
    outcomes = run_cases("tests.ports.test_fuzz_candidate", number, tmp_path)
    assert sum(n for outcome, n in outcomes.items() if outcome.endswith("2")) > number // 5
    assert sum(n for outcome, n in outcomes.items() if outcome.endswith(("0", "1"))) > number // 10
