"""What --force may replace, and that kill -9 at any moment loses nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.unit.checkpoint.breaking import edit_config, write_shard
from vidi.checkpoint import save, synthetic
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.inspect import inspect_folder
from vidi.checkpoint.load import load
from vidi.config import VidiConfig

ROOT = Path(__file__).parents[3]
SHARD = "model-00001-of-00005.safetensors"


def _only(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()

    return change


def _as_folder(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        (folder / name / "thesis.txt").write_text("do not lose me")

    return change


def _as_link(folder: Path) -> None:
    real = folder.parent / "elsewhere.safetensors"
    (folder / SHARD).rename(real)
    (folder / SHARD).symlink_to(real)


def _foreign_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))


def _foreign_tensors(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    for path in folder.glob("*.safetensors"):
        path.unlink()
    name = "model-00001-of-00001.safetensors"
    write_shard(folder / name, {"bert.embeddings.weight": entry}, bytes(4))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"bert.embeddings.weight": name}}))


FOREIGN: dict[str, tuple[Callable[[Path], None], str]] = {
    "config-alone": (_only("config.json"), "no model.safetensors.index.json"),
    "config-of-another-model": (_foreign_config, "model_type = 'bert'"),
    "tensors-of-another-model": (_foreign_tensors, "bert.embeddings.weight, no tensor of this model"),
    "no-shards": (_only("config.json", "model.safetensors.index.json"), "none of its shards is there"),
    "a-file-more": (lambda f: (f / "thesis.txt").write_text("x"), "thesis.txt"),
    "a-hidden-file": (lambda f: (f / ".git").mkdir(), ".git is no regular file"),
    "a-foreign-shard": (lambda f: shutil.copy(f / SHARD, f / "adapter.safetensors"), "adapter.safetensors"),
    "a-shard-more": (
        lambda f: shutil.copy(f / SHARD, f / "model-00009-of-00009.safetensors"),
        "does not list its shards",
    ),
    "folder-as-shard": (_as_folder(SHARD), f"{SHARD} is no regular file"),
    "folder-as-tokenizer": (_as_folder("tokenizer.json"), "tokenizer.json is no regular file"),
    "link-as-shard": (_as_link, f"{SHARD} is no regular file"),
    "damaged": (lambda f: os.truncate(f / SHARD, 100), "truncated"),
    "hostile-name": (lambda f: (f / "x\x1b[2J").touch(), r"x\x1b[2J"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_what_force_does_not_replace(case: str, broken: Path) -> None:
    change, said = FOREIGN[case]
    change(broken)
    before = _snapshot(broken)
    with pytest.raises(CheckpointError, match="not replaced, remove it yourself") as refused:
        synthetic.synth(broken, VidiConfig.tiny(), 1, force=True)
    assert said in str(refused.value)
    assert _snapshot(broken) == before
    assert sorted(path.name for path in broken.parent.iterdir() if path.name.startswith(".")) == []


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_force_replaces(broken: Path) -> None:
    """Checkpoints of other sizes and of `save`, with a tokenizer; a link to the folder is none."""
    (broken / "tokenizer.json").write_text("{}")
    save.save(synthetic.create(VidiConfig.tiny(), 2), broken, force=True)
    assert {path.name for path in broken.iterdir()} == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    }
    synthetic.synth(broken, VidiConfig.tiny(), 1, force=True)
    edit_config(broken, max_position_embeddings=77)
    synthetic.synth(broken, VidiConfig.tiny(), 1, force=True)
    (broken.parent / "link").symlink_to(broken)
    with pytest.raises(CheckpointError, match="is no folder"):
        synthetic.synth(broken.parent / "link", VidiConfig.tiny(), 1, force=True)


def test_a_disk_too_small_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """The full size has 21 GB; a file system that says it has less is believed."""
    usage = shutil.disk_usage(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000))
        with pytest.raises(CheckpointError, match=r"39\d,\d\d\d bytes to write, 1,000 bytes free; make room"):
            synthetic.synth(tmp_path / "x", VidiConfig.tiny(), 1)
    assert list(tmp_path.iterdir()) == []


# ---- kill -9 ----------------------------------------------------------------------------------------------------------

#: For each delay on stdin: forks a process that writes one checkpoint after another over the same place, and kills it then.
WRITER = """
import itertools, os, signal, sys, time
from vidi.checkpoint import save, synthetic
from vidi.config import VidiConfig
how, target = sys.argv[1:]
config = VidiConfig.tiny()
model = synthetic.create(config, 5)
for delay in sys.stdin:
    child = os.fork()
    if child == 0:
        for seed in itertools.count():
            if how == "synth":
                synthetic.synth(target, config, 5 + seed % 2, force=True)
            else:
                save.save(model, target, max_shard_bytes=(100_000, 10**9)[seed % 2], force=True)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["synth", "save"])
def test_killed_at_random_moments(how: str, tmp_path: Path) -> None:
    """40 kills: the target is always a whole checkpoint, and no more than one draft of the last run lies beside it."""
    rng, target = random.Random(how), tmp_path / "checkpoint"
    synthetic.synth(target, VidiConfig.tiny(), 5)
    wanted = {seed: synthetic.create(VidiConfig.tiny(), seed).decoder.embed.weight for seed in (5, 6)}
    command, drafts = [sys.executable, "-c", WRITER, how, str(target)], 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as killer:
        assert killer.stdin is not None
        assert killer.stdout is not None
        for _ in range(40):
            killer.stdin.write(f"{rng.random() * 0.4}\n")
            killer.stdin.flush()
            assert killer.stdout.readline() == "-9\n"
            assert inspect_folder(target).fits
            found = load(target).decoder.embed.weight
            assert any(torch.equal(found, value) for value in wanted.values())
            beside = [path.name for path in tmp_path.iterdir() if path != target]
            assert len(beside) <= 1
            drafts += len(beside)
        killer.stdin.close()
    assert drafts > 10, "the kills hardly met a run at work"
    synthetic.synth(target, VidiConfig.tiny(), 5, force=True)
    assert list(tmp_path.iterdir()) == [target]
