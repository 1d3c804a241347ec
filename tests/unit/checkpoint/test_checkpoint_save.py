"""Saving: the same bits back, by this loader and by others, and never half a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.not_run import not_run
from vidi.checkpoint import names, save, synthetic
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.headers import read_shard
from vidi.checkpoint.inspect import inspect_folder
from vidi.checkpoint.load import load
from vidi.config import VidiConfig
from vidi.inputs.batch import Batch


@pytest.mark.parametrize("limit", [save.MAX_SHARD_BYTES, 60_000, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_back_bit_for_bit(dtype: torch.dtype, limit: int, tmp_path: Path) -> None:
    model = synthetic.create(VidiConfig.tiny(), 2, dtype=dtype)
    with torch.no_grad():
        model.decoder.embed.weight[3] = -0.0
    save.save(model, tmp_path / "x", max_shard_bytes=limit)
    assert inspect_folder(tmp_path / "x").fits
    again = load(tmp_path / "x", dtype=dtype)
    assert again.config == model.config
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    shards = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(shards) == {1: 171, 60_000: len(shards), save.MAX_SHARD_BYTES: 1}[limit]
    for path in shards:
        entries = read_shard(path).tensors.values()
        assert len(entries) == 1 or sum(entry.nbytes for entry in entries) <= limit
        assert all(entry.start % 4 == 0 for entry in entries if entry.dtype == "F32")


def test_safetensors_reads_it(tmp_path: Path) -> None:
    model = synthetic.create(VidiConfig.tiny(), 2)
    save.save(model, tmp_path / "x", max_shard_bytes=100_000)
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    parameters, seen = dict(model.named_parameters()), set()
    for path in (tmp_path / "x").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
                assert torch.equal(file.get_tensor(name), parameters[names.our_name(name) or ""])
                seen.add(name)
    assert seen == set(names.expected(model.config)) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in parameters.values())


def test_transformers_reads_the_text_part(tmp_path: Path) -> None:
    """Gemma 2 of transformers, from the saved folder: the same weights, tied head, and the same logits."""
    try:
        from transformers import Gemma2Config, Gemma2ForCausalLM
        from transformers import logging as hf_logging
    except ImportError:
        not_run("transformers is not installed; pip install 'vidi-parity[oracle]'")
    hf_logging.set_verbosity_error()
    config = VidiConfig.tiny()
    model = synthetic.create(config, 2, dtype=torch.float32)
    save.save(model, tmp_path / "x", max_shard_bytes=100_000)
    raw = json.loads((tmp_path / "x" / "config.json").read_text())
    fields = {
        name: raw[name] for name in raw if not name.startswith(("mm_", "vision_", "audio_", "model_type", "arch"))
    }
    fields.pop("torch_dtype")
    other = Gemma2ForCausalLM.from_pretrained(
        tmp_path / "x", config=Gemma2Config(**fields), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = other.state_dict()
    text = [want for want in names.expected(config).values() if want.part == "decoder"]
    assert {want.official for want in text} == set(state) - {names.HEAD}
    parameters = dict(model.named_parameters())
    assert all(torch.equal(state[want.official], parameters[want.ours]) for want in text)
    assert torch.equal(state[names.HEAD], model.decoder.embed.weight)
    ids = torch.randint(3, 500, (1, 8), generator=torch.Generator().manual_seed(0))  # no longer than the window
    with torch.no_grad():
        ours, theirs = model(Batch(ids)), other(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_partly_loaded_model_is_not_saved(tiny_folder: Path, tmp_path: Path) -> None:
    model = load(tiny_folder, parts=("vision_tower",))
    with pytest.raises(CheckpointError, match=r"107 parameters were never loaded .*nothing saved"):
        save.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---- whole or not at all ----------------------------------------------------------------------------------------------


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    model = synthetic.create(VidiConfig.tiny(), 2)

    def stop(done: int, total: int, name: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save.save(model, tmp_path / "x", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_replacement_leaves_the_old_one(tmp_path: Path) -> None:
    old, new = synthetic.create(VidiConfig.tiny(), 1), synthetic.create(VidiConfig.tiny(), 2)
    save.save(old, tmp_path / "x")

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save.save(new, tmp_path / "x", force=True, progress=stop)
    assert torch.equal(load(tmp_path / "x").decoder.norm.weight, old.decoder.norm.weight)
    save.save(new, tmp_path / "x", force=True)
    assert torch.equal(load(tmp_path / "x").decoder.norm.weight, new.decoder.norm.weight)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_folder_appears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing under the final name before the last byte is flushed, and every file is flushed."""
    flushed, target = [], tmp_path / "x"
    real = save._flush

    def flush(file: object) -> None:
        assert not target.exists()
        flushed.append(Path(file.name).name)  # type: ignore[attr-defined]
        real(file)

    monkeypatch.setattr(save, "_flush", flush)
    save.save(synthetic.create(VidiConfig.tiny(), 2), target, max_shard_bytes=100_000)
    assert sorted(flushed) == sorted(path.name for path in target.iterdir())


def test_targets(tmp_path: Path) -> None:
    model = synthetic.create(VidiConfig.tiny(), 2)
    (tmp_path / "empty").mkdir()
    save.save(model, tmp_path / "empty")
    save.save(model, tmp_path / "new" / "deeper")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("do not lose me")
    with pytest.raises(CheckpointError, match="is there and not empty"):
        save.save(model, full)
    with pytest.raises(CheckpointError, match=r"holds more than a checkpoint \(thesis.txt\); not replaced"):
        save.save(model, full, force=True)
    with pytest.raises(CheckpointError, match="is there and is no folder"):
        save.save(model, full / "thesis.txt", force=True)
    assert (full / "thesis.txt").read_text() == "do not lose me"
    with pytest.raises(ValueError, match="max_shard_bytes 0"):
        save.save(model, tmp_path / "y", max_shard_bytes=0)


def test_plan() -> None:
    assert save.plan([3, 3, 3, 9, 1], 6) == [[0, 1], [2], [3], [4]]
    assert save.plan([], 6) == []
    assert save.limit_for([3, 3, 3, 9, 1], 2) == 10
