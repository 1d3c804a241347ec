"""Loading: strict, every dtype, parts of it, near no host memory, and an error that names file and tensor."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.unit.checkpoint.breaking import (
    add_tensor,
    edit_config,
    header_of,
    remove_tensor,
    replace_tensor,
    shard_with,
    write_shard,
)
from vidi import sizes_7b
from vidi.checkpoint import load as loading
from vidi.checkpoint import names, progress, synthetic
from vidi.checkpoint.errors import CheckpointError
from vidi.checkpoint.load import load
from vidi.checkpoint.save import save
from vidi.checkpoint.synthetic import create, synth
from vidi.config import VidiConfig

POS = "model.mm_rand_pos_h.mlp.0.weight"
EMBED = "model.embed_tokens.weight"
UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.2.pre_feedforward_layernorm.weight"


def by_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """The folder as another reader sees it."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype_against_another_reader(dtype: torch.dtype, tiny_folder: Path) -> None:
    model = load(tiny_folder, dtype=dtype)
    stored = by_safetensors(tiny_folder)
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(stored) == 171
    for name, value in stored.items():
        parameter = parameters[names.our_name(name) or ""]
        wide = names.expected(model.config)[name].is_float32 and dtype != torch.float64
        assert parameter.dtype == (torch.float32 if wide else dtype)
        assert torch.equal(parameter, value.to(parameter.dtype)), name
    assert not model.training
    assert not any(parameter.is_meta for parameter in parameters.values())


def test_chunks_join_without_a_seam(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring far smaller than the tensors, with and without a cast."""
    whole = {dtype: load(tiny_folder, dtype=dtype).state_dict() for dtype in (torch.bfloat16, torch.float32)}
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1000)
    for dtype, state in whole.items():
        assert all(torch.equal(a, state[name]) for name, a in load(tiny_folder, dtype=dtype).state_dict().items())


def test_float32_steps_stay_exact_in_half_precision(tiny_folder: Path) -> None:
    """Position MLPs are float32 and so are the frequencies, which are computed and not cast."""
    model = load(tiny_folder, dtype=torch.float16)
    for axis in (model.bridge.pos_h, model.bridge.pos_w, model.bridge.pos_t):
        assert {parameter.dtype for parameter in axis.parameters()} == {torch.float32}
        assert axis.freq_K.dtype == torch.float32
        assert not axis.freq_K.is_meta


def test_parts_and_layers(tiny_folder: Path) -> None:
    model = load(tiny_folder, parts=("vision_tower", "decoder"), layers=range(1, 3))
    there = {name for name, parameter in model.named_parameters() if not parameter.is_meta}
    assert there == {
        want.ours
        for want in names.expected(model.config).values()
        if want.part == "vision_tower" or (want.part == "decoder" and want.layer in (None, 1, 2))
    }
    whole = dict(load(tiny_folder).named_parameters())
    assert all(torch.equal(p, whole[name]) for name, p in model.named_parameters() if not p.is_meta)


def test_a_part_loads_from_a_folder_that_lacks_the_rest(broken: Path) -> None:
    (broken / "model.safetensors.index.json").unlink()
    tensors = by_safetensors(broken)
    for path in broken.glob("*.safetensors"):
        path.unlink()
    from safetensors.torch import save_file

    save_file({n: t for n, t in tensors.items() if n.startswith("model.mm_vis.")}, broken / "tower.safetensors")
    assert not load(broken, parts=("vision_tower",)).vision_tower.position.weight.is_meta
    with pytest.raises(CheckpointError, match="missing"):
        load(broken)


def test_wrong_selections(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="parts tower: the parts are vision_tower"):
        load(tiny_folder, parts=("tower",))
    with pytest.raises(ValueError, match=r"layers range\(3, 5\): the decoder has layers 0 to 3"):
        load(tiny_folder, layers=range(3, 5))
    with pytest.raises(ValueError, match=r"dtype torch.int8: one of torch.bfloat16"):
        load(tiny_folder, dtype=torch.int8)


def test_progress(tiny_folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    load(tiny_folder, progress=lambda *call: calls.append(call))
    total = sum(value.nbytes for value in by_safetensors(tiny_folder).values())
    assert calls[-1][:2] == (total, total)
    assert [call[0] for call in calls] == sorted(call[0] for call in calls)
    assert {call[2] for call in calls} == set(names.expected(VidiConfig.tiny()))


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("loading", shown=True) as report:
        assert report is not None
        report(5, 10, "a.b")
    assert "loading" in capsys.readouterr().err
    with progress.bar("loading", shown=False) as report:
        assert report is None


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_what_inspect_reports_is_refused(broken: Path) -> None:
    remove_tensor(broken, UP)
    remove_tensor(broken, NORM)
    with pytest.raises(
        CheckpointError, match=r"missing: no shard holds it \(and 1 more problems; `vidi inspect .*lists"
    ) as e:
        load(broken)
    assert e.value.tensor == UP


def test_a_9b_given_as_7b_is_refused_by_name(tmp_path: Path) -> None:
    for name, config in (("seven", sizes_7b.config("tiny")), ("nine", VidiConfig.tiny())):
        synth(tmp_path / name, config)
    shutil.copy(tmp_path / "seven" / "config.json", tmp_path / "nine")
    with pytest.raises(CheckpointError, match=r"config.json describes Vidi 7B, the tensors are those of Vidi 1.5 9B"):
        load(tmp_path / "nine")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_7b_loads_and_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """The same bits as made in memory, and after saving; position MLPs have passed through the model's dtype."""
    config = sizes_7b.config("tiny")
    synth(tmp_path / "made", config, dtype=torch.float32)
    model = load(tmp_path / "made", dtype=dtype)
    weight = model.bridge.pos_h.fc1.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.to(dtype).float())
    save(model, tmp_path / "saved")
    again, made = load(tmp_path / "saved", dtype=dtype), create(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, made.get_parameter(name)), name
    stored = load_file(next(f for f in sorted((tmp_path / "made").glob("*.safetensors")) if POS in load_file(f)))[POS]
    assert torch.equal(weight, stored) == (dtype == torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_damaged_weights(value: float, dtype: torch.dtype, broken: Path) -> None:
    path = shard_with(broken, UP)
    header, data = header_of(path)
    at = header[UP]["data_offsets"][0] + 2 * 1234
    bits = struct.pack("<f", value)[2:]
    write_shard(path, header, data[:at] + bits + data[at + 2 :])
    with pytest.raises(CheckpointError, match=f"element 1234 is {value}: damaged weights") as caught:
        load(broken, dtype=dtype)
    assert (caught.value.file, caught.value.tensor) == (str(path), UP)


def test_a_weight_too_large_for_half_precision(broken: Path) -> None:
    data = struct.pack("<f", 7e4)[2:] + bytes(2 * 96 * 40 - 2)
    replace_tensor(broken, UP, data=data)
    load(broken, dtype=torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"element 0 is 69632, too large for torch.float16; load in a wider dtype"
    ):
        load(broken, dtype=torch.float16)


def test_a_head_that_is_not_tied(broken: Path) -> None:
    path = shard_with(broken, EMBED)
    header, data = header_of(path)
    begin, end = header[EMBED]["data_offsets"]
    same = data[begin:end]
    add_tensor(broken, EMBED, names.HEAD, "BF16", [512, 40], same)
    load(broken)
    replace_tensor(broken, names.HEAD, data=same[:2000] + bytes([same[2000] ^ 1]) + same[2001:])
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens.weight at element 1000") as caught:
        load(broken)
    assert caught.value.tensor == names.HEAD


def test_a_head_in_a_wider_dtype_is_compared_by_value(broken: Path) -> None:
    embed = by_safetensors(broken)[EMBED].float()
    add_tensor(broken, UP, names.HEAD, "F32", [512, 40], embed.numpy().tobytes())
    load(broken)


def test_a_file_cut_while_it_is_read(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The header was fine when it was read; the file is cut before its data is."""
    path = shard_with(broken, UP)
    report = loading.inspect_folder(broken)
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(loading, "inspect_folder", lambda *_, **__: report)
    with pytest.raises(CheckpointError, match="the file ended while it was read"):
        load(broken)


def test_a_config_given_by_hand_replaces_the_file(broken: Path) -> None:
    edit_config(broken, rope_theta=5.0)
    assert load(broken, config=VidiConfig.tiny()).config.decoder.rope_theta == 10000.0


@pytest.mark.slow
def test_host_memory_beside_the_model(tmp_path: Path) -> None:
    """Peak resident memory of a fresh process: the model's own bytes and little more, for one tensor of 128 MB."""
    tiny = VidiConfig.tiny()
    config = replace(tiny, decoder=replace(tiny.decoder, vocab_size=1_600_000))
    synthetic.synth(tmp_path / "big", config)
    code = (
        "import sys, json, resource, torch; from vidi.checkpoint.load import load, empty_model\n"
        "from vidi.config import VidiConfig\n"
        "load(sys.argv[2])\n"  # everything imported and warm
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model = load(sys.argv[1], dtype=getattr(torch, sys.argv[3]))\n"
        "print(json.dumps([peak() - before, sum(p.nbytes for p in model.parameters())]))\n"
    )
    small = tmp_path / "small"
    synthetic.synth(small, tiny)
    for dtype, allowance in (("bfloat16", 24 << 20), ("float32", loading.NUM_SLOTS * loading.CHUNK_BYTES + (40 << 20))):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "big"), str(small), dtype],
            check=True, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        grown, model_bytes = json.loads(done.stdout)
        print(f"{dtype}: model {model_bytes / 1e6:.0f} MB, peak grew by {grown / 1e6:.0f} MB")
        assert grown < model_bytes + allowance
    shutil.rmtree(tmp_path / "big")
